"""Codes in 32-bit words, against NumPy's own bits and MLX's words."""

from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Array
from shared_data import SHARED, needs_shared

import bitwright
from bitwright.grids.tensor import BITS


def codes_of(rows: int, count: int, bits: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, count), np.uint8)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(0, 40),
    chunks=st.integers(0, 9),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 1000),
)
def test_words_are_a_stream_of_bits_and_give_the_codes_back(
    rows: int, chunks: int, bits: int, seed: int
) -> None:
    codes = codes_of(rows, 32 * chunks, bits, seed)
    words = bitwright.pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (rows, chunks * bits)
    if words.size:
        np.testing.assert_array_equal(words, reference.pack(codes, bits))
    np.testing.assert_array_equal(bitwright.unpack(words, bits), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (2, [3, 0, 1, 2] * 4, [0x93939393]),
        (4, [1, 2, 3, 4, 5, 6, 7, 15], [0xF7654321]),
        (8, [1, 2, 3, 255], [0xFF030201]),
        (3, [7] + [0] * 9 + [7] + [0] * 21, [0xC0000007, 0x00000001, 0]),
        (5, [0] * 6 + [31] + [0] * 25, [0xC0000000, 0x00000007, 0, 0, 0]),
        (6, [0] * 5 + [63] + [0] * 10, [0xC0000000, 0x0000000F, 0]),
    ],
)
def test_codes_lie_where_they_should(bits: int, codes: list[int], words: list[int]) -> None:
    packed = bitwright.pack(np.array([codes], np.uint8), bits)
    assert packed.tolist() == [words]


@needs_shared
@pytest.mark.parametrize("bits", BITS)
def test_words_of_mlx_hold_the_weights_that_mlx_reads(bits: int) -> None:
    with np.load(SHARED / "golden" / "mlx_quantize.npz") as file:
        words, scales, biases, wanted = (
            file[f"f32_b{bits}_g64_{name}"] for name in ("codes", "scales", "biases", "dequantized")
        )
    codes = bitwright.unpack(words, bits)
    weight = reference.dequantize(codes, scales, biases, "affine")
    np.testing.assert_allclose(weight, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("codes", "bits", "kind", "message"),
    [
        (np.full((2, 32), 8, np.uint8), 3, ValueError, "codes: 8 does not fit in 3 bits"),
        (np.zeros((2, 4), np.uint8), 4, ValueError, "codes: .*4 codes of 4 bits"),
        (np.zeros((2, 31), np.uint8), 3, ValueError, "codes: .*31 codes of 3 bits"),
        (np.zeros((2, 32), np.int8), 4, TypeError, "codes: .*uint8.*int8"),
        (np.zeros((2, 32), np.int64), 4, TypeError, "codes: .*int64"),
        (np.zeros(32, np.uint8), 4, ValueError, "codes: .*2 axes"),
        (np.zeros((32, 2), np.uint8).T, 4, ValueError, "codes: .*contiguous"),
        ([[0] * 32], 4, TypeError, "codes: .*list"),
        (np.zeros((2, 32), np.uint8), 7, ValueError, "bits: .*7"),
        (np.zeros((2, 32), np.uint8), 1, ValueError, "bits: .*1"),
    ],
)
def test_wrong_codes_are_named(codes: Any, bits: int, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        bitwright.pack(codes, bits)


@pytest.mark.parametrize(
    ("words", "bits", "kind", "message"),
    [
        (np.zeros((2, 2), np.uint32), 3, ValueError, "words: 2 words .*3 bits"),
        (np.zeros((2, 3), np.int32), 3, TypeError, "words: .*uint32.*int32"),
        (np.zeros((2, 3), ">u4"), 3, ValueError, "words: .*byte order"),
        (np.zeros(3, np.uint32), 3, ValueError, "words: .*2 axes"),
        (np.zeros((3, 2), np.uint32).T, 3, ValueError, "words: .*contiguous"),
        (np.zeros((2, 3), np.uint32), 9, ValueError, "bits: .*9"),
    ],
)
def test_wrong_words_are_named(words: Any, bits: int, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        bitwright.unpack(words, bits)
