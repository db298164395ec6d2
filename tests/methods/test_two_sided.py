"""Two-sided refinement against its objective in float64."""

from typing import Any

import numpy as np
import pytest
from damped_objective import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import DTYPES

import bitwright
from bitwright import _kernels
from bitwright.grids.tensor import Grid, QuantizedTensor
from bitwright.methods.two_sided import METRIC_DAMPING, normalized_metric

DAMPING = 0.01


def metric_of(out: int, width: int, seed: int) -> NDArray[np.float32]:
    """The metric of outputs whose gradients are correlated and of very different sizes."""
    rng = np.random.default_rng([seed, 1])
    mixing = rng.standard_normal((out, out)) * np.exp(rng.standard_normal(out))
    gradients = (rng.standard_normal((2 * out + 8, out)) @ mixing).astype(np.float32)
    sums = np.zeros((out, min(width, out)), np.float32)
    _kernels.add_output_metric(gradients, np.ones(len(gradients), np.float32), sums)
    found = normalized_metric(sums)
    assert found is not None
    return found


def dense(metric: NDArray[np.float32]) -> NDArray[np.float64]:
    """The diagonal blocks of a metric, each in its place."""
    out, width = metric.shape
    whole = np.zeros((out, out))
    for first in range(0, out, width):
        rows = slice(first, min(first + width, out))
        whole[rows, rows] = metric[rows, : rows.stop - first]
    return whole


def objective(
    weight: Any, tensor: QuantizedTensor, gram: Any, metric: NDArray[np.float32]
) -> float:
    change = weight.astype(np.float64) - tensor.dequantize()
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * gram.diagonal()[gram.diagonal() > 0].mean()
    return float(np.einsum("ab,bj,jk,ak", dense(metric), change, damped, change, optimize=True))


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 70),
    groups=st.integers(1, 5),
    size=st.sampled_from([8, 16, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
    grid=st.sampled_from(["affine", "zero_point", "symmetric"]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    width=st.sampled_from([1, 5, 16, 32, 256]),
    seed=st.integers(0, 100),
)
def test_the_objective_never_rises(
    out: int, groups: int, size: int, bits: int, grid: Grid, dtype: str, width: int, seed: int
) -> None:
    weight, gram = layer(out, groups * size, seed)
    metric = metric_of(out, width, seed)
    start = bitwright.quantize_gptq(
        weight, gram, bits, size, grid=grid, scale_dtype=DTYPES[dtype], damping=DAMPING
    )
    kept = gram.copy()
    found, errors = bitwright.refine_two_sided(start, weight, gram, metric, damping=DAMPING)
    np.testing.assert_array_equal(gram, kept)
    assert (found.grid, found.bits, found.scales.dtype) == (grid, bits, DTYPES[dtype])
    assert found.codes.max() < 2**bits
    assert np.isfinite(found.dequantize()).all()
    assert (np.diff(errors) <= 0).all()
    before = objective(weight, start, gram, metric)
    # What the steps gain is added up in float32 terms, relative to what there was.
    assert errors[0] == pytest.approx(before, rel=1e-3)
    assert errors[-1] == pytest.approx(
        objective(weight, found, gram, metric), rel=2e-3, abs=2e-4 * before
    )


def test_no_code_alone_can_be_better() -> None:
    weight, gram = layer(24, 32, 3)
    metric = metric_of(24, 16, 3)
    start = bitwright.quantize_gptq(weight, gram, 3, 16)
    found, _ = bitwright.refine_two_sided(
        start, weight, gram, metric, sweeps=60, fits=4, damping=DAMPING
    )
    best = objective(weight, found, gram, metric)
    for row, column in np.ndindex(found.codes.shape):
        for step in (-1, 1):
            code = int(found.codes[row, column]) + step
            if 0 <= code < 8:
                moved = found.codes.copy()
                moved[row, column] = code
                other = bitwright.QuantizedTensor(
                    moved, found.scales, found.biases, None, found.bits, found.group_size, "affine"
                )
                assert objective(weight, other, gram, metric) > best * (1 - 1e-4)


@pytest.mark.parametrize("grid", ["affine", "zero_point", "symmetric"])
def test_outputs_that_matter_together_are_rounded_together(grid: Grid) -> None:
    """Refinement of each row by itself does not see what rows have in common."""
    weight, gram = layer(64, 64, 5)
    metric = metric_of(64, 64, 5)
    alone, _ = bitwright.refine(bitwright.quantize_gptq(weight, gram, 3, grid=grid), weight, gram)
    together, _ = bitwright.refine_two_sided(alone, weight, gram, metric)
    gained = objective(weight, together, gram, metric) / objective(weight, alone, gram, metric)
    assert gained < 0.85


def test_integer_zeros_are_chosen_again() -> None:
    """A group whose zero is one off, with the codes that it asks for, is taken back."""
    weight, gram = layer(16, 32, 1)
    metric = metric_of(16, 16, 1)
    start = bitwright.quantize_rtn(weight, 4, 32, grid="zero_point")
    assert start.zeros is not None
    moved = bitwright.QuantizedTensor(
        start.codes,
        start.scales,
        None,
        np.where(start.zeros < 15, start.zeros + 1, start.zeros - 1).astype(start.zeros.dtype),
        4,
        32,
        "zero_point",
    )
    found, errors = bitwright.refine_two_sided(moved, weight, gram, metric)
    assert found.zeros is not None
    assert (found.zeros != moved.zeros).mean() > 0.5
    assert errors[-1] < 0.05 * errors[0]


def test_k_grids_keep_their_superblocks() -> None:
    weight, gram = layer(8, 256, 2)
    start = bitwright.quantize_gptq(weight, gram, 4, 32, grid="k")
    found, errors = bitwright.refine_two_sided(start, weight, gram, metric_of(8, 8, 2))
    assert found.superblocks is start.superblocks
    assert errors[-1] < 0.9 * errors[0]
    assert (found.codes != start.codes).any()


def test_inputs_and_outputs_that_nothing_comes_from() -> None:
    weight, gram = layer(16, 32, 7)
    gram[5] = gram[:, 5] = 0
    metric = metric_of(16, 8, 7)
    metric[3] = 0
    metric[:8, 3] = 0
    start = bitwright.quantize_gptq(weight, gram, 3, 16)
    found, errors = bitwright.refine_two_sided(start, weight, gram, metric)
    assert np.isfinite(found.dequantize()).all()
    assert np.isfinite(errors).all()
    np.testing.assert_array_equal(found.codes[3], start.codes[3])


def test_what_cannot_be_refined() -> None:
    weight, gram = layer(8, 16, 0)
    start = bitwright.quantize_rtn(weight, 3, 16)
    metric = metric_of(8, 8, 0)
    for given_metric, message in (
        (metric[:4], "output_metric: expected 8 rows"),
        (np.full_like(metric, np.nan), "output_metric: .*NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            bitwright.refine_two_sided(start, weight, gram, given_metric)
    with pytest.raises(ValueError, match="weight: expected shape"):
        bitwright.refine_two_sided(start, weight[:4].copy(), gram, metric)
    with pytest.raises(ValueError, match="sweeps: expected 0 or more"):
        bitwright.refine_two_sided(start, weight, gram, metric, sweeps=-1)


def test_metrics_are_normalized() -> None:
    sums = np.array([[2, 1], [1, 6], [4, 0]], np.float32)
    found = normalized_metric(sums.copy())
    wanted = sums / 4
    wanted[[0, 1, 2], [0, 1, 0]] += np.float32(METRIC_DAMPING)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # type: ignore[arg-type]
    assert normalized_metric(np.zeros((3, 2), np.float32)) is None


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 20),
    out=st.integers(1, 40),
    width=st.sampled_from([1, 7, 16, 64]),
    seed=st.integers(0, 99),
)
def test_sums_of_output_metrics(tokens: int, out: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradient = rng.standard_normal((tokens, out)).astype(np.float32)
    weight = rng.random(tokens).astype(np.float32)
    sums = np.ones((out, min(width, out)), np.float32)
    _kernels.add_output_metric(gradient, weight, sums)
    products = (gradient.astype(np.float64) * weight[:, None]).T @ gradient
    for first in range(0, out, sums.shape[1]):
        rows = slice(first, min(first + sums.shape[1], out))
        wanted = 1 + products[rows, rows]
        np.testing.assert_allclose(sums[rows, : rows.stop - first], wanted, rtol=1e-5, atol=1e-5)
