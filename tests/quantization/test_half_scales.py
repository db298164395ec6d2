"""The dtype of scales of models in float32, in mlx."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared_data import TESTS

import bitwright
from bitwright.loading.model import Model

DEMO = bitwright.demo_folder()
MOE = TESTS / "data" / "tiny" / "qwen3_moe"
UP = "model.layers.1.mlp.up_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"
EMBEDDING = "model.embed_tokens"


def in_float32(folder: Path, model: Path = DEMO, **factors: float) -> Path:
    """Copy a model with all tensors in float32, and some times a factor."""
    shutil.copytree(model, folder, ignore=lambda *_: ["expected.npz"])
    tensors = {
        name: array.astype(np.float32) * np.float32(factors.get(name.removesuffix(".weight"), 1))
        for name, array in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def rounded(model: Path, out: Path, **options: Any) -> Model:
    bitwright.quantize(model, out, "rtn", group_size=32, progress=False, **options)
    return bitwright.load_model(out)


def scales(model: Model) -> dict[str, np.dtype[Any]]:
    return {
        name: tensor.scales.dtype
        for name in model.quantized_layers()
        if (tensor := model.quantized(name)) is not None
    }


def test_scales_are_float16_unless_asked_for(tmp_path: Path) -> None:
    model = in_float32(tmp_path / "model")
    assert set(scales(rounded(model, tmp_path / "a")).values()) == {np.dtype(np.float16)}
    kept = rounded(model, tmp_path / "b", scale_dtype="float32")
    assert set(scales(kept).values()) == {np.dtype(np.float32)}
    narrow = scales(rounded(DEMO, tmp_path / "c"))
    assert {each.name for each in narrow.values()} == {"bfloat16"}


@pytest.mark.parametrize("factor", [1e-9, 1e-6, 1e7])
@pytest.mark.parametrize("name", [UP, EMBEDDING])
def test_a_layer_that_float16_cannot_hold_keeps_float32(
    tmp_path: Path, name: str, factor: float
) -> None:
    model = in_float32(tmp_path / "model", **{name: factor})
    with pytest.warns(bitwright.BitwrightWarning, match=rf"1 layer, such as {name}.*are float32$"):
        found = rounded(model, tmp_path / "q")
    dtypes = scales(found)
    assert {layer for layer, dtype in dtypes.items() if dtype == np.float32} == {name}
    shape = found.linear_shapes().get(name, (found.config.vocab_size, found.config.hidden_size))
    original = bitwright.load_model(model).weight(name, shape)
    change = found.weight(name, shape) - original
    assert np.square(change).sum() < 0.1 * np.square(original).sum()


def test_a_stack_of_experts_has_one_dtype(tmp_path: Path) -> None:
    model = in_float32(tmp_path / "model", MOE, **{EXPERT: 1e-9})
    with pytest.warns(bitwright.BitwrightWarning, match="their scales are float32"):
        found = rounded(model, tmp_path / "q")
    experts = {name: dtype for name, dtype in scales(found).items() if "experts" in name}
    wide = {name for name, dtype in experts.items() if dtype == np.float32}
    assert EXPERT in wide
    stack = found.experts[EXPERT].stacked_name
    assert wide == {name for name in experts if found.experts[name].stacked_name == stack}
