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

Array = NDArray[Any]
DEMO = Path(str(bitwright.demo_folder()))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
CONTAINERS = [
    ("mlx", "mxfp4"),
    ("mlx", "nvfp4"),
    ("mlx", "mxfp8"),
    ("compressed-tensors", "mxfp4"),
    ("compressed-tensors", "nvfp4"),
    ("gguf", "mxfp4"),
    ("gguf", "nvfp4"),
]
BITS_PER_WEIGHT = {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp8": 8.25}
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


def test_no_weight_becomes_the_code_of_nan() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    gram = bitwright.gram(np.random.default_rng(1).standard_normal((256, 64), np.float32))
    plain = bitwright.quantize_rtn(weight, 8, 32, grid="mxfp8", grid_search=True)
    better = bitwright.quantize_gptq(weight, gram, 8, 32, grid="mxfp8")
    for tensor in (plain, better, bitwright.refine(better, weight, gram)[0]):
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
