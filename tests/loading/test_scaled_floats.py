"""FP8, MXFP4 and NVFP4 checkpoints are what their values are under their scales."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared_data import TESTS

import bitwright
from bitwright.checkpoint import Checkpoint
from bitwright.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from bitwright.loading.scaled_floats import decode_scaled_floats

TINY = TESTS / "data" / "tiny"
Arrays = dict[str, Any]
E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu
FLOAT4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
RNG = np.random.default_rng(7)
Scaled = tuple[Arrays, Any]  # what is stored for NAME.weight by the end of its name, and its values
Kind = Callable[[Any], Scaled]


def positive(*shape: int) -> Any:
    return RNG.uniform(0.01, 0.1, shape).astype(np.float32)


def by_blocks(weight: Any, height: int = 128, width: int = 128, dtype: Any = E4M3) -> Scaled:
    rows, columns = weight.shape
    scales = positive(-(-rows // height), -(-columns // width))
    grid = scales.repeat(height, 0).repeat(width, 1)[:rows, :columns]
    codes = (weight / grid).astype(dtype)
    return {"weight": codes, "weight_scale_inv": scales}, codes.astype(np.float32) * grid


def whole(weight: Any) -> Scaled:
    scale = np.float32(0.02)
    codes = (weight / scale).astype(E4M3)
    stored = {"weight": codes, "weight_scale": np.array(scale), "input_scale": np.ones((), "f4")}
    return stored, codes.astype(np.float32) * scale


def by_channel(weight: Any) -> Scaled:
    scales = positive(len(weight), 1).astype(ml_dtypes.bfloat16)
    codes = (weight / scales.astype(np.float32)).astype(E4M3)
    stored = {"weight": codes, "weight_scale": scales, "input_scale_ub": np.ones(1, np.float32)}
    return stored, codes.astype(np.float32) * scales.astype(np.float32)


def halves(weight: Any) -> tuple[Any, Any]:
    codes = RNG.integers(0, 16, weight.shape).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, np.array(FLOAT4, np.float32)[codes]


def nvfp4(weight: Any) -> Scaled:
    packed, values = halves(weight)
    scales = RNG.uniform(1, 400, (len(weight), weight.shape[1] // 16)).astype(E4M3)
    scales[0, 0] = 0  # a group of zeros
    factor = np.float32(1 / 3000)
    grid = (scales.astype(np.float32) * factor).repeat(16, 1)
    stored = {"weight": packed, "weight_scale": scales, "weight_scale_2": factor.reshape(1)}
    return stored, values * grid


def mxfp4(weight: Any) -> Scaled:
    packed, values = halves(weight)
    powers = RNG.integers(115, 125, (len(weight), weight.shape[1] // 32)).astype(np.uint8)
    grid = powers.view(E8M0).astype(np.float32).repeat(32, 1)
    return {"weight": packed, "weight_scale": powers}, values * grid


def declares(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


KINDS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "blocks": (by_blocks, declares("fp8", weight_block_size=[128, 128])),
    "small blocks": (
        lambda w: by_blocks(w, 24, 40),
        declares("fp8", weight_block_size=[24, 40]),
    ),
    "nobody says": (by_blocks, {}),
    "E5M2": (lambda w: by_blocks(w, dtype=E5M2), declares("fp8")),
    "tensor": (whole, declares("modelopt", quant_algo="FP8")),
    "channels": (by_channel, declares("fbgemm_fp8")),
    "compressed-tensors": (
        by_channel,
        declares("compressed-tensors", format="float-quantized", config_groups={"group_0": {}}),
    ),
    "4 bits": (nvfp4, declares("modelopt", quant_algo="NVFP4")),
    "powers": (mxfp4, declares("modelopt", quant_algo="MXFP4")),
}


def twins(source: Path, kind: str, target: Path) -> tuple[Path, Path]:
    """Write a model with scaled floats in its projections, and one with what these stand for."""
    make, declared = KINDS[kind]
    stored = load_file(source / "model.safetensors")
    plain = dict(stored)
    for name in [each for each in stored if each.endswith("_proj.weight")]:
        arrays, values = make(stored.pop(name).astype(np.float32))
        stem = name.removesuffix("weight")
        stored |= {stem + end: array for end, array in arrays.items()}
        plain[name] = np.ascontiguousarray(values)
    config = json.loads((source / "config.json").read_text())
    folders = target / "scaled", target / "plain"
    for folder, arrays, said in zip(folders, (stored, plain), (declared, {}), strict=True):
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".txt") and file.name != "config.json":
                shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps({**config, **said}))
        save_file(
            {n: np.ascontiguousarray(a) for n, a in arrays.items()}, folder / "model.safetensors"
        )
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_floats_quantize_as_their_values(kind: str, tmp_path: Path) -> None:
    scaled, plain = twins(bitwright.demo_folder(), kind, tmp_path)
    ids = [[1, 5, 9, 20]]
    models = [bitwright.load_model(each) for each in (scaled, plain)]
    assert np.array_equal(*(model.logits(ids) for model in models))
    for folder in (scaled, plain):
        out = folder.with_name(f"{folder.name}-q")
        bitwright.quantize(
            folder, out, "rtn", 4, 32, scale_dtype="float16", exclude=["*down_proj"], progress=False
        )
    written = [
        load_file(tmp_path / f"{each}-q" / "model.safetensors") for each in ("scaled", "plain")
    ]
    assert written[0].keys() == written[1].keys()
    for name, array in written[0].items():
        assert np.array_equal(array, written[1][name]), name
    config = json.loads((tmp_path / "scaled-q" / "config.json").read_text())
    assert config == json.loads((tmp_path / "plain-q" / "config.json").read_text())
    assert "quant_method" not in config["quantization_config"]


def test_they_take_the_disk_of_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.quantization.plan._free_disk", lambda _: 0)
    said = []
    for folder in twins(bitwright.demo_folder(), "blocks", tmp_path):
        with pytest.raises(bitwright.OutputError, match="of the disk") as error:
            bitwright.quantize(folder, tmp_path / "out", "rtn", 4, 32, progress=False)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("source", ["qwen3_moe", "deepseek_v3"])
def test_experts_and_latents_are_decoded(source: str, tmp_path: Path) -> None:
    scaled, plain = twins(TINY / source, "blocks", tmp_path)
    logits = [bitwright.load_model(each).logits([[1, 5, 9]]) for each in (scaled, plain)]
    assert np.array_equal(*logits)


def opened(tensors: Arrays, folder: Path, **config: Any) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    decode_scaled_floats(checkpoint)
    return checkpoint


def test_stacked_blocks_of_experts_are_transposed(tmp_path: Path) -> None:
    """As gpt-oss stores them; transformers computes with [experts, in, out]."""
    codes = RNG.integers(0, 16, (3, 10, 2, 32)).astype(np.uint8)
    powers = RNG.integers(110, 130, (3, 10, 2)).astype(np.uint8)
    values = np.array(FLOAT4)[codes] * 2.0 ** (powers.astype(int) - 127)[..., None]
    expected = values.reshape(3, 10, 64).transpose(0, 2, 1)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    name = "model.layers.0.mlp.experts.gate_up_proj"
    checkpoint = opened(
        {f"{name}_blocks": blocks, f"{name}_scales": powers},
        tmp_path / "in",
        **declares("mxfp4"),
    )
    assert checkpoint.names() == [name]
    assert checkpoint.shape(name) == (3, 64, 10)
    assert checkpoint.dtype(name) == ml_dtypes.bfloat16
    assert "quantization_config" not in checkpoint.config
    assert np.array_equal(checkpoint.read(name).astype(np.float64), expected)
    part = checkpoint.read_part(name, 1, slice(5, 40))
    assert np.array_equal(part.astype(np.float64), expected[1, 5:40])


def test_experts_in_blocks_quantize_as_their_values(tmp_path: Path) -> None:
    source = TINY / "gpt_oss"
    with Checkpoint(source) as checkpoint:
        plain = {name: checkpoint.read(name) for name in checkpoint.names()}
    packed = dict(plain)
    for name in [each for each in plain if each.endswith(("gate_up_proj", "down_proj"))]:
        count, inner, out = packed.pop(name).shape
        codes = RNG.integers(0, 16, (count, out, inner // 32, 32)).astype(np.uint8)
        powers = RNG.integers(118, 124, (count, out, inner // 32)).astype(np.uint8)
        grid = powers.view(E8M0).astype(np.float32)[..., None]
        values = (np.array(FLOAT4, np.float32)[codes] * grid).reshape(count, out, inner)
        plain[name] = np.ascontiguousarray(values.swapaxes(1, 2)).astype(ml_dtypes.bfloat16)
        packed[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        packed[f"{name}_scales"] = powers
    written = []
    for kind, arrays, said in (("p", plain, {}), ("m", packed, declares("mxfp4"))):
        folder = tmp_path / kind
        folder.mkdir()
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **said}))
        save_file(arrays, folder / "model.safetensors")
        out = tmp_path / f"{kind}-q"
        bitwright.quantize(folder, out, "rtn", 4, 32, scale_dtype="float16", progress=False)
        written.append((out / "model.safetensors").read_bytes())
    assert packed.keys() != plain.keys()
    assert written[0] == written[1]


@pytest.mark.parametrize("scales", [(3, 2, 2), (3, 1, 1), (3,), (1,), ()])
def test_stacks_of_8_bits_are_decoded(scales: tuple[int, ...], tmp_path: Path) -> None:
    codes = RNG.standard_normal((3, 150, 130)).astype(E4M3)
    scale = positive(*scales)
    grid = np.broadcast_to(scale.reshape(-1, 1, 1), (3, 1, 1)) if scales != (3, 2, 2) else scale
    grid = grid.repeat(128, 1).repeat(128, 2)[:, :150, :130] if scales == (3, 2, 2) else grid
    checkpoint = opened(
        {"e.gate_up_proj": codes, "e.gate_up_proj_scale_inv": scale}, tmp_path / "in"
    )
    expected = codes.astype(np.float32) * grid
    assert np.array_equal(checkpoint.read("e.gate_up_proj"), expected)
    part = checkpoint.read_part("e.gate_up_proj", 2, slice(100, 140))
    assert np.array_equal(part, expected[2, 100:140])


GOOD = {"weight": np.ones((200, 192)).astype(E4M3), "weight_scale_inv": positive(2, 2)}
WRONG = {
    "zero": {"weight_scale_inv": np.zeros((2, 2), np.float32)},
    "NaN": {"weight_scale_inv": np.full((2, 2), np.nan, np.float32)},
    "byte 255": {"weight_scale_inv": np.full((2, 2), 255, np.uint8)},
    "negative": {"weight_scale_inv": -positive(2, 2)},
    "shape": {"weight_scale_inv": positive(3, 2)},
    "axes": {"weight_scale_inv": positive(1, 2, 2)},
    "absent": {"weight_scale_inv": None},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_scales_are_named_with_their_file(wrong: str, tmp_path: Path) -> None:
    parts = {**GOOD, **WRONG[wrong]}
    tensors = {f"a.up_proj.{end}": each for end, each in parts.items() if each is not None}
    tensors |= {f"b.up_proj.{end}": each for end, each in GOOD.items()}
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor 'a\.up_proj\.w"
    ) as caught:
        opened(tensors, tmp_path / "in").read("a.up_proj.weight")
    assert "\n" not in str(caught.value)


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    scaled, _ = twins(bitwright.demo_folder(), "blocks", tmp_path)
    with Checkpoint(scaled) as checkpoint:
        arrays = {name: checkpoint.read(name) for name in checkpoint.names()}
    arrays["model.layers.1.mlp.up_proj.weight"].view(np.uint8)[3, 4] = 0x7F
    save_file(arrays, scaled / "model.safetensors")
    with pytest.raises(
        NonFiniteError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj"
    ):
        bitwright.quantize(scaled, tmp_path / "out", "rtn", 4, 32, progress=False)
    assert not (tmp_path / "out").exists()


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    tensors = {f"a.up_proj.{end}": each for end, each in GOOD.items()}
    said = declares("compressed-tensors", transform_config={"config_groups": {"R1": {}}})
    with pytest.raises(UnsupportedModelError, match="transform_config"):
        opened(tensors, tmp_path / "in", **said)


def test_of_a_part_only_that_part_is_decoded(tmp_path: Path) -> None:
    codes = np.ones((2048, 2048), E4M3)
    checkpoint = opened(
        {"a.weight": codes, "a.weight_scale_inv": positive(16, 16)}, tmp_path / "in"
    )
    checkpoint.read_rows("a.weight", 0, 1)
    tracemalloc.start()
    checkpoint.read_rows("a.weight", 100, 116)
    few = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    checkpoint.read("a.weight")
    tracemalloc.stop()
    assert few < 2**20
    assert checkpoint.stored_bytes() == codes.size + 4 * 256
    assert checkpoint.nbytes() == 4 * codes.size  # as it is read
