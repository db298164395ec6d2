"""Groups that do not divide rows: one message names all such layers and what helps, and that does."""

import json
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from shared_data import TESTS

import bitwright
from bitwright.cli.main import cli
from bitwright.precision.recipe import as_globs

HIDDEN = 128


def odd_model(folder: Path, inner: int = 192, hidden: int = HIDDEN) -> Path:
    """A Llama of two blocks whose last layers have `inner` inputs."""
    rng = np.random.default_rng(0)
    config = {
        **{"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4},
        **{"num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64},
    }
    tensors = {
        name: rng.standard_normal((64, hidden)) for name in ("model.embed_tokens", "lm_head")
    }
    shapes = {
        **{"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)},
        **{"self_attn.k_proj": (hidden // 2, hidden), "self_attn.v_proj": (hidden // 2, hidden)},
        **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)},
        "mlp.down_proj": (hidden, inner),
    }
    for block in range(2):
        prefix = f"model.layers.{block}."
        for name, shape in shapes.items():
            tensors[prefix + name] = rng.standard_normal(shape) * 0.05
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[prefix + name] = np.ones(hidden)
    tensors["model.norm"] = np.ones(hidden)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {f"{name}.weight": each.astype(np.float32) for name, each in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def quantize(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["quantize", *map(str, arguments), "--method", "rtn"])
    return done.exit_code, str(done.exception or "") + done.output


@pytest.mark.parametrize(
    ("inner", "format", "options", "remedy"),
    [
        (192, "mlx", {"group_size": 128}, "model.layers.*.mlp.down_proj=group_size:64"),
        (160, "mlx", {"group_size": 128}, "model.layers.*.mlp.down_proj=group_size:32"),
        (160, "gptq", {}, "model.layers.*.mlp.down_proj=group_size:32"),
        (
            192,
            "compressed-tensors",
            {"group_size": 128},
            "model.layers.*.mlp.down_proj=group_size:64",
        ),
        (192, "awq", {"group_size": 128}, None),
        (176, "mlx", {}, None),
    ],
)
def test_the_message_names_all_layers_and_what_helps(
    tmp_path: Path, inner: int, format: str, options: dict[str, int], remedy: str | None
) -> None:
    model, out = odd_model(tmp_path / "odd", inner), tmp_path / "out"
    sizes = [word for size in options.values() for word in ("--group-size", size)]
    asked = (model, "--out", out, "--format", format, *sizes)
    _, said = quantize(*asked)
    size = options.get("group_size", 64)
    assert f"groups of {size} do not divide the {inner} input channels of " in said
    assert said.count("model.layers.*.mlp.down_proj") >= 2
    assert "\n" not in said.strip()
    assert not out.exists()
    assert (f"--override '{remedy}'" in said) if remedy else ("--override" not in said)
    tried = 0
    for option in ("--override", "--exclude", "--group-size"):
        for found in re.findall(rf"{option} ('[^']*'|\d+)", said):
            code, text = quantize(*asked, option, *shlex.split(found), "--overwrite")
            assert code == 0, text
            tried += 1
    assert tried == 1 + bool(remedy) + (inner != 176)


def test_every_layer_is_named_once(tmp_path: Path) -> None:
    model = odd_model(tmp_path / "odd", 288, 96)
    with pytest.raises(ValueError, match="do not divide") as error:
        bitwright.quantize(model, tmp_path / "out", "rtn", group_size=64)
    said = str(error.value)
    named = re.findall(r"model\.layers\.\*\.\w+\.\w+", said.split("What helps")[0])
    assert len(set(named)) == len(named) == 7
    assert "--group-size 32 for all layers" in said
    assert "channels of model.layers.*.mlp.down_proj" in said


@pytest.mark.parametrize("inner", [320, 768 + 32])
def test_superblocks_that_do_not_divide(tmp_path: Path, inner: int) -> None:
    """GGUF's k types have rows of 256; llama.cpp falls back to another type, and so can an override."""
    model, out = odd_model(tmp_path / "odd", inner, 256), tmp_path / "out"
    asked = (model, "--out", out, "--format", "gguf", "--grid", "k")
    _, said = quantize(*asked)
    assert f"Q4_K's blocks of 256 do not divide the {inner} input channels" in said
    assert "--override 'model.layers.*.mlp.down_proj=bits:8'" in said
    assert "--group-size" not in said


def test_other_runs_say_it_too(tmp_path: Path) -> None:
    model, ids = odd_model(tmp_path / "odd"), np.arange(128).reshape(4, 32) % 64
    options: dict[str, Any] = {"progress": False}
    with pytest.raises(ValueError, match=r"candidates: groups of 128 .*\*\.mlp\.down_proj.*3:64"):
        bitwright.dynamic_quantize(
            *(model, tmp_path / "out", 4.0, [(3, 128), (5, 128)], "rtn"),
            calibration=ids,
            sensitivities=bitwright.estimate_sensitivities(model, ids, progress=False),
            **options,
        )
    with pytest.raises(ValueError, match=r"groups of 128 .*\*\.mlp\.down_proj.*3:64, or"):
        bitwright.estimate_sensitivities(model, ids, 3, 128, 5, 128, **options)
    for size in (32, 64, 128):  # no smaller group does for rows of 24 channels
        with pytest.raises(ValueError, match=r"Estimate in whole rows, 3:-1$"):
            bitwright.estimate_sensitivities(
                TESTS / "data/tiny/deepseek_v3-qlora", ids, 3, size, 5, size, **options
            )
    with pytest.raises(ValueError, match=r"--override '.*down_proj=group_size:64'"):
        bitwright.quantize(
            model, tmp_path / "out", group_size=128, calibration=ids, preset="best", **options
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_the_best_preset_leaves_out_what_is_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.presets.best.TRAINED_TOKENS", 64)
    model, ids = odd_model(tmp_path / "odd"), np.arange(512).reshape(16, 32) % 64
    report = bitwright.quantize(
        *(model, tmp_path / "out", "rtn", 4, 128),
        calibration=ids,
        preset="best",
        exclude=["*.down_proj"],
        progress=False,
    )
    assert {layer.group_size for layer in report.layers} == {128}
    assert not any("down_proj" in layer.name for layer in report.layers)


NAMES = [
    f"model.layers.{block}.{name}"
    for block in range(12)
    for name in ("mlp.down_proj", "mlp.experts.0.down_proj", "mlp.experts.10.down_proj", "a")
]


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_globs_match_what_they_stand_for_and_nothing_else(chosen: set[str]) -> None:
    globs = as_globs(sorted(chosen), NAMES)
    matched = {name for name in NAMES if any(fnmatchcase(name, glob) for glob in globs)}
    assert matched == chosen
    assert len(globs) <= len(chosen)


def test_globs_are_few() -> None:
    down = [name for name in NAMES if name.endswith("s.10.down_proj")]
    experts = [name for name in NAMES if "experts" in name]
    assert as_globs(experts, NAMES) == ["model.layers.*.mlp.experts.*.down_proj"]
    assert as_globs(down[:1], down[:1]) == ["model.layers.*.mlp.experts.*.down_proj"]
    assert as_globs(down, NAMES) == down
