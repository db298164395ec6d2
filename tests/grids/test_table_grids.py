"""Table grids: points and ties, what every method does with them, next to plain NumPy."""

from typing import Any

import numpy as np
import pytest
from damped_objective import layer, objective
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import bitwright
from bitwright import QuantizedTensor, _kernels
from bitwright.distill.student import TrainedTensor
from bitwright.grids.choice import kernel_grid
from bitwright.grids.tables import (
    E8M0,
    TABLES,
    TableGrid,
    fits_plainly,
    has_superblocks,
    shares_rows,
    vectors_of,
)
from bitwright.grids.tensor import SUPERBLOCK, stored_bits

pytestmark = pytest.mark.usefixtures("all_processors")

Array = NDArray[Any]
by_grid = pytest.mark.parametrize("grid", [each for each in TABLES if vectors_of(each) is None])


def nearest(weight: Array, scales: Array, table: TableGrid) -> Array:
    """Return the code of the nearest point by trying all, ties as the table says."""
    points = np.array(table.points, np.float64)
    values = (weight.reshape(*scales.shape, -1) / scales[:, :, None]).astype(np.float64)
    distance = np.abs(values[..., None] - points)
    least = distance == distance.min(axis=-1, keepdims=True)
    middle = len(points) // 2
    index = np.arange(len(points))
    place = np.where(index < middle, middle - 1 - index, index - middle)
    rank = {"up": -index, "small": place, "even": place % 2 * 1000 - index}[table.ties]
    # Zeros keep the sign of what they are near to.
    other_zero = np.signbit(points) != (values < 0)[..., None]
    if table.ties == "small":  # of which zeros are positive
        other_zero = np.signbit(points) & np.ones_like(other_zero)
    rank = np.where((points == 0) & other_zero, 10**6, rank)
    return np.where(least, rank, 10**7).argmin(axis=-1).reshape(weight.shape).astype(np.uint8)


@by_grid
def test_codes_are_the_nearest_points(grid: Any) -> None:
    table, size = TABLES[grid], TABLES[grid].group_size or 32
    rng = np.random.default_rng(0)
    scales = np.exp2(rng.integers(-3, 3, (19, 4))).astype(np.float32)
    if table.either_sign:
        scales *= rng.choice([-1, 1], scales.shape)
    points = np.array(table.points, np.float32)
    ties = (points[1:] + points[:-1]) / 2
    values = rng.choice(
        np.concatenate([points, ties, [2 * points[0], 3 * points[-1]]]), (19, 4, size)
    )
    values = np.where(
        rng.random(values.shape) < 0.5, values, 1.2 * points[-1] * rng.normal(size=values.shape)
    )
    weight = (values * scales[:, :, None]).reshape(19, -1).astype(np.float32)
    codes = _kernels.encode(
        weight,
        scales,
        np.zeros_like(scales),
        kernel_grid(table.bits, size, grid, np.dtype(np.float32)),
    )
    np.testing.assert_array_equal(codes, nearest(weight, scales, table))


@by_grid
@settings(deadline=None, max_examples=15)
@given(
    out=st.integers(1, 20), blocks=st.integers(1, 2), search=st.booleans(), seed=st.integers(0, 999)
)
def test_rounding_stays_on_the_grid(
    grid: Any, out: int, blocks: int, search: bool, seed: int
) -> None:
    table = TABLES[grid]
    weight = (
        np.random.default_rng(seed).standard_t(4, (out, blocks * SUPERBLOCK)).astype(np.float32)
    )
    weight[0, : table.group_size or 1] = 0
    tensor = bitwright.quantize_rtn(
        weight, table.bits, table.group_size, grid=grid, grid_search=search
    )
    assert tensor.codes.max() < len(table.points)
    assert tensor.biases is None
    assert tensor.zeros is None
    points = np.array(table.points, np.float32)[tensor.codes]
    scales = np.repeat(tensor.grids()[0], tensor.group_size, axis=1)
    np.testing.assert_array_equal(tensor.dequantize(), points * scales)
    assert (tensor.dequantize()[0, : table.group_size or 1] == 0).all()
    codes = nearest(weight, np.where(tensor.grids()[0] == 0, 1, tensor.grids()[0]), table)
    live = scales != 0
    np.testing.assert_array_equal(tensor.codes[live], codes[live])
    assert np.square(tensor.dequantize() - weight).sum() < 0.03 * np.square(weight).sum()
    assert (
        tensor.nbytes
        == weight.size * stored_bits(table.bits, tensor.group_size, grid, np.float32) / 8
    )


@by_grid
def test_the_search_finds_what_all_scales_would(grid: Any) -> None:
    """Next to a fine scan over scales of both signs, rounded as they are stored."""
    table = TABLES[grid]
    if has_superblocks(grid) or shares_rows(grid) or fits_plainly(grid) or grid == "fp8":
        pytest.skip("fitted together, or of points of 8 bits, beside which they hardly matter")
    size = table.group_size or 32
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((64, size), dtype=np.float32)
    importance = rng.random(size).astype(np.float32)
    tensor = bitwright.quantize_rtn(
        weight, table.bits, size, grid=grid, grid_search=True, importance=importance
    )
    best = np.full(len(weight), np.inf)
    reach = np.abs(weight).max(axis=1, keepdims=True) / max(map(abs, table.points))
    for factor in np.linspace(0.4, 1.6, 150):
        for sign in (1, -1) if table.either_sign else (1,):
            stored = (sign * factor * reach * tensor.divisor).astype(tensor.scales.dtype)
            scales = stored.astype(np.float32) / np.float32(tensor.divisor)
            change = np.array(table.points)[nearest(weight, scales, table)] * scales - weight
            best = np.fmin(best, (importance * np.square(change)).sum(axis=1))
    found = (importance * np.square(tensor.dequantize() - weight)).sum(axis=1)
    assert found.sum() < 1.03 * best.sum()
    assert (found < 1.25 * best).all()


@by_grid
def test_importance_decides(grid: Any) -> None:
    """Channels that do not count have no say: the others are rounded as if by themselves."""
    table = TABLES[grid]
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((8, SUPERBLOCK), dtype=np.float32)
    weight[:, 5] = 1000
    importance = np.ones(SUPERBLOCK, np.float32)
    importance[5] = 0
    tensor = bitwright.quantize_rtn(
        weight, table.bits, table.group_size, grid=grid, grid_search=True, importance=importance
    )
    change = np.delete(tensor.dequantize() - weight, 5, axis=1)
    assert np.square(change).mean() < 0.02


def gptq(
    weight: Array, gram: Array, scales: Array, table: TableGrid, size: int, damping: float
) -> Array:
    """Algorithm 1 in float64, column by column in the given order, on scales that are given."""
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += damping * gram.diagonal().mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work, codes = weight.astype(np.float64), np.zeros(weight.shape, np.uint8)
    for j in range(weight.shape[1]):
        scale = scales[:, [j // size]]
        codes[:, [j]] = nearest(work[:, [j]], scale, table)
        error = (work[:, j] - np.array(table.points)[codes[:, j]] * scale[:, 0]) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
    return codes


@by_grid
def test_gptq_is_algorithm_1(grid: Any) -> None:
    table = TABLES[grid]
    weight, gram = layer(24, SUPERBLOCK, 3)
    tensor = bitwright.quantize_gptq(
        weight, gram, table.bits, table.group_size, grid=grid, act_order=False, static_groups=True
    )
    codes = gptq(weight, gram, tensor.grids()[0], table, tensor.group_size, 0.01)
    assert (tensor.codes != codes).mean() < 0.01  # float32 next to float64
    plain = bitwright.quantize_rtn(
        weight, table.bits, table.group_size, grid=grid, grid_search=True
    )
    ordered = bitwright.quantize_gptq(weight, gram, table.bits, table.group_size, grid=grid)
    for each in (tensor, ordered):
        assert objective(weight, each, gram, 0.01) < 0.7 * objective(weight, plain, gram, 0.01)
    assert tensor.column_losses is not None
    assert tensor.column_losses.sum() == pytest.approx(
        objective(weight, tensor, gram, 0.01), rel=1e-3
    )


@by_grid
def test_refinement_lowers_the_error_that_it_tells(grid: Any) -> None:
    table = TABLES[grid]
    weight, gram = layer(40, SUPERBLOCK, 4)
    start = bitwright.quantize_rtn(weight, table.bits, table.group_size, grid=grid)
    tensor, errors = bitwright.refine(start, weight, gram, rounds=4)
    assert errors[0] == pytest.approx(objective(weight, start, gram, 0.01), rel=1e-4)
    assert errors[-1] == pytest.approx(objective(weight, tensor, gram, 0.01), rel=1e-4)
    assert (np.diff(errors) <= 0).all()
    assert errors[-1] < 0.6 * errors[0]
    assert tensor.scales.dtype == start.scales.dtype
    if table.scale_dtype is not None and table.scale_dtype.itemsize == 2:
        assert (tensor.scales != start.scales).mean() > 0.5


@by_grid
def test_codes_are_the_best_given_all_others(grid: Any) -> None:
    """After many rounds no single code can be changed for the better."""
    table = TABLES[grid]
    weight, gram = layer(6, SUPERBLOCK, 5)
    start = bitwright.quantize_gptq(weight, gram, table.bits, table.group_size, grid=grid)
    codes, (scales, offsets) = start.codes.copy(), start.grids()
    damped = gram.copy()
    damped[np.diag_indices_from(damped)] += np.float32(0.01 * gram.diagonal().mean())
    kind = kernel_grid(table.bits, start.group_size, grid, np.dtype(np.float32))
    _kernels.refine(weight, damped, codes, scales, offsets, kind, 40, True)
    wide = np.repeat(scales, start.group_size, axis=1)
    points = np.array(table.points)
    decoded = points[codes] * wide
    residual = (weight - decoded) @ damped.astype(np.float64)
    for point in points:
        step = point * wide - decoded
        gain = step * (2 * residual - step * damped.diagonal())
        assert gain.max() < 1e-3 * np.abs(residual * wide).max()


@by_grid
def test_two_sided_refinement(grid: Any) -> None:
    table = TABLES[grid]
    weight, gram = layer(48, SUPERBLOCK, 6)
    _, metric = layer(4, 48, 7)
    metric /= metric.diagonal().mean()
    metric[np.diag_indices_from(metric)] += np.float32(0.1)
    start = bitwright.quantize_gptq(weight, gram, table.bits, table.group_size, grid=grid)
    tensor, errors = bitwright.refine_two_sided(start, weight, gram, metric)
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += 0.01 * gram.diagonal().mean()
    for each, told in ((start, errors[0]), (tensor, errors[-1])):
        change = weight.astype(np.float64) - each.dequantize()
        assert np.einsum("pq,pi,ij,qj", metric, change, damped, change) == pytest.approx(
            told, rel=1e-3
        )
    assert (np.diff(errors) <= 0).all()
    assert errors[-1] < 0.85 * errors[0]


@by_grid
def test_clipping(grid: Any) -> None:
    table = TABLES[grid]
    if has_superblocks(grid) or shares_rows(grid) or fits_plainly(grid):
        pytest.skip("its scales are fitted together, or never clip")
    weight, gram = layer(16, SUPERBLOCK, 8)
    size = table.group_size
    if size is None:
        pytest.skip("clipping is by groups")
    clipped = bitwright.quantize_clipped(weight, gram, table.bits, size, grid=grid)
    plain = bitwright.quantize_rtn(weight, table.bits, size, grid=grid)
    groups = [slice(i, i + size) for i in range(0, SUPERBLOCK, size)]

    def error(tensor: QuantizedTensor) -> float:
        change = tensor.dequantize() - weight
        return sum(
            float(np.einsum("ij,jk,ik", change[:, g], gram[g, g], change[:, g])) for g in groups
        )

    assert error(clipped) < 0.95 * error(plain)
    scale = np.ones(SUPERBLOCK, np.float32)
    choice = bitwright.GridChoice.check(weight, table.bits, size, grid)
    found = np.empty_like(weight)
    _kernels.scaled_rounding_change(weight, scale, scale, choice.kernel_grid, found)
    if table.scale_dtype != E8M0:  # of which plain rounding takes the power above
        np.testing.assert_allclose(found, plain.dequantize() - weight, atol=1e-6)


def close(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5 * np.abs(wanted).max())


def together(grid: Any, gradients: Array) -> Array:
    """Rows that share a scale have the sum of their gradients."""
    if not shares_rows(grid):
        return gradients
    count = TABLES[grid].rows or len(gradients)
    blocks = [gradients[i : i + count] for i in range(0, len(gradients), count)]
    return np.concatenate([np.broadcast_to(each.sum(0), each.shape) for each in blocks])


@by_grid
def test_gradients_of_scales(grid: Any) -> None:
    """Σ points · dw of each group, from dense products."""
    table = TABLES[grid]
    rng = np.random.default_rng(9)
    weight = rng.standard_normal((12, SUPERBLOCK), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, table.bits, table.group_size, grid=grid)
    inputs, above = (
        rng.standard_normal((30, SUPERBLOCK), dtype=np.float32),
        rng.standard_normal((30, 12), dtype=np.float32),
    )
    trained = TrainedTensor(tensor)
    trained.add_gradient(inputs, above)
    points = np.array(table.points)[tensor.codes]
    wanted = (
        ((above.T.astype(np.float64) @ inputs) * points).reshape(*tensor.scales.shape, -1).sum(2)
    )
    close(trained.gradient()[0], together(grid, trained.units * wanted / tensor.divisor))
    rows = np.array([3, 3, 7], np.int32)
    trained.add_row_gradient(rows, inputs[:3])
    wanted = np.zeros(tensor.scales.shape)
    parts = (inputs[:3] * points[rows]).reshape(3, tensor.scales.shape[1], -1).sum(2)
    np.add.at(wanted, rows, parts)
    close(trained.gradient()[0], together(grid, trained.units * wanted / tensor.divisor))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 3}, "bits: iq4_nl has 4, not 3"),
        ({"group_size": 64}, "group_size: iq4_nl has 32, not 64"),
        ({"grid": "iq4_xs"}, "iq4_xs has rows of multiples of 256 weights, not 64"),
        ({"grid": "iq5"}, "grid: expected one of"),
    ],
)
def test_wrong_arguments_are_named(wrong: Any, message: str) -> None:
    weight = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match=message):
        bitwright.quantize_rtn(weight, **{"bits": 4, "group_size": None, "grid": "iq4_nl", **wrong})


def test_kernels_check_their_tables() -> None:
    points, bounds = np.arange(-8, 8, dtype=np.float32), np.arange(-8, 7, dtype=np.float32)
    for wrong, message in (
        ((points[::-1].copy(), bounds), "that rise"),
        ((points[:8].copy(), bounds), "points: axis 0 must be 16"),
        ((points, bounds[:3].copy()), "bounds: axis 0 must be 15"),
        ((points + 100, bounds), "both sides of zero"),
        ((np.where(points > 6, np.float32(np.inf), points), bounds), "both sides of zero"),
    ):
        with pytest.raises(ValueError, match=message):
            _kernels.Grid(4, 32, "table", "float16", False, *wrong)
    with pytest.raises(ValueError, match="divisor: expected a positive number"):
        _kernels.Grid(4, 32, "table", "float16", False, points, bounds, False, 0.0)


@pytest.mark.parametrize("grid", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("value", [1e-36, 1e-37, 1e-38, 1e-40, 0.0])
def test_groups_that_are_all_but_zero_stay_so(grid: Any, value: float) -> None:
    """mlx 0.32.4's scale goes around below the smallest power of two: infinity comes back."""
    weight = np.full((2, 64), value, np.float32)
    weight[1] = 1
    found = bitwright.quantize_rtn(weight, TABLES[grid].bits, 32, grid=grid).dequantize()
    assert (np.abs(found[0] - value) <= max(0.15 * value, 2.0**-128)).all()
    assert (found[1] == 1).all()
