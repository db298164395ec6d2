"""Floats of 4 and 8 bits: their bytes in each container, and rounding as real packages do it."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import bitwright
from bitwright import QuantizedTensor
from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.opening import open_checkpoint
from bitwright.checkpoint.shard import places_in
from bitwright.errors import CheckpointError
from bitwright.formats.compressed_tensors import CompressedTensorsFormat
from bitwright.formats.gguf import GgufFormat
from bitwright.formats.mlx import MlxFormat
from bitwright.grids.tables import TABLES
from bitwright.precision.options import PrecisionOptions

Array = NDArray[Any]
DEMO = Path(str(bitwright.demo_folder()))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
CONTAINERS = [
    ("mlx", "mxfp4"),
    ("mlx", "nvfp4"),
    ("mlx", "mxfp8"),
    ("compressed-tensors", "mxfp4"),
    ("compressed-tensors", "nvfp4"),
    ("compressed-tensors", "fp8"),
    ("compressed-tensors", "fp8:tensor"),
    ("gguf", "mxfp4"),
    ("gguf", "nvfp4"),
]
BITS_PER_WEIGHT = {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp8": 8.25, "fp8": 8.25, "fp8:tensor": 8}
by_container = pytest.mark.parametrize(("format", "grid"), CONTAINERS)


def rounded(values: Any, grid: Any) -> QuantizedTensor:
    table = TABLES[grid]
    weight = np.zeros((1, 64), np.float32)
    weight[0, : len(values)] = values
    return bitwright.quantize_rtn(weight, table.bits, table.group_size, grid=grid)


def nibbles(floats: Array) -> Array:
    """The floats of nibbles: a sign and three bits."""
    return np.where(floats & 8, -1, 1) * E2M1[floats & 7]


def test_ties_and_scales_of_mlx() -> None:
    """mlx 0.32.4: ties go to the smaller magnitude, zeros are positive, nothing is clipped."""
    values = [0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -5, -0.1, -0.0]
    words = MlxFormat.pack("x", rounded(values, "mxfp4"))["x.weight"]
    assert words[0, :2].tolist() == [0x54321100, 0x00EA9076]
    assert MlxFormat.pack("x", rounded(values, "nvfp4"))["x.weight"][0, :2].tolist() == [
        0x54321100,
        0x00EA9076,
    ]
    for largest, byte in ((6.0, 127), (6.5, 128), (7.9, 128), (0.0, 127)):
        assert rounded([largest], "mxfp4").scales.view(np.uint8)[0, 0] == byte
    for largest, byte in ((1.0, 35), (1e-30, 0), (0.0, 0), (6.0, 56)):
        assert rounded([largest], "nvfp4").scales.view(np.uint8)[0, 0] == byte
    assert rounded([1.0], "nvfp4").dequantize()[0, 0] == np.float32(1.03125)
    assert rounded([6.5, 6.0], "mxfp4").dequantize()[0, :2].tolist() == [6.0, 6.0]
    assert rounded([7.9], "mxfp4").dequantize()[0, 0] == 8.0


def test_mxfp8_of_mlx() -> None:
    """mlx 0.32.4: the least power of two that clips nothing; ties of E4M3 go to even. It
    keeps the sign of -0.0, and here all zeros are positive."""
    for largest, byte in ((448, 127), (449, 128), (440, 127), (1, 119), (1e-30, 19), (0, 127)):
        assert rounded([largest], "mxfp8").scales.view(np.uint8)[0, 0] == byte
    values = [448, 440, 1, 0.99, 17, 19, -17, -19, 2**-10, 3 * 2**-10, -(2**-10), 1e-9, -1e-9]
    words = MlxFormat.pack("x", rounded(values, "mxfp8"))["x.weight"]
    floats = words.view(np.uint8)[0, : len(values)]
    own = np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert floats.tolist() == own.tolist()
    assert rounded([448, -0.0], "mxfp8").dequantize()[0, 1] == 0
    assert floats.tolist()[:4] == [126, 126, 56, 56]


@pytest.mark.parametrize("grid_search", [False, True])
def test_searched_powers_of_two_do_not_clip_floats_of_8_bits(grid_search: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 256), np.float32)
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((1024, 256), np.float32)
    gram = bitwright.gram(inputs @ rng.standard_normal((256, 256), np.float32))

    def error(tensor: QuantizedTensor) -> float:
        change = tensor.dequantize() - weight
        return float(((change @ gram) * change).sum())

    def square(tensor: QuantizedTensor) -> float:
        return float(np.square(tensor.dequantize() - weight).sum())

    plain = bitwright.quantize_rtn(weight, 8, 32, grid="mxfp8")
    other = bitwright.quantize_rtn(weight, 8, 32, grid="mxfp8", grid_search=grid_search)
    assert square(other) <= square(plain)
    better = bitwright.quantize_gptq(weight, gram, 8, 32, grid="mxfp8", grid_search=grid_search)
    assert error(better) < 0.7 * error(plain)


def test_no_weight_becomes_the_code_of_nan() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    gram = bitwright.gram(np.random.default_rng(1).standard_normal((256, 64), np.float32))
    plain = bitwright.quantize_rtn(weight, 8, 32, grid="mxfp8", grid_search=True)
    better = bitwright.quantize_gptq(weight, gram, 8, 32, grid="mxfp8")
    for tensor in (plain, better, bitwright.refine(better, weight, gram)[0]):
        assert np.abs(tensor.dequantize() - weight).max() < 0.3  # none was clipped
        assert 0 < tensor.codes.min() < tensor.codes.max() < 255


def test_ties_and_scales_of_compressed_tensors() -> None:
    """compressed-tensors 0.20.0: ties go to even, zeros keep their sign, 448 · 6 over the largest."""
    assert rounded([2], "nvfp4_divided").divisor == 1344
    tensor = rounded([6, 0.25, 0.75, 1.75, 5, -0.0, -0.2], "nvfp4_divided")
    packed = CompressedTensorsFormat.pack("x", tensor)
    assert packed["x.weight_global_scale"].tolist() == [448]
    assert packed["x.weight_scale"].dtype == ml_dtypes.float8_e4m3fn
    assert packed["x.weight_scale"][0, 0] == 448
    first = packed["x.weight_packed"][0, :4]
    floats = np.stack([first & 15, first >> 4], axis=-1).ravel()
    assert nibbles(floats)[:5].tolist() == [6, 0, 1, 2, 4]
    assert np.signbit(tensor.dequantize()[0, 6])


FP8: list[tuple[Any, int | None, tuple[int, ...]]] = [
    ("fp8", None, (300, 1)),
    ("fp8_tensor", None, (1,)),
    ("fp8_block", 128, (3, 2)),
]
by_fp8 = pytest.mark.parametrize(("grid", "group_size", "scales"), FP8)


def fp8_weight() -> Array:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 256)) * np.exp2(rng.integers(-8, 4, (300, 1)))
    weight[:128, :128] = 0  # a block of zeros
    weight[5] = 0
    return weight.astype(np.float32)


@by_fp8
def test_fp8_of_compressed_tensors(
    grid: Any, group_size: int | None, scales: tuple[int, ...]
) -> None:
    """compressed-tensors 0.19.0: 1/448 of the largest magnitude, of zeros the distance from 1 to the next
    number; E4M3 as torch 2.13.0 rounds, ties to even."""
    weight = fp8_weight()
    tensor = bitwright.quantize_rtn(weight, 8, group_size, grid=grid)
    packed = CompressedTensorsFormat.pack("x", tensor)
    stored = packed["x.weight_scale"]
    assert stored.shape == scales
    blocks = {
        "fp8": np.abs(weight).max(axis=1, keepdims=True),
        "fp8_tensor": np.abs(weight).max()[None],
        "fp8_block": np.array(
            [
                [np.abs(weight[i : i + 128, j : j + 128]).max() for j in (0, 128)]
                for i in (0, 128, 256)
            ]
        ),
    }
    wanted = blocks[grid] / np.float32(448)
    wanted = np.where(wanted == 0, np.float32(2.0**-23), wanted)
    np.testing.assert_array_equal(stored, wanted)
    wide = stored.reshape(stored.shape if stored.ndim == 2 else (1, 1))
    rows = 128 if grid == "fp8_block" else 300 // len(wide)
    wide = np.repeat(np.repeat(wide, rows, axis=0)[:300], 256 // wide.shape[1], axis=1)
    own = (weight / wide).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(packed["x.weight"].astype(np.float32), own.astype(np.float32))
    np.testing.assert_array_equal(tensor.dequantize(), own.astype(np.float32) * wide)


@by_fp8
def test_methods_keep_the_scales_that_rows_share(
    grid: Any, group_size: int | None, scales: tuple[int, ...]
) -> None:
    weight, rng = fp8_weight(), np.random.default_rng(1)
    inputs = rng.standard_normal((512, 256), np.float32) @ rng.random((256, 256), np.float32)
    gram = bitwright.gram(inputs)
    plain = bitwright.quantize_rtn(weight, 8, group_size, grid=grid)
    searched = bitwright.quantize_rtn(weight, 8, group_size, grid=grid, grid_search=True)
    better = bitwright.quantize_gptq(weight, gram, 8, group_size, grid=grid)
    best, _ = bitwright.refine(better, weight, gram)

    def error(tensor: QuantizedTensor) -> float:
        change = tensor.dequantize() - weight
        return float(np.sum((change @ gram) * change))

    assert np.square(searched.dequantize() - weight).sum() <= np.square(
        plain.dequantize() - weight
    ).sum() * (1 + 1e-6)
    assert error(best) < error(better) < 0.6 * error(plain)
    for tensor in (plain, searched, better, best):
        found = CompressedTensorsFormat.pack("x", tensor)
        assert found["x.weight_scale"].shape == scales
        rows = {"fp8": 1, "fp8_tensor": 300, "fp8_block": 128}[grid]
        shared = np.repeat(tensor.scales[::rows], rows, axis=0)[:300]
        np.testing.assert_array_equal(tensor.scales, shared)
        assert np.isfinite(found["x.weight"].astype(np.float32)).all()


def test_what_is_quantized_to_fp8_is_a_source(tmp_path: Path) -> None:
    """As often nothing else is published."""
    common: dict[str, Any] = {"progress": False}
    bitwright.quantize(
        DEMO, tmp_path / "q", "rtn", format="compressed-tensors", grid="fp8", **common
    )
    bitwright.quantize(tmp_path / "q", tmp_path / "again", "rtn", 4, 32, **common)
    assert bitwright.load_model(tmp_path / "again").quantized_layers()


@pytest.mark.parametrize(
    ("format", "grid", "message"),
    [
        ("mlx", "fp8", "the mlx format stores affine, mxfp4, nvfp4 or mxfp8 grids, not fp8"),
        ("mlx", "fp8:128x128", "not fp8:128x128"),
        ("gguf", "mxfp8", "the gguf format stores no 8 bits with mxfp8 grids, but .* mxfp4"),
        ("gguf", "fp8:tensor", "with fp8:tensor grids"),
        ("awq", "mxfp4", "the awq format stores zero_point or symmetric grids, not mxfp4"),
        (
            "compressed-tensors",
            "mxfp8",
            "stores symmetric, zero_point, mxfp4, nvfp4, fp8, fp8:tensor",
        ),
        ("compressed-tensors", "fp8:128x128", "groups of 128 do not divide the 64 input channels"),
        ("compressed-tensors", "fp8:row", "fp8 has a scale for each channel or tensor or 128x128"),
        ("compressed-tensors", "fp8:64", "not '64'"),
    ],
)
def test_grids_of_other_containers(format: Any, grid: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        bitwright.quantize(DEMO, tmp_path / "q", "rtn", format=format, grid=grid, progress=False)
    assert "--group-size" not in str(error.value)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("format", "text", "wanted"),
    [
        ("mlx", "mxfp8", ("mxfp8", 8, 32)),
        ("mlx", "MXFP4", ("mxfp4", 4, 32)),
        ("compressed-tensors", "fp8:tensor", ("fp8_tensor", 8, -1)),
        ("gguf", "nvfp4", ("nvfp4", 4, 16)),
        ("mlx", "4:32", (None, 4, 32)),
    ],
)
def test_a_type_is_what_a_grid_is(format: Any, text: str, wanted: tuple[Any, ...]) -> None:
    by_type = PrecisionOptions(format=format, type=text)
    assert by_type == PrecisionOptions(format=format, grid=text)  # type: ignore[arg-type]
    assert (by_type.grid, by_type.bits, by_type.group_size) == wanted
    assert PrecisionOptions(format="gguf", type="q4_k_m").type == "q4_k_m"  # a mixture


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"type": "mxfp8", "grid": "mxfp4"},
            "grid: mxfp4 contradicts type mxfp8, which says bits 8",
        ),
        ({"type": "mxfp8", "group_size": 64}, "group_size: 64 contradicts grid mxfp8"),
        ({"type": "fp8", "bits": 6}, "bits: 6 contradicts grid fp8, which says bits 8"),
        ({"type": "mxfp5"}, "there is no 'MXFP5'"),
    ],
)
def test_types_that_contradict(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        bitwright.quantize(DEMO, tmp_path / "q", "rtn", format="gguf", progress=False, **said)


def stored_weights(folder: Path, layer: str, format: str, grid: str) -> Array:
    """The weights of a layer by plain NumPy, from the bytes of the file."""
    if format == "gguf":
        quants = pytest.importorskip("gguf.quants")
        gguf = pytest.importorskip("gguf")
        (found,) = (
            each
            for each in gguf.GGUFReader(folder / "model.gguf").tensors
            if each.name == "blk.0.ffn_up.weight"
        )
        weights: Array = quants.dequantize(found.data, found.tensor_type)
        return weights
    checkpoint = Checkpoint(folder)
    if format == "mlx":
        packed = checkpoint.read(f"{layer}.weight").view(np.uint8)
        scales = checkpoint.read(f"{layer}.scales")
        if grid == "mxfp8":
            wide = np.repeat(np.exp2(scales.astype(np.float32) - 127), 32, axis=1)
            return packed.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * wide
    elif grid.startswith("fp8"):
        floats = checkpoint.read(f"{layer}.weight").astype(np.float32)
        return floats * checkpoint.read(f"{layer}.weight_scale").astype(np.float32)
    else:
        packed = checkpoint.read(f"{layer}.weight_packed")
        scales = checkpoint.read(f"{layer}.weight_scale")
    floats = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    if grid == "mxfp4":
        wide = np.exp2(scales.astype(np.float32) - 127)
    else:
        wide = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        if format != "mlx":
            wide = wide / checkpoint.read(f"{layer}.weight_global_scale")
    return (np.repeat(wide, floats.shape[1] // wide.shape[1], axis=1) * nibbles(floats)).astype(
        np.float32
    )


@by_container
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_models(format: Any, grid: Any, method: Any, tmp_path: Path) -> None:
    """What is in the file is what is evaluated, and comes back when it is converted to itself."""
    ids = np.random.default_rng(0).integers(0, 512, (8, 64))
    run: dict[str, Any] = {} if method == "rtn" else {"calibration": ids}
    bitwright.quantize(
        DEMO, tmp_path / "q", method, format=format, grid=grid, progress=False, **run
    )
    layer = "model.layers.0.mlp.up_proj"
    tensor = bitwright.load_model(tmp_path / "q").quantized(layer)
    assert tensor is not None
    wanted = stored_weights(tmp_path / "q", layer, format, grid)
    np.testing.assert_array_equal(tensor.dequantize(), wanted)
    card = (tmp_path / "q" / "README.md").read_text()
    assert f"| grid | {grid} |" in card
    groups = {"nvfp4": "4 bits in groups of 16", "mxfp4": "4 bits in groups of 32"}
    assert groups.get(grid, "| 8 bits in ") in card
    assert tensor.nbytes == pytest.approx(wanted.size * BITS_PER_WEIGHT[grid] / 8)
    if method != "rtn":
        return
    bitwright.convert(tmp_path / "q", tmp_path / "again", format, progress=False)
    one, two = (open_checkpoint(tmp_path / name) for name in ("q", "again"))
    assert list(one.names()) == list(two.names())
    for name in one.names():
        assert one.read(name).tobytes() == two.read(name).tobytes()


@pytest.mark.parametrize(
    ("format", "grid", "part", "value", "message"),
    [
        ("compressed-tensors", "fp8", "weight", 0x7F, "weight of row 0, channel 0 is NaN"),
        (
            "compressed-tensors",
            "fp8:tensor",
            "weight_scale",
            0xFF,
            "scale of row 0, group 0 is nan",
        ),
        ("mlx", "mxfp4", "scales", 255, "scale of row 0, group 0 is nan"),
        ("mlx", "nvfp4", "scales", 0x7F, "scale of row 0, group 0 is nan"),
        ("mlx", "nvfp4", "scales", 0xB8, "scale of row 0, group 0 is -1.0"),
        ("mlx", "mxfp8", "scales", 255, "scale of row 0, group 0 is nan"),
        ("mlx", "mxfp8", "weight", 0xFF, "weight of row 0, channel 0 is NaN"),
        ("compressed-tensors", "mxfp4", "weight_scale", 255, "scale of row 0, group 0 is nan"),
        ("compressed-tensors", "nvfp4", "weight_global_scale", 0, "weight_global_scale is"),
        ("compressed-tensors", "nvfp4", "weight_global_scale", np.inf, "weight_global_scale is"),
        ("compressed-tensors", "nvfp4", "weight_global_scale", np.nan, "weight_global_scale is"),
    ],
)
def test_damaged_scales(
    format: Any, grid: Any, part: str, value: Any, message: str, tmp_path: Path
) -> None:
    bitwright.quantize(DEMO, tmp_path / "q", "rtn", format=format, grid=grid, progress=False)
    file = tmp_path / "q" / "model.safetensors"
    start, _ = places_in(file)[f"model.layers.0.mlp.up_proj.{part}"]
    content = bytearray(file.read_bytes())
    dtype = np.float32 if part == "weight_global_scale" else np.uint8
    if value == 0xFF and grid == "fp8:tensor":
        value, dtype = 0x7FC0, np.uint16  # in bfloat16
    changed = np.array([value], dtype).tobytes()
    content[start : start + len(changed)] = changed
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        bitwright.load_model(tmp_path / "q").quantized("model.layers.0.mlp.up_proj")
    assert "model.safetensors" in str(error.value)
    assert "up_proj" in str(error.value)


def test_damaged_scales_of_gguf() -> None:
    tensor = rounded([1.0], "mxfp4")
    blocks = GgufFormat.pack("layer", tensor)["layer.weight"]
    blocks["e"][0, 1] = 255

    class OneTensor:
        def __contains__(self, name: str) -> bool:
            return True

        def dtype(self, name: str) -> Any:
            return blocks.dtype

        def read(self, name: str) -> Array:
            return blocks

        def file(self, name: str) -> str:
            return "model.gguf"

    checkpoint: Any = OneTensor()
    with pytest.raises(
        CheckpointError, match=r"^model.gguf: tensor layer.weight: the scale of row 0"
    ):
        GgufFormat().read(checkpoint, "layer")
