"""Products with packed codes against those with decoded weights."""

from dataclasses import replace

import numpy as np
import pytest

import bitwright
from bitwright import _kernels
from bitwright.generation.matrices import PackedMatrix
from bitwright.grids.tensor import BITS, QuantizedTensor


def made(bits: int, group_size: int, channels: int, grid: str, out: int = 37) -> QuantizedTensor:
    weight = np.random.default_rng(bits).standard_normal((out, channels), dtype=np.float32)
    return bitwright.quantize_rtn(weight, bits=bits, group_size=group_size, grid=grid)


def check(tensor: QuantizedTensor) -> None:
    """Compare products of one, a few and many tokens, and decoded rows, with NumPy's."""
    matrix, weight = PackedMatrix(tensor), tensor.dequantize().astype(np.float64)
    out, channels = tensor.shape
    bias = np.linspace(-1, 1, out, dtype=np.float32)
    for tokens in (1, 3, 20):
        states = np.random.default_rng(7).standard_normal((tokens, channels), dtype=np.float32)
        expected = states @ weight.T
        written = np.full((tokens, out), np.nan, np.float32)
        matrix.product(states, None, written)
        sizes = np.abs(states) @ np.abs(weight.T)
        assert (np.abs(written - expected) <= 2e-6 * sizes + 1e-6).all()
        matrix.product(states, bias, written, add=True)
        assert (np.abs(written - 2 * expected - bias) <= 4e-6 * sizes + 1e-6).all()
    ids = np.array([out - 1, 0, 5], np.int32)
    np.testing.assert_allclose(matrix.rows(ids), weight[ids], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", ["affine", "zero_point", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_products_of_even_grids(bits: int, grid: str) -> None:
    for group_size, channels in ((32, 128), (64, 192), (16, 48), (12, 60), (200, 200)):
        check(made(bits, group_size, channels, grid))


@pytest.mark.parametrize("grid", ["iq4_nl", "mxfp4", "nvfp4", "nvfp4_divided", "iq4_xs"])
def test_products_of_tables(grid: str) -> None:
    size = {"nvfp4": 16, "nvfp4_divided": 16}.get(grid, 32)
    check(made(4, size, 512 if grid == "iq4_xs" else 96, grid))


@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 16), (4, 32), (5, 32), (6, 16)])
def test_products_of_superblocks(bits: int, size: int) -> None:
    tensor = made(bits, size, 512, "k")
    assert tensor.superblocks is not None
    check(tensor)


def test_products_of_groups_that_are_not_consecutive() -> None:
    tensor = made(4, 32, 128, "zero_point")
    index = np.random.default_rng(0).permutation(128).astype(np.int32) // 32
    check(replace(tensor, group_index=index))
    assert not PackedMatrix.packs(replace(tensor, group_index=np.zeros(128, np.int32)))


@pytest.mark.parametrize("bits", BITS)
def test_planes_take_the_bits_of_the_codes(bits: int) -> None:
    codes = (np.arange(130) % (1 << bits)).astype(np.uint8)[None]
    assert _kernels.pack_planes(codes, bits).shape == (1, 3 * 8 * bits)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_of_floats(dtype: str) -> None:
    import ml_dtypes

    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    weight = np.random.default_rng(1).standard_normal((33, 50)).astype(kind)
    for tokens in (1, 20):
        states = np.random.default_rng(2).standard_normal((tokens, 50), dtype=np.float32)
        written = np.empty((tokens, 33), np.float32)
        _kernels.stored_linear(states, weight, None, written, False)
        expected = states @ weight.astype(np.float32).T
        np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit() -> None:
    matrix = PackedMatrix(made(4, 64, 256, "affine", out=300))
    states = np.random.default_rng(3).standard_normal((1, 256), dtype=np.float32)
    found, threads = [], _kernels.num_threads()
    try:
        for count in (1, 2):
            _kernels.set_num_threads(count)
            found.append(np.empty((1, 300), np.float32))
            matrix.product(states, None, found[-1])
    finally:
        _kernels.set_num_threads(threads)
    assert np.array_equal(*found)


def test_refusals_name_the_argument() -> None:
    codes = np.zeros((2, 64), np.uint8)
    planes, scales = _kernels.pack_planes(codes, 4), np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"^planes: they do not hold 65 codes"):
        _kernels.PackedMatrix(planes, 65, 4, scales)
    with pytest.raises(ValueError, match=r"^scales: "):
        _kernels.PackedMatrix(planes, 64, 4, np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match=r"^scales: expected dtype"):
        _kernels.PackedMatrix(planes, 64, 4, np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"^bits: "):
        _kernels.pack_planes(codes, 7)
