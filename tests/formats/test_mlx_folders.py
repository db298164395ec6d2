"""MLX folders whose config.json does not say all are read as mlx-lm reads them: by the shapes."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared_data import TINY

import bitwright
from bitwright.formats import detect_format

DEMO = bitwright.demo_folder()
MOE = next(each for each in TINY if each.name == "qwen3_moe")
TOKENS = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=DEMO, length=64, samples=2)
LAYER = "model.layers.0.mlp.down_proj"  # of 3 bits in groups of 32
TOP = {"group_size": 64, "bits": 4, "mode": "affine"}
Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of layers of several precisions, embedding included."""
    out = tmp_path_factory.mktemp("mlx") / "mixed"
    bitwright.quantize(
        DEMO,
        out,
        "rtn",
        4,
        64,
        "mlx",
        embedding_bits=6,
        overrides={
            "*.down_proj": {"bits": 3, "group_size": 32},
            "*.1.self_attn.*": {"bits": 8},
            "*.v_proj": {"group_size": 32},
        },
        exclude=["*.2.mlp.up_proj"],
        progress=False,
    )
    return out


def with_config(folder: Path, out: Path, change: Change) -> Path:
    """Copy a folder and change its config.json."""
    shutil.copytree(folder, out)
    config = change(json.loads((folder / "config.json").read_text()))
    (out / "config.json").write_text(json.dumps(config))
    return out


def settings(new: Any, other: Any = None) -> Change:
    """Give config.json new settings of quantization, under one key or two."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if not key.startswith("quantization")}
        kept |= {} if new is None else {"quantization": new}
        return kept | ({} if other is None else {"quantization_config": other})

    return change


def assert_same(folder: Path, other: Path) -> None:
    one, two = bitwright.load_model(folder), bitwright.load_model(other)
    layers = one.quantized_layers()
    assert layers
    assert two.quantized_layers() == layers
    for name, shape in layers.items():
        old, new = one.stored(name, shape), two.stored(name, shape)
        assert (old.bits, old.group_size) == (new.bits, new.group_size), name
        np.testing.assert_array_equal(old.dequantize(), new.dequantize(), err_msg=name)


def without(*patterns: str) -> Change:
    """Leave out what the map of layers says of those with such names."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        known = config["quantization"]
        kept = {key: each for key, each in known.items() if not any(p in key for p in patterns)}
        return {**config, "quantization": kept, "quantization_config": kept}

    return change


COMPLETE = [
    without("down_proj"),
    without("layers.1", "embed"),
    without("model."),
    settings(TOP),
    settings(TOP, TOP),
    settings({**TOP, "quant_method": "mlx"}),
    settings({"group_size": 128, "bits": 2}),  # mlx-lm does not look at them
    settings({**TOP, LAYER: {"bits": 3}}),
    settings({**TOP, LAYER: {"group_size": 32}}),
    settings({"bits": 3, "group_size": 32, LAYER: True}),
    settings({**TOP, "model.layers.2.mlp.up_proj": False}),
    settings({**TOP, f"language_model.{LAYER}": {"bits": 5, "group_size": 128}}),
    settings({**TOP, "model.vision_tower.0": {"bits": 5, "group_size": 128}}),
]


@pytest.mark.parametrize("change", COMPLETE)
def test_shapes_tell_what_the_map_does_not(tmp_path: Path, mixed: Path, change: Change) -> None:
    assert_same(mixed, with_config(mixed, tmp_path / "q", change))


@pytest.mark.parametrize(
    "change",
    [
        settings({"bits": 4}),
        settings({"group_size": 64}),
        settings({}),
        settings({"mode": "affine"}),
        settings(None, TOP),
        settings(None, {"bits": 4}),
        settings(None),
    ],
)
def test_folders_that_mlx_lm_refuses_are_read_with_a_warning(
    tmp_path: Path, mixed: Path, change: Change
) -> None:
    folder = with_config(mixed, tmp_path / "q", change)
    with pytest.warns(bitwright.BitwrightWarning, match=r"config\.json.*group_size.*mlx-lm"):
        assert_same(mixed, folder)
    with pytest.warns(bitwright.BitwrightWarning, match="mlx-lm"):
        report = bitwright.convert(folder, tmp_path / "out", "mlx", progress=False)
    assert not report.lossy
    assert len(report.warnings) == 1
    assert_same(mixed, tmp_path / "out")  # and this without a warning
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"][LAYER] == {"bits": 3, "group_size": 32}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bits": 4, "group_size": 32}, ["bits 4 and group_size 32"]),
        ({"bits": 3, "group_size": 64}, ["bits 3 and group_size 64"]),
        ({"bits": 6}, ["bits 6"]),
        ({"group_size": 64}, ["group_size 64"]),
        ({"bits": "3", "group_size": 32}, ["bits '3'"]),
        (False, ["is false, as of a layer in float"]),
        ({}, ["is {}, as of a layer in float"]),
    ],
)
def test_what_is_said_of_a_layer_must_agree_with_its_tensors(
    tmp_path: Path, mixed: Path, entry: Any, words: list[str]
) -> None:
    """mlx-lm refuses these, too."""
    folder = with_config(mixed, tmp_path / "q", settings({**TOP, LAYER: entry}))
    for run in (
        lambda: bitwright.convert(folder, tmp_path / "out", "float", progress=False),
        lambda: bitwright.evaluate(folder, TOKENS),
        lambda: bitwright.refine_model(DEMO, folder, tmp_path / "out", TOKENS, progress=False),
    ):
        with pytest.raises(bitwright.CheckpointError, match=LAYER) as caught:
            run()
        for word in (*words, f'"quantization.{LAYER}"', "has bits 3 and group_size 32"):
            assert word in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_true_takes_what_is_said_of_the_model(tmp_path: Path, mixed: Path) -> None:
    for number, top in enumerate([TOP, {"bits": 3, "group_size": 64}]):
        folder = with_config(mixed, tmp_path / str(number), settings({**top, LAYER: True}))
        with pytest.raises(bitwright.CheckpointError, match=f"{LAYER}.*bits 3 and group_size 32"):
            bitwright.evaluate(folder, TOKENS)


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_shapes_that_fit_no_precision_name_all_of_them(
    tmp_path: Path, mixed: Path, part: str
) -> None:
    folder = with_config(mixed, tmp_path / "q", settings(TOP))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.{part}"] = np.ascontiguousarray(tensors[f"{LAYER}.{part}"][:, :-1])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(bitwright.CheckpointError, match=LAYER) as caught:
        bitwright.evaluate(folder, TOKENS)
    shape = str(list(tensors[f"{LAYER}.{part}"].shape))
    assert shape in str(caught.value)


def test_without_a_model_config_must_tell_one_of_the_two(tmp_path: Path, mixed: Path) -> None:
    """Words and scales alone only tell the product of bits and group size."""
    for number, said in enumerate([{"bits": 3}, {"group_size": 32}, {"bits": 3, "group_size": 32}]):
        folder = with_config(mixed, tmp_path / str(number), settings({**TOP, LAYER: said}))
        with bitwright.Checkpoint(folder) as checkpoint:
            form = detect_format(checkpoint)
            assert form is not None
            found = form.read(checkpoint, LAYER)
        assert found is not None
        assert (found.bits, found.group_size) == (3, 32)
    folder = with_config(mixed, tmp_path / "none", settings(None))
    with bitwright.Checkpoint(folder) as checkpoint:
        with pytest.warns(bitwright.BitwrightWarning):
            form = detect_format(checkpoint)
        assert form is not None
        with pytest.raises(bitwright.CheckpointError, match=f'{LAYER}.*"quantization".*alone'):
            form.read(checkpoint, LAYER)


@pytest.mark.parametrize("change", [settings(TOP), settings({"group_size": 128, "bits": 8})])
def test_experts_in_stacks(tmp_path: Path, change: Change) -> None:
    bitwright.quantize(
        MOE,
        tmp_path / "q",
        "rtn",
        5,
        32,
        "mlx",
        overrides={"*.experts.*.down_proj": {"bits": 3}, "*.q_proj": {"bits": 8}},
        progress=False,
    )
    assert_same(tmp_path / "q", with_config(tmp_path / "q", tmp_path / "other", change))


@pytest.mark.parametrize("change", [without("down_proj"), settings(TOP), settings(None, TOP)])
def test_such_folders_are_inspected_evaluated_refined_and_trained(
    tmp_path: Path, mixed: Path, change: Change
) -> None:
    folder = with_config(mixed, tmp_path / "q", change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bitwright.BitwrightWarning)
        found, whole = (bitwright.inspect_model(each) for each in (folder, mixed))
        assert (found.format, found.bits_per_weight) == ("mlx", whole.bits_per_weight)
        figures = [bitwright.evaluate(each, TOKENS).perplexity for each in (folder, mixed)]
        assert figures[0] == figures[1]
        layers = []
        for each in (folder, mixed):
            out = tmp_path / f"{each.name}-refined"
            bitwright.refine_model(DEMO, each, out, TOKENS, progress=False)
            refined = bitwright.load_model(out)
            layers.append({name: refined.weight(name, s) for name, s in found_layers(mixed)})
        for name in layers[0]:
            np.testing.assert_array_equal(layers[0][name], layers[1][name], err_msg=name)
        trained = tmp_path / "trained"
        bitwright.dwq_quantize(DEMO, folder, trained, np.tile(TOKENS, (4, 1)), progress=False)
        model = bitwright.load_model(trained)
        for name, shape in found_layers(mixed):
            assert (
                model.stored(name, shape).bits
                == bitwright.load_model(mixed).stored(name, shape).bits
            )


def found_layers(folder: Path) -> list[tuple[str, tuple[int, int]]]:
    return list(bitwright.load_model(folder).quantized_layers().items())
