"""Marlin: the layout element by element and as a packer of others writes it, and what vLLM asks for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Array
from test_formats import LAYER, assert_same, read_layer, written

import bitwright
from bitwright import QuantizedTensor
from bitwright.errors import CheckpointError, UnsupportedModelError
from bitwright.formats import Precision, detect_format
from bitwright.formats.marlin import MarlinFormat
from bitwright.grids.tensor import Grid

OUT, CHANNELS = 192, 384
GOLDEN = Path(__file__).parents[1] / "data" / "marlin.npz"
SPELLINGS: list[dict[str, Any]] = [
    {"quant_method": "marlin"},
    {"quant_method": "marlin", "bits": 4, "checkpoint_format": "marlin"},
    {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
]


def tensor_of(codes: Array, scales: Array) -> QuantizedTensor:
    return QuantizedTensor(
        codes=codes,
        scales=scales,
        biases=None,
        zeros=np.full(scales.shape, 8, np.uint8),
        bits=4,
        group_size=codes.shape[1] // scales.shape[1],
        grid="symmetric",
    )


def quantized(group_size: int | None, out: int = OUT, channels: int = CHANNELS) -> QuantizedTensor:
    weight = np.random.default_rng(1).standard_normal((out, channels), dtype=np.float32)
    return bitwright.quantize_rtn(
        weight, 4, group_size, grid="symmetric", scale_dtype=np.dtype(np.float16)
    )


def settings_for(group_size: int | None) -> dict[str, Any]:
    precision = Precision(4, group_size, "symmetric")
    return MarlinFormat.config(precision, {LAYER: precision, "lm_head": None}, "model.layers.")


def words_of(codes: Array) -> Array:
    """Return ``B``, from what each thread holds in its registers as PTX describes ``mma.m16n8k16``.

    Thread ``4g + t`` has the elements (k, n) of the 16 x 8 operand B: register 0 with k = 2t, 2t + 1 and
    register 1 with k = 2t + 8, 2t + 9, all with n = g. Marlin's words hold both registers of two operands
    that are neighbours: those with the even k in the low half, those with the odd in the high half.
    """
    out, channels = codes.shape
    words = np.zeros((channels // 16, out * 2), np.uint32)
    for row in range(channels // 16):
        for wide in range(out // 64):
            for thread in range(32):
                g, t = divmod(thread, 4)
                for tile in range(4):
                    word = 0
                    for operand in range(2):
                        for register in range(2):
                            for odd in range(2):
                                k = 16 * row + 2 * t + odd + 8 * register
                                n = 64 * wide + 16 * tile + 8 * operand + g
                                word |= int(codes[n, k]) << (16 * odd + 8 * operand + 4 * register)
                    words[row, 128 * wide + 4 * thread + tile] = word
    return words.view(np.int32)


def scales_of(scales: Array) -> Array:
    """Return ``s``. PTX: thread ``4g + t`` has column g of B, and columns 2t and 2t + 1 of the sums."""
    out, groups = scales.shape
    stored = np.zeros((groups, out), np.float16)
    for group in range(groups):
        position = 0
        if groups > 1:
            for wide in range(out // 64):
                for g in range(8):
                    for operand in range(8):
                        stored[group, position] = scales[64 * wide + 8 * operand + g, group]
                        position += 1
        else:
            for half in range(out // 32):
                for t in range(4):
                    for operand in range(4):
                        for odd in range(2):
                            stored[group, position] = scales[
                                32 * half + 8 * operand + 2 * t + odd, group
                            ]
                            position += 1
    return stored


@pytest.mark.parametrize("group_size", [128, None])
def test_every_element_is_where_tensor_cores_take_it(group_size: int | None) -> None:
    tensor = quantized(group_size)
    packed = MarlinFormat.pack(LAYER, tensor)
    assert sorted(packed) == [f"{LAYER}.B", f"{LAYER}.s"]
    np.testing.assert_array_equal(packed[f"{LAYER}.B"], words_of(tensor.codes))
    np.testing.assert_array_equal(packed[f"{LAYER}.s"], scales_of(tensor.scales))
    grid = MarlinFormat(group_size or -1).pack_grid(LAYER, tensor)
    assert list(grid) == [f"{LAYER}.s"]
    np.testing.assert_array_equal(grid[f"{LAYER}.s"], packed[f"{LAYER}.s"])
    for array in packed.values():
        assert array.flags.c_contiguous


@pytest.mark.parametrize("kind", ["grouped", "whole_row"])
def test_packed_as_auto_gptq_and_vllm_do(tmp_path: Path, kind: str) -> None:
    """The file is what ``QuantLinear.pack`` of auto-gptq 0.7.1 makes, on the CPU, of the weights
    ``scales * (codes - 8)`` in float16 for group sizes 128 and 256. ``marlin_weights`` and
    ``marlin_permute_scales`` of vLLM 0.10.1.1, which its own tests use, gave the same."""
    out, channels, groups = 256, 256, 2 if kind == "grouped" else 1
    position = np.arange(out * channels, dtype=np.uint64).reshape(out, channels)
    mixed = position * 2654435761 % 2**32
    codes = ((mixed ^ mixed >> 15) * 2246822519 % 2**32 >> 28).astype(np.uint8)
    scales = (1 + np.arange(out * groups).reshape(out, groups)) / 1024
    tensor = tensor_of(codes, scales.astype(np.float16))
    with np.load(GOLDEN) as golden:
        theirs = {f"{LAYER}.B": golden["B"], f"{LAYER}.s": golden[f"s_{kind}"]}
    ours = MarlinFormat.pack(LAYER, tensor)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_array_equal(ours[name], array)
    with written(tmp_path / "out", theirs, settings_for(128 if groups > 1 else None)) as checkpoint:
        assert_same(read_layer(checkpoint), tensor)


@pytest.mark.parametrize("group_size", [128, None])
@pytest.mark.parametrize("settings", SPELLINGS)
def test_all_spellings_are_read(
    tmp_path: Path, settings: dict[str, Any], group_size: int | None
) -> None:
    tensor = quantized(group_size)
    config = {"quantization_config": {**settings, "group_size": group_size or -1}}
    tensors = MarlinFormat.pack(LAYER, tensor)
    with written(tmp_path / "out", tensors, config) as checkpoint:
        assert isinstance(detect_format(checkpoint), MarlinFormat)
        assert_same(read_layer(checkpoint), tensor)
        assert read_layer(checkpoint, "lm_head") is None


def test_a_group_that_is_the_row_is_ordered_as_a_row(tmp_path: Path) -> None:
    """Kernels tell the two orders of scales apart by the number of groups alone."""
    tensor = quantized(128, channels=128)
    tensors = MarlinFormat.pack(LAYER, tensor)
    np.testing.assert_array_equal(tensors[f"{LAYER}.s"], scales_of(tensor.scales))
    with written(tmp_path / "out", tensors, settings_for(128)) as checkpoint:
        assert_same(read_layer(checkpoint), tensor)


@pytest.mark.parametrize("group_size", [64, 0, None, "128", True])
def test_group_sizes_that_marlin_has_not_are_refused(tmp_path: Path, group_size: object) -> None:
    config = {"quantization_config": {"quant_method": "marlin", "group_size": group_size}}
    tensors = MarlinFormat.pack(LAYER, quantized(128))
    with (
        written(tmp_path / "out", tensors, config) as checkpoint,
        pytest.raises(UnsupportedModelError, match=r"config\.json.*group_size"),
    ):
        detect_format(checkpoint)


PACKED = MarlinFormat.pack(LAYER, quantized(128))


@pytest.mark.parametrize("group_size", [128, None])
@pytest.mark.parametrize(
    ("part", "replacement"),
    [
        ("B", PACKED[f"{LAYER}.B"][:-1]),
        ("B", PACKED[f"{LAYER}.B"][:, :-1].copy()),
        ("B", PACKED[f"{LAYER}.B"][:, : OUT // 2].copy()),
        ("B", PACKED[f"{LAYER}.B"][:0]),
        ("B", PACKED[f"{LAYER}.B"].view(np.uint32)),
        ("B", PACKED[f"{LAYER}.B"].reshape(-1)),
        ("s", PACKED[f"{LAYER}.s"][:-1]),
        ("s", PACKED[f"{LAYER}.s"][:, :-1].copy()),
        ("s", PACKED[f"{LAYER}.s"].view(np.int16)),
        ("s", None),
    ],
)
def test_damaged_tensors_are_named(
    tmp_path: Path, part: str, replacement: Array | None, group_size: int | None
) -> None:
    tensors = dict(PACKED)
    if replacement is None:
        del tensors[f"{LAYER}.{part}"]
    else:
        tensors[f"{LAYER}.{part}"] = replacement
    with (
        written(tmp_path / "out", tensors, settings_for(group_size)) as checkpoint,
        pytest.raises(CheckpointError, match=LAYER),
    ):
        read_layer(checkpoint)


def test_widths_that_are_no_whole_tiles_are_refused(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {
        f"{LAYER}.B": np.zeros((8, 96), np.int32),
        f"{LAYER}.s": np.ones((1, 48), np.float16),
    }
    with (
        written(tmp_path / "out", tensors, settings_for(None)) as checkpoint,
        pytest.raises(CheckpointError, match="contradict"),
    ):
        read_layer(checkpoint)


@pytest.mark.parametrize(
    ("shape", "precision", "message"),
    [
        ((64, 128), Precision(8, 128, "symmetric"), "stores 4 bits, not 8"),
        ((64, 128), Precision(4, 128, "zero_point"), "symmetric grids, not zero_point"),
        ((64, 128), Precision(4, 64, "symmetric"), "groups of 128 or whole rows, not 64"),
        ((96, 128), Precision(4, 128, "symmetric"), "64 output and 128 input channels, not 96 and"),
        ((64, 192), Precision(4, None, "symmetric"), "64 output and 128 input .* 64 and 192"),
    ],
)
def test_what_marlin_cannot_hold(
    shape: tuple[int, int], precision: Precision, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{LAYER}: .*{message}"):
        MarlinFormat.check(LAYER, shape, precision)


def test_other_tensors_are_not_packed() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 128), dtype=np.float32)
    kinds: list[tuple[int, Grid]] = [(4, "zero_point"), (4, "affine"), (8, "symmetric")]
    for bits, grid in kinds:
        with pytest.raises(ValueError, match=f"{LAYER}: .*not {bits} bits on {grid} grids"):
            MarlinFormat.pack(LAYER, bitwright.quantize_rtn(weight, bits, 128, grid=grid))


def test_config_is_what_vllm_loads() -> None:
    assert settings_for(128)["quantization_config"] == {
        "quant_method": "marlin",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "marlin",
        "lm_head": False,
    }
    assert settings_for(None)["quantization_config"]["group_size"] == -1
    default = Precision(4, 128, "symmetric")
    for other, message in ((None, "in float"), (Precision(4, None, "symmetric"), "one precision")):
        with pytest.raises(ValueError, match=f"^{LAYER}: .*{message}"):
            MarlinFormat.config(default, {LAYER: other}, "model.layers.")


def test_models_are_declared_to_be_in_float16() -> None:
    text = {"torch_dtype": "bfloat16", "hidden_size": 4}
    config = {"dtype": "bfloat16", "text_config": text}
    assert MarlinFormat.spell(config) == {
        "dtype": "float16",
        "text_config": {"torch_dtype": "float16", "hidden_size": 4},
    }
    assert MarlinFormat.spell({"dtype": None}) == {"dtype": None}
    assert config["dtype"] == text["torch_dtype"] == "bfloat16"
