"""The gram of a layer's inputs, against NumPy in float64."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import Array

import bitwright
from bitwright import LayerStatistics, _kernels

pytestmark = pytest.mark.usefixtures("all_processors")


def inputs(tokens: int, channels: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((tokens, channels), dtype=np.float32)


def expected(activations: Array) -> Array:
    wide = activations.astype(np.float64)
    return wide.T @ wide / len(wide)


def assert_close(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 150),
    channels=st.integers(1, 150),
    seed=st.integers(0, 99),
    magnitude=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_gram_is_the_second_moment(tokens: int, channels: int, seed: int, magnitude: float) -> None:
    activations = inputs(tokens, channels, seed) * np.float32(magnitude)
    gram = bitwright.gram(activations)
    assert gram.dtype == np.float32
    assert_close(gram, expected(activations))
    np.testing.assert_array_equal(gram, gram.T)


def test_out_receives_the_result_in_its_own_memory() -> None:
    activations = inputs(33, 70)
    stack = np.full((3, 70, 70), 7, np.float32)
    view = stack[1]
    result = bitwright.gram(activations, out=view)
    assert np.shares_memory(result, stack)
    assert_close(stack[1], expected(activations))
    assert (stack[[0, 2]] == 7).all()


def test_activations_are_left_alone() -> None:
    activations = inputs(5, 6)
    before = activations.copy()
    activations.flags.writeable = False
    bitwright.gram(activations)
    np.testing.assert_array_equal(activations, before)


def test_statistics_of_chunks_are_those_of_the_whole() -> None:
    activations = inputs(100, 65)
    statistics = LayerStatistics(65)
    for chunk in np.split(activations, [1, 40, 40]):
        statistics.add(chunk)
    moments = statistics.gather()
    assert moments.tokens == 100
    assert_close(moments.gram, expected(activations))
    np.testing.assert_array_equal(moments.gram, moments.gram.T)
    assert moments.first_gram is None


def test_statistics_of_the_first_part() -> None:
    activations = inputs(100, 65)
    statistics = LayerStatistics(65, magnitudes=True)
    statistics.add(activations[:40])
    statistics.end_first_part()
    statistics.add(activations[40:])
    moments = statistics.gather()
    assert_close(moments.gram, expected(activations))
    assert moments.first_gram is not None
    assert_close(moments.first_gram, expected(activations[:40]))
    np.testing.assert_allclose(moments.mean_abs, np.abs(activations).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_statistics_notice_what_is_not_finite(value: float) -> None:
    statistics = LayerStatistics(8)
    statistics.add(inputs(4, 8))
    assert statistics.gather().is_finite()
    statistics = LayerStatistics(8)
    chunk = inputs(4, 8)
    chunk[2, 5] = value
    statistics.add(chunk)
    statistics.add(inputs(4, 8))
    assert not statistics.gather().is_finite()


def read_only() -> Array:
    array = np.zeros((6, 6), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: np.zeros((4, 6), np.int32), TypeError, "activations: .*float32.*int32"),
        (lambda: np.zeros(6, np.float32), ValueError, "activations: .*2 axes"),
        (lambda: np.zeros((2, 2, 4, 6), np.float32), ValueError, "activations: .*2 axes"),
        (lambda: [[1.0] * 6] * 4, TypeError, "activations: .*list"),
        (lambda: np.zeros((0, 6), np.float32), ValueError, "activations: .*no tokens"),
    ],
)
def test_wrong_activations_are_named(
    make: Callable[[], Array], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        bitwright.gram(make())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: np.zeros((6, 6)), TypeError, "float64"),
        (lambda: np.zeros((6, 12), np.float32)[:, ::2], ValueError, "contiguous"),
        (lambda: np.zeros((6, 6), ">f4"), ValueError, "byte order"),
        (lambda: np.zeros((6, 5), np.float32), ValueError, "axis 1 must be 6"),
        (lambda: np.zeros(36, np.float32), ValueError, "2 axes"),
        (lambda: [[0.0] * 6] * 6, TypeError, "list"),
        (read_only, ValueError, "read-only"),
    ],
)
def test_wrong_out_is_named(make: Callable[[], Array], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^(out|gram): .*{message}"):
        bitwright.gram(inputs(4, 6), out=make())


@settings(deadline=None, max_examples=30)
@given(channels=st.integers(1, 90), rows=st.integers(1, 40), seed=st.integers(0, 100))
def test_systems_with_a_gram_are_solved(channels: int, rows: int, seed: int) -> None:
    matrix = expected(inputs(2 * channels, channels, seed)) + 0.1 * np.eye(channels)
    factor, right = matrix.astype(np.float32), inputs(rows, channels, seed + 1)
    solution = right.copy()
    assert _kernels.cholesky_factor(factor)
    _kernels.cholesky_solve(factor, solution)
    assert_close(solution, right @ np.linalg.inv(matrix))
    assert not _kernels.cholesky_factor(-factor)
    with pytest.raises(ValueError, match="rows: "):
        _kernels.cholesky_solve(factor, inputs(1, channels + 1))
