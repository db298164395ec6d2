"""Products in bfloat16, bit by bit: the processor's own instruction, the plain kernel, and NumPy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bitwright import _kernels

Float32 = NDArray[np.float32]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(0)
BLOCK = 512  # of the depth that is summed up at a time
SHAPES = [(1, 1, 1), (7, 50, 33), (17, 100, 1031), (9, 16, 512), (130, 97, 40)]
ways = pytest.mark.parametrize(
    "plain",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.skipif(
                not _kernels.multiplies_bfloat16(), reason="this processor has no AVX512-BF16"
            ),
        ),
    ],
    ids=["plain", "processor"],
)


def product(left: Any, right: Any, plain: bool, **how: Any) -> Float32:
    """Return the product of rows of the left with rows of the right."""
    out = np.full((len(left), len(right)), np.nan, np.float32)
    _kernels.bfloat16_product(left, True, right, True, out, False, plain=plain, **how)
    return out


def reference(left: Float32, right: Float32) -> Float32:
    """Return what the product is by its definition, for numbers far from the ends of float32's range."""
    a, b = (
        np.pad(each.astype(BFLOAT16).astype(np.float32), ((0, 0), (0, 1))) for each in (left, right)
    )
    total = np.zeros((len(a), len(b)), np.float32)
    for first in range(0, left.shape[1], BLOCK):
        block = np.zeros_like(total)
        for k in range(first, min(first + BLOCK, left.shape[1]), 2):
            for each in (k + 1, k):
                block += a[:, None, each] * b[None, :, each]
        total = block if first == 0 else total + block
    return total


@ways
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_are_what_their_definition_says(
    rows: int, columns: int, depth: int, dtype: str, plain: bool
) -> None:
    left = RNG.standard_normal((rows, depth), np.float32)
    right = RNG.standard_normal((columns, depth), np.float32).astype(dtype)
    wanted = reference(left, right.astype(np.float32))
    for left_rows in (True, False):
        for right_rows in (True, False):
            a = left if left_rows else np.ascontiguousarray(left.T)
            b = right if right_rows else np.ascontiguousarray(right.T)
            for begin in (0, 1):
                out = np.full((rows, columns), begin, np.float32)
                _kernels.bfloat16_product(a, left_rows, b, right_rows, out, begin != 0, plain=plain)
                if begin and depth <= BLOCK:
                    np.testing.assert_array_equal(out, 1 + wanted)
                elif not begin:
                    np.testing.assert_array_equal(out, wanted)


@ways
@pytest.mark.parametrize("size", [1, 50, 601])
def test_only_the_lower_triangle_is_written(size: int, plain: bool) -> None:
    states = RNG.standard_normal((40, size), np.float32)
    gram = np.full((size, size), 7, np.float32)
    _kernels.bfloat16_product(states, False, states, False, gram, False, True, plain)
    whole = reference(states.T, states.T)
    np.testing.assert_array_equal(np.tril(gram), np.tril(whole))
    assert (gram[np.triu_indices(size, 1)] == 7).all()


@ways
def test_elements_are_rounded_to_nearest_even(plain: bool) -> None:
    step = 2.0**-7  # of bfloat16 at one
    near = [1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, 1 + 0.49 * step, -1 - step / 2, 3.4e38]
    rounded = [1, 1 + 2 * step, 1 + step, 1, -1, np.inf]
    one = np.ones((1, 1), np.float32)
    left = np.array(near, np.float32)[:, None]
    np.testing.assert_array_equal(product(left, one, plain)[:, 0], rounded)
    np.testing.assert_array_equal(product(one, left, plain)[0], rounded)


@ways
def test_what_is_subnormal_counts_as_zero_and_what_is_not_finite_stays_so(plain: bool) -> None:
    least = np.finfo(np.float32).tiny
    left = np.array([[least / 2], [least], [np.inf], [-np.inf], [np.nan]], np.float32)
    right = np.array([[1], [0.5], [2.0**100]], np.float32)
    found = product(left, right, plain)
    np.testing.assert_array_equal(found[0], [0, 0, 0])
    np.testing.assert_array_equal(found[1], [least, 0, least * 2.0**100])
    np.testing.assert_array_equal(found[2], [np.inf] * 3)
    np.testing.assert_array_equal(found[3], [-np.inf] * 3)
    assert np.isnan(found[4]).all()
    assert np.isnan(product(left[2:3], np.zeros((1, 1), np.float32), plain)).all()


@pytest.mark.skipif(not _kernels.multiplies_bfloat16(), reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("exponents", [(100, 150), (40, 80), (0, 255)])
def test_the_processor_rounds_as_the_plain_kernel_does(
    dtype: str, exponents: tuple[int, int]
) -> None:
    """Of any bits: tiny, huge and subnormal numbers, infinities and NaN."""

    def draw(rows: int) -> Float32:
        bits = RNG.integers(0, 1 << 32, (rows, 61), np.uint32) & np.uint32(0x807FFFFF)
        return (bits | RNG.integers(*exponents, (rows, 61), np.uint32) << 23).view(np.float32)

    with np.errstate(all="ignore"):
        left, right = draw(60), draw(100).astype(dtype)
    slow, fast = (product(left, right, plain) for plain in (True, False))
    np.testing.assert_array_equal(np.isnan(slow), np.isnan(fast))
    known = ~np.isnan(slow)
    np.testing.assert_array_equal(slow[known].view(np.uint32), fast[known].view(np.uint32))


@pytest.mark.parametrize(
    ("left", "right", "out", "message"),
    [
        ((3, 4), (5, 6), (3, 5), "right: axis 1 must be 4"),
        ((3, 4), (5, 4), (3, 4), "out: axis 1 must be 5"),
        ((3, 4), (5, 4), (5, 5), "out: axis 0 must be 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(left: Any, right: Any, out: Any, message: str) -> None:
    arrays = (np.zeros(shape, np.float32) for shape in (left, right, out))
    a, b, c = arrays
    with pytest.raises(ValueError, match=message):
        _kernels.bfloat16_product(a, True, b, True, c, False)
