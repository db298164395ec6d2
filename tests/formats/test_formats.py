"""Formats: what is packed and written is read back bit by bit, and damage is named."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from reference import DTYPES, Array

import bitwright
from bitwright import QuantizedTensor
from bitwright.checkpoint import Checkpoint, CheckpointWriter
from bitwright.errors import CheckpointError, UnsupportedModelError
from bitwright.formats import FORMATS, Format, Precision, detect_format
from bitwright.formats.awq import AwqFormat
from bitwright.formats.compressed_tensors import CompressedTensorsFormat
from bitwright.formats.gguf import GgufFormat
from bitwright.formats.gptq import GptqFormat
from bitwright.formats.mlx import MlxFormat
from bitwright.grids.tensor import Grid

LAYER = "model.layers.0.self_attn.q_proj"
OUT, CHANNELS = 192, 384
CASES = [
    (kind, bits, size, grid)
    for kind in FORMATS.values()
    if kind is not GgufFormat  # whose files are tested in test_gguf_format.py
    for bits, size, grid in map(astuple, kind.precisions())
]


def quantized(
    bits: int, group_size: int | None, grid: Grid, scale_dtype: str = "float16"
) -> QuantizedTensor:
    weight = np.random.default_rng(bits).standard_normal((OUT, CHANNELS), dtype=np.float32)
    weight[0] = np.abs(weight[0])  # an integer zero of 0
    weight[1] = -np.abs(weight[1])
    return bitwright.quantize_rtn(
        weight, bits, group_size, grid=grid, scale_dtype=DTYPES[scale_dtype]
    )


def settings_for(kind: type[Format], precision: Precision) -> dict[str, Any]:
    return kind.config(precision, {LAYER: precision}, "model.layers.")


@contextmanager
def written(
    folder: Path, tensors: Mapping[str, Array], config: dict[str, Any]
) -> Iterator[Checkpoint]:
    with CheckpointWriter(folder, overwrite=True) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
        writer.write_json("config.json", {"model_type": "llama", **config})
    with Checkpoint(folder) as checkpoint:
        yield checkpoint


def read_layer(checkpoint: Checkpoint, name: str = LAYER) -> QuantizedTensor | None:
    reader = detect_format(checkpoint)
    assert reader is not None
    return reader.read(checkpoint, name)


def assert_same(found: QuantizedTensor | None, wanted: QuantizedTensor) -> None:
    assert found is not None
    assert (found.bits, found.group_size, found.grid) == (
        wanted.bits,
        wanted.group_size,
        wanted.grid,
    )
    for name in ("codes", "scales", "zeros", "biases", "group_index"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other, err_msg=name)
    np.testing.assert_array_equal(found.dequantize(), wanted.dequantize())


# there and back


@pytest.mark.parametrize(("kind", "bits", "group_size", "grid"), CASES)
def test_every_precision_comes_back(
    tmp_path: Path, kind: type[Format], bits: int, group_size: int | None, grid: Grid
) -> None:
    precision = Precision(bits, group_size, grid)
    kind.check(LAYER, (OUT, CHANNELS), precision)
    tensor = quantized(bits, group_size, grid)
    packed = kind.pack(LAYER, tensor)
    expected_bytes = OUT * CHANNELS * bits // 8
    assert max(array.nbytes for array in packed.values()) == expected_bytes
    with written(tmp_path / "model", packed, settings_for(kind, precision)) as checkpoint:
        assert isinstance(detect_format(checkpoint), kind)
        assert_same(read_layer(checkpoint), tensor)
        assert read_layer(checkpoint, "lm_head") is None


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_mlx_keeps_the_dtype_of_scales(tmp_path: Path, scale_dtype: str) -> None:
    tensor = quantized(4, 64, "affine", scale_dtype)
    config = settings_for(MlxFormat, Precision(4, 64, "affine"))
    with written(tmp_path / "model", MlxFormat.pack(LAYER, tensor), config) as checkpoint:
        assert_same(read_layer(checkpoint), tensor)


def test_layers_of_one_mlx_checkpoint_differ_in_precision(tmp_path: Path) -> None:
    kinds = {
        f"model.layers.{i}.up": Precision(*kind, "affine")
        for i, kind in enumerate([(4, 64), (3, 32), (8, 64)])
    }
    tensors = {
        name: quantized(kind.bits, kind.group_size, "affine") for name, kind in kinds.items()
    }
    packed: dict[str, Array] = {}
    for name, tensor in tensors.items():
        packed |= MlxFormat.pack(name, tensor)
    config = MlxFormat.config(
        Precision(4, 64, "affine"), {**kinds, "lm_head": None}, "model.layers."
    )
    with written(tmp_path / "model", packed, config) as checkpoint:
        for name, tensor in tensors.items():
            assert_same(read_layer(checkpoint, name), tensor)


def test_float_checkpoints_have_no_format(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.weight": np.ones((4, 4), np.float32)}
    with written(tmp_path / "model", tensors, {}) as checkpoint:
        assert detect_format(checkpoint) is None


# the layout, spelled out


def test_mlx_words_are_rows_of_codes() -> None:
    tensor = quantized(3, 32, "affine")
    packed = MlxFormat.pack(LAYER, tensor)
    assert sorted(packed) == [f"{LAYER}.biases", f"{LAYER}.scales", f"{LAYER}.weight"]
    np.testing.assert_array_equal(packed[f"{LAYER}.weight"], reference.pack(tensor.codes, 3))


@pytest.mark.parametrize(("grid", "subtracted"), [("symmetric", 1), ("zero_point", 0)])
@pytest.mark.parametrize("bits", GptqFormat.bits)
def test_gptq_words_are_columns_of_codes_and_rows_of_zeros(
    bits: int, grid: Grid, subtracted: int
) -> None:
    tensor = quantized(bits, 64, grid)
    assert tensor.zeros is not None
    packed = GptqFormat.pack(LAYER, tensor)
    assert {array.dtype.name for array in packed.values()} == {"int32", "float16"}
    words = reference.pack(np.ascontiguousarray(tensor.codes.T).T, bits)
    np.testing.assert_array_equal(packed[f"{LAYER}.qweight"], words.T.view(np.int32))
    zeros = np.ascontiguousarray(tensor.zeros.T) - np.uint8(subtracted)
    np.testing.assert_array_equal(
        packed[f"{LAYER}.qzeros"], reference.pack(zeros, bits).view(np.int32)
    )
    np.testing.assert_array_equal(packed[f"{LAYER}.scales"], tensor.scales.T)
    np.testing.assert_array_equal(packed[f"{LAYER}.g_idx"], np.arange(CHANNELS) // 64)
    version = settings_for(GptqFormat, Precision(bits, 64, grid))["quantization_config"]
    assert version["checkpoint_format"] == ("gptq" if subtracted else "gptq_v2")


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(
    ("settings", "subtracted"),
    [
        ({"checkpoint_format": "gptq"}, 1),
        ({"checkpoint_format": "gptq_v2"}, 0),
        ({"format": "gptq_v2"}, 0),
        ({}, 1),
    ],
)
def test_gptq_files_of_others(
    tmp_path: Path, settings: dict[str, str], subtracted: int, with_index: bool
) -> None:
    """Written here by the layout's description; with `with_index`, solved in activation order."""
    bits, groups, channels, out = 4, 3, 96, 64
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (out, channels), np.uint8)
    zeros = rng.integers(1, 16, (groups, out), np.uint8)
    scales = rng.uniform(0.5, 1, (groups, out)).astype(np.float16)
    index = np.arange(channels, dtype=np.int32) // 32
    tensors: dict[str, Array] = {
        f"{LAYER}.qweight": np.ascontiguousarray(reference.pack(codes, bits).T).view(np.int32),
        f"{LAYER}.qzeros": reference.pack(zeros - np.uint8(subtracted), bits).view(np.int32),
        f"{LAYER}.scales": scales,
    }
    if with_index:
        index = rng.permutation(index)
        tensors[f"{LAYER}.g_idx"] = index
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, **settings}}
    with written(tmp_path / "model", tensors, config) as checkpoint:
        tensor = read_layer(checkpoint)
    assert tensor is not None
    assert tensor.grid == "zero_point"
    assert (tensor.group_index is not None) == with_index
    steps = codes.astype(np.float32) - zeros.T[:, index]
    np.testing.assert_array_equal(
        tensor.dequantize(), scales.T[:, index].astype(np.float32) * steps
    )
    if with_index:
        np.testing.assert_array_equal(GptqFormat.pack(LAYER, tensor)[f"{LAYER}.g_idx"], index)


# damage

MLX = MlxFormat.pack(LAYER, quantized(4, 64, "affine"))
GPTQ = GptqFormat.pack(LAYER, quantized(4, 64, "symmetric"))
FRACTION = np.zeros((OUT, CHANNELS // 64), np.float32)


@pytest.mark.parametrize(
    ("kind", "part", "replacement"),
    [
        (MlxFormat, "weight", MLX[f"{LAYER}.weight"].view(np.int32)),
        (MlxFormat, "weight", MLX[f"{LAYER}.weight"][:, :-1]),
        (MlxFormat, "weight", MLX[f"{LAYER}.weight"][:-1]),
        (MlxFormat, "weight", MLX[f"{LAYER}.weight"].reshape(-1)),
        (MlxFormat, "scales", np.zeros((OUT, CHANNELS // 64), np.int32)),
        (MlxFormat, "scales", FRACTION[:, :-1]),
        (MlxFormat, "scales", FRACTION[:0]),
        (MlxFormat, "biases", FRACTION[:, :1]),
        (MlxFormat, "biases", None),
        (MlxFormat, "weight", None),
        (GptqFormat, "qweight", GPTQ[f"{LAYER}.qweight"].view(np.uint32)),
        (GptqFormat, "qweight", GPTQ[f"{LAYER}.qweight"][:-1]),
        (GptqFormat, "qweight", GPTQ[f"{LAYER}.qweight"][:, :-1]),
        (GptqFormat, "qweight", GPTQ[f"{LAYER}.qweight"][:0]),
        (GptqFormat, "qzeros", GPTQ[f"{LAYER}.qzeros"][:, :-1]),
        (GptqFormat, "qzeros", GPTQ[f"{LAYER}.qzeros"][:-1]),
        (GptqFormat, "qzeros", GPTQ[f"{LAYER}.qzeros"].astype(np.float32)),
        (GptqFormat, "qzeros", None),
        (GptqFormat, "scales", GPTQ[f"{LAYER}.scales"][:-1]),
        (GptqFormat, "scales", GPTQ[f"{LAYER}.scales"].astype(np.int32)),
        (GptqFormat, "scales", None),
        (GptqFormat, "g_idx", GPTQ[f"{LAYER}.g_idx"][:-1]),
        (GptqFormat, "g_idx", GPTQ[f"{LAYER}.g_idx"] + np.int32(1)),
        (GptqFormat, "g_idx", GPTQ[f"{LAYER}.g_idx"] - np.int32(1)),
        (GptqFormat, "g_idx", GPTQ[f"{LAYER}.g_idx"].astype(np.int64)),
    ],
)
def test_damaged_tensors_are_named(
    tmp_path: Path, kind: type[Format], part: str, replacement: Array | None
) -> None:
    tensors = dict(MLX if kind is MlxFormat else GPTQ)
    if replacement is None:
        del tensors[f"{LAYER}.{part}"]
    else:
        tensors[f"{LAYER}.{part}"] = replacement
    precision = Precision(4, 64, kind.grids[0])
    with (
        written(tmp_path / "model", tensors, settings_for(kind, precision)) as checkpoint,
        pytest.raises(CheckpointError, match=LAYER),
    ):
        read_layer(checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 7},
        {"bits": "4"},
        {"bits": True},
        {"bits": 3},
        {"group_size": 0},
        {"group_size": 100},
        {"bits": 1 << 40},
        {"group_size": 1 << 40},
        {"bits": None, "group_size": None},
    ],
)
def test_mlx_settings_that_do_not_fit_the_tensors(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = {"quantization": {"bits": 4, "group_size": 64, **settings}}
    with (
        written(tmp_path / "model", MLX, config) as checkpoint,
        pytest.raises(CheckpointError, match=LAYER),
    ):
        read_layer(checkpoint)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"quantization_config": {"quant_method": "awq", "version": "gemv"}},
        {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "bitblas"}},
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {}},
            }
        },
        {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
        {"quantization": "nf4"},
    ],
)
def test_other_quantizations_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with (
        written(tmp_path / "model", MLX, config) as checkpoint,
        pytest.raises((UnsupportedModelError, CheckpointError), match=r"config\.json"),
    ):
        detect_format(checkpoint)


# what a format cannot hold


@pytest.mark.parametrize(
    ("kind", "shape", "precision", "message"),
    [
        (MlxFormat, (8, 64), Precision(7, 64, "affine"), "bits"),
        (MlxFormat, (8, 64), Precision(4, 64, "symmetric"), "symmetric"),
        (MlxFormat, (8, 64), Precision(4, 16, "affine"), "groups of .*not 16"),
        (MlxFormat, (8, 96), Precision(4, 64, "affine"), "group size 64 .*96"),
        (MlxFormat, (8, 256), Precision(4, None, "affine"), "not 256"),
        (GptqFormat, (32, 64), Precision(5, 64, "symmetric"), "bits"),
        (GptqFormat, (32, 64), Precision(4, 64, "affine"), "affine"),
        (GptqFormat, (33, 64), Precision(4, 64, "symmetric"), "multiples of 32"),
        (GptqFormat, (32, 48), Precision(4, None, "symmetric"), "multiples of 32"),
        (CompressedTensorsFormat, (8, 64), Precision(3, 64, "symmetric"), "4 or 8 bits"),
        (CompressedTensorsFormat, (9, 64), Precision(4, 64, "symmetric"), "multiples of 8"),
    ],
)
def test_precisions_that_a_format_has_not(
    kind: type[Format], shape: tuple[int, int], precision: Precision, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{LAYER}: .*{message}"):
        kind.check(LAYER, shape, precision)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [(MlxFormat, "zero_point"), (GptqFormat, "affine"), (CompressedTensorsFormat, "affine")],
)
def test_grids_that_a_format_has_not(kind: type[Format], grid: Grid) -> None:
    with pytest.raises(ValueError, match=LAYER):
        kind.pack(LAYER, quantized(4, 64, grid))


def test_scale_dtypes() -> None:
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert MlxFormat.scale_dtype(bfloat16) == bfloat16
    assert GptqFormat.scale_dtype(bfloat16) == np.float16
    with pytest.raises(ValueError, match="scale_dtype: .*gptq.*float32"):
        GptqFormat.chosen_scale_dtype(bfloat16, np.dtype(np.float32))


def test_awq_words_hold_output_channels_in_their_order() -> None:
    """AutoAWQ's GEMM layout, spelled out: nibble i of a word is output channel 0, 2, 4, 6, 1, 3, 5, 7."""
    tensor = quantized(4, 64, "zero_point")
    packed = AwqFormat.pack(LAYER, tensor)
    words = packed[f"{LAYER}.qweight"].view(np.uint32)
    assert words.shape == (CHANNELS, OUT // 8)
    zeros = packed[f"{LAYER}.qzeros"].view(np.uint32)
    assert tensor.zeros is not None
    for nibble, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        np.testing.assert_array_equal(
            (words >> np.uint32(4 * nibble)) & 15, tensor.codes.T[:, channel::8]
        )
        np.testing.assert_array_equal(
            (zeros >> np.uint32(4 * nibble)) & 15, tensor.zeros.T[:, channel::8]
        )
    np.testing.assert_array_equal(packed[f"{LAYER}.scales"], tensor.scales.T)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_awq_tensors_that_contradict_each_other_are_refused(tmp_path: Path, part: str) -> None:
    tensors = AwqFormat.pack(LAYER, quantized(4, 64, "zero_point"))
    tensors[f"{LAYER}.{part}"] = np.ascontiguousarray(tensors[f"{LAYER}.{part}"][:, :-1])
    config = settings_for(AwqFormat, Precision(4, 64, "zero_point"))
    with (
        written(tmp_path / "out", tensors, config) as checkpoint,
        pytest.raises(CheckpointError, match="contradict"),
    ):
        read_layer(checkpoint)


@pytest.mark.parametrize("bits", CompressedTensorsFormat.bits)
def test_compressed_tensors_words_are_signed_codes_plus_half_their_range(bits: int) -> None:
    tensor = quantized(bits, 64, "zero_point")
    packed = CompressedTensorsFormat.pack(LAYER, tensor)
    assert tensor.zeros is not None
    words = {"weight_packed": tensor.codes, "weight_zero_point": tensor.zeros}
    half, each = 1 << (bits - 1), 32 // bits
    for name, values in words.items():
        found = packed[f"{LAYER}.{name}"].view(np.uint32)
        wide = values.astype(np.int64) - half
        if name == "weight_zero_point":  # packed along the output channels
            found, wide = found.T, wide.T
        for position in range(each):
            signed = ((found >> np.uint32(bits * position)) & (2 * half - 1)).astype(int) - half
            np.testing.assert_array_equal(signed, wide[:, position::each])
    assert packed[f"{LAYER}.weight_shape"].tolist() == [OUT, CHANNELS]
    assert f"{LAYER}.weight_zero_point" not in CompressedTensorsFormat.pack(
        LAYER, quantized(bits, 64, "symmetric")
    )


def test_compressed_tensors_of_others_may_be_grouped_in_another_order(tmp_path: Path) -> None:
    tensor = quantized(4, 64, "zero_point")
    index = np.random.default_rng(0).permutation(CHANNELS).astype(np.int32) // 64
    packed = CompressedTensorsFormat.pack(LAYER, tensor) | {f"{LAYER}.weight_g_idx": index}
    config = settings_for(CompressedTensorsFormat, Precision(4, 64, "zero_point"))
    with written(tmp_path / "out", packed, config) as checkpoint:
        assert_same(read_layer(checkpoint), replace(tensor, group_index=index))
    packed[f"{LAYER}.weight_g_idx"] = index + 1
    with (
        written(tmp_path / "out", packed, config) as checkpoint,
        pytest.raises(CheckpointError, match="weight_g_idx does not name one of 6 groups"),
    ):
        read_layer(checkpoint)


@pytest.mark.parametrize(
    "part", ["weight_packed", "weight_zero_point", "weight_scale", "weight_shape"]
)
def test_compressed_tensors_that_contradict_each_other_are_refused(
    tmp_path: Path, part: str
) -> None:
    tensors = CompressedTensorsFormat.pack(LAYER, quantized(4, 64, "zero_point"))
    name = f"{LAYER}.{part}"
    tensors[name] = tensors[name][:-1] if part == "weight_shape" else tensors[name][:, :-1].copy()
    config = settings_for(CompressedTensorsFormat, Precision(4, 64, "zero_point"))
    with (
        written(tmp_path / "out", tensors, config) as checkpoint,
        pytest.raises(CheckpointError, match="contradict"),
    ):
        read_layer(checkpoint)


def test_compressed_tensors_config_names_what_differs() -> None:
    default = Precision(4, 64, "symmetric")
    layers = {"a.0.q": default, "a.0.down": Precision(8, None, "symmetric"), "a.0.gate": None}
    config = CompressedTensorsFormat.config(default, layers, "a.")["quantization_config"]
    assert config["ignore"] == ["a.0.gate", "lm_head"]
    groups = config["config_groups"].values()
    assert [group["targets"] for group in groups] == [["a.0.q"], ["a.0.down"]]
    layers["a.0.down"] = default
    config = CompressedTensorsFormat.config(default, layers, "a.")["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert [group["weights"]["strategy"] for group in groups] == ["group", "channel"]


def test_symmetric_tensors_are_affine_ones_too() -> None:
    tensor = quantized(4, 64, "symmetric")
    affine = tensor.as_affine()
    np.testing.assert_array_equal(affine.dequantize(), tensor.dequantize())
    with pytest.raises(ValueError, match="grid"):
        affine.as_affine()


def test_mlx_spells_rope_and_experts_as_transformers_4_did() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
    spelled = MlxFormat.spell({"rope_parameters": yarn, "num_local_experts": 8})
    assert spelled["rope_theta"] == 5e5
    assert spelled["rope_scaling"] == {**yarn, "type": "yarn"}
    assert spelled["num_experts"] == spelled["num_local_experts"] == 8
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = MlxFormat.spell({"text_config": {"rope_parameters": nested}})["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in text
    old = {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}}
    assert MlxFormat.spell(old) == old
