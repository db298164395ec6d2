"""Adapters: LoRA is merged into the base model's weights when they are read, others are refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import bitwright
from bitwright.checkpoint import open_checkpoint
from bitwright.errors import CheckpointError, UnsupportedModelError

DEMO = bitwright.demo_folder()
LAYER = "model.layers.1.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


def factors(layer: str, rank: int, ends: tuple[str, str]) -> dict[str, np.ndarray[Any, Any]]:
    draws = np.random.default_rng(rank)
    out, inner = open_checkpoint(DEMO).shape(f"{layer}.weight")
    if "embedding" in ends[0]:
        out, inner = inner, out
    return {
        f"base_model.model.{layer}.{ends[0]}": draws.standard_normal((rank, inner), np.float32) / 8,
        f"base_model.model.{layer}.{ends[1]}": draws.standard_normal((out, rank), np.float32) / 8,
    }


LINEAR = factors(LAYER, 4, ("lora_A.weight", "lora_B.weight"))


def adapter(folder: Path, tensors: Mapping[str, Any] = LINEAR, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "base_model_name_or_path": str(DEMO),
        "target_modules": ["q_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3.0),
        ({"alpha_pattern": {"q_proj": 1, LAYER: 2}}, 0.25),
        ({"alpha_pattern": {r"layers\\.[23]\\..*": 1, "self_attn.q_proj": 8}}, 2.0),
        ({"r": 9, "rank_pattern": {"q_proj": 4}}, 1.5),
    ],
)
def test_merged_weights(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    merged, original = open_checkpoint(adapter(tmp_path / "a", **config)), open_checkpoint(DEMO)
    first, second = LINEAR.values()
    weight = original.read(f"{LAYER}.weight")
    expected = (weight.astype(np.float64) + scale * second.astype(np.float64) @ first).astype(
        np.float32
    )
    found = merged.read(f"{LAYER}.weight")
    assert found.dtype == weight.dtype
    np.testing.assert_allclose(
        found.astype(np.float32), expected.astype(ml_dtypes.bfloat16).astype(np.float32), rtol=2**-7
    )
    assert not np.array_equal(found, weight)
    for name in set(merged.names()) - {f"{LAYER}.weight"}:
        assert np.array_equal(merged.read(name), original.read(name))


def test_embeddings_and_whole_tensors(tmp_path: Path) -> None:
    tensors = factors(EMBEDDING, 4, ("lora_embedding_A", "lora_embedding_B"))
    norm = np.arange(64, dtype=np.float32)
    merged = open_checkpoint(
        adapter(tmp_path / "a", {**tensors, "base_model.model.model.norm.weight": norm})
    )
    first, second = tensors.values()
    weight = open_checkpoint(DEMO).read(f"{EMBEDDING}.weight").astype(np.float32)
    expected = weight + 1.5 * (second @ first).T
    found = merged.read(f"{EMBEDDING}.weight")
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-7, atol=1e-4)
    assert np.array_equal(merged.read_rows(f"{EMBEDDING}.weight", 3, 9), found[3:9])
    assert np.array_equal(merged.read("model.norm.weight"), norm)


def test_an_adapter_is_quantized_evaluated_and_known(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    text = DEMO / "evaluation.txt"
    settings = {"length": 128, "samples": 2}
    merged = bitwright.evaluate(folder, text, **settings)
    assert merged.perplexity != bitwright.evaluate(DEMO, text, **settings).perplexity
    bitwright.convert(folder, tmp_path / "float", "float")
    assert bitwright.evaluate(tmp_path / "float", text, **settings).perplexity == pytest.approx(
        merged.perplexity, rel=1e-6
    )
    bitwright.quantize(folder, tmp_path / "q", "rtn", progress=False)
    bitwright.quantize(DEMO, tmp_path / "p", "rtn", progress=False)
    ours, theirs = (bitwright.load_model(tmp_path / name) for name in "qp")
    changed = [
        name
        for name, shape in ours.linear_shapes().items()
        if not np.array_equal(ours.weight(name, shape), theirs.weight(name, shape))
    ]
    assert changed == [LAYER]


def test_alpha_is_part_of_what_a_run_remembers(tmp_path: Path) -> None:
    from bitwright.checkpoint.fingerprint import model_fingerprint

    found = {
        model_fingerprint(open_checkpoint(place))
        for place in (DEMO, adapter(tmp_path / "a"), adapter(tmp_path / "b", lora_alpha=7))
    }
    assert len(found) == 3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LOHA"}, "an adapter of kind 'LOHA'"),
        ({"use_dora": True}, "a LoRA with use_dora"),
        ({"lora_bias": True}, "a LoRA with lora_bias"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "a LoRA with target_parameters"),
        ({"something_new": 1}, "a LoRA with something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "by changing its base model"),
    ],
)
def test_others_are_refused_by_name(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        open_checkpoint(adapter(tmp_path / "a", **config))
    assert "merge_and_unload()" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (LINEAR, {"r": 5}, "says rank 5 and alpha 6"),
        (LINEAR, {"rank_pattern": {"q_proj": 2}}, "says rank 2"),
        (LINEAR, {"base_model_name_or_path": "/no/where"}, "base model is not there"),
        (LINEAR, {"base_model_name_or_path": None}, "names no base model"),
        (LINEAR, {"base_model_name_or_path": "a" * 5000}, "cannot be the name of a base model"),
        (LINEAR, {"lora_alpha": 10**400}, "and alpha 1000"),
        (LINEAR, {"lora_alpha": float("nan")}, "and alpha nan"),
        (LINEAR, {"alpha_pattern": {"(([a-z]|[a-z.])+)+!": 3}}, "is too involved"),
        (LINEAR, {"rank_pattern": {"(.|.)" * 20 + "!": 3}}, "is too involved"),
        (LINEAR, {"alpha_pattern": {r"(?:b\\\\|a+)*!": 3}}, "is too involved"),
        (LINEAR, {"alpha_pattern": {"(" * 5000: 3}}, "is too involved"),
        (LINEAR, {"alpha_pattern": {"a{99999999999}": 3}}, "is no pattern of layers"),
        (LINEAR, {"alpha_pattern": {"[": 3}}, "is no pattern of layers"),
        (dict([*LINEAR.items()][:1]), {}, "only one of the two factors"),
        (
            {name.replace("q_proj", "x_proj"): each for name, each in LINEAR.items()},
            {},
            "does not have",
        ),
        (
            {name.replace("q_proj", "k_proj"): each for name, each in LINEAR.items()},
            {},
            "the base model's has",
        ),
        ({"base_model.model.model.norm.weight": np.ones(3, np.float32)}, {}, "of shape \\[3\\]"),
    ],
)
def test_what_does_not_belong_is_named(
    tmp_path: Path, tensors: Mapping[str, Any], config: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(adapter(tmp_path / "a", tensors, **config))
    assert "\n" not in str(caught.value)


def test_pickled_adapters_say_what_to_run(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"python -c .*weights_only=True"):
        open_checkpoint(folder)


def test_other_tokenizers_are_warned_of(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    shutil.copy(DEMO / "tokenizer.json", folder)
    open_checkpoint(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.warns(bitwright.BitwrightWarning, match="is another than the base model's"):
        open_checkpoint(folder)
