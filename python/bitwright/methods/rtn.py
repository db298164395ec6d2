"""Round-to-nearest."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.arrays import floats, require_finite
from bitwright.grids.choice import GridChoice, check_importance, rounded_scales
from bitwright.grids.superblocks import closed_form, expanded, fit_superblocks
from bitwright.grids.tables import (
    E4M3,
    E8M0,
    TABLES,
    fits_plainly,
    has_superblocks,
    over_rows,
    row_starts,
    shares_rows,
    vectors_of,
)
from bitwright.grids.tensor import SUPERBLOCK, Grid, QuantizedTensor
from bitwright.methods.method import Method, MethodOptions, Solver, StageInputs

Float32 = NDArray[np.float32]
SHRINKS = np.exp2(-np.arange(8, dtype=np.float32) / 8)  # of an octave: floats repeat from there
REFITS = 2  # of the scales of k grids to the codes that were found


def quantize_rtn(
    weight: NDArray[Any],
    bits: int = 4,
    group_size: int | None = 64,
    *,
    grid: Grid = "affine",
    scale_dtype: DTypeLike | None = None,
    grid_search: bool = False,
    importance: ArrayLike | None = None,
) -> QuantizedTensor:
    """Round every weight to the nearest point of its group's grid.

    Parameters
    ----------
    weight
        ``[out, in]`` float32, float16 or bfloat16, C-contiguous; read in place.
    bits
        2, 3, 4, 5, 6 or 8.
    group_size
        Consecutive input channels that share a scale, a divisor of ``in``; None or -1: the whole row.
    grid
        ``"affine"`` (as MLX fits it), ``"zero_point"``, ``"symmetric"``, or ``"k"``: GGUF's, whose scales
        are quantized as well; its group size is None, and its scales are products in float32. Or a table
        of points, such as ``"iq4_nl"`` or ``"iq3_s"``, with its bits and None as group size.
    scale_dtype
        Dtype that scales and biases are stored in, by default that of `weight`. They are rounded to it
        before the codes are chosen.
    grid_search
        Shrink each group's range in 20 steps and keep the one with the least squared error.
    importance
        ``[in]`` weights of the squared errors in that search, for example ``gram.diagonal()``.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or a weight is NaN or infinite; the message names it.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> weight = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    >>> bitwright.quantize_rtn(weight, bits=2, group_size=64).scales
    array([[-0.5]], dtype=float32)
    """
    weight = floats(weight, halves=True)
    choice = GridChoice.check(weight, bits, group_size, grid, scale_dtype, grid_search)
    require_finite(weight, "weight")
    weights = check_importance(importance, weight.shape[1])
    few = grid in TABLES and choice.scale_dtype in (E4M3, E8M0)
    if few and (fits_plainly(grid) or not grid_search):
        return _plainly_rounded(weight, weights, choice)
    if shares_rows(grid):
        return _on_shared_scales(weight, weights, choice)
    vectors = vectors_of(grid)
    if vectors is not None:
        wide = np.ascontiguousarray(weight, np.float32)
        scales = _kernels.vector_scales(wide, weights, vectors.type, grid_search)
        offsets = np.zeros_like(scales)
    else:
        codes, scales, offsets = _kernels.quantize_rtn(weight, weights, choice.kernel_grid)
        if not has_superblocks(grid):
            return QuantizedTensor(**choice.fields(codes, scales, offsets))
    # Groups of zeros have a scale of their own choice, which must not count in that of the superblock.
    live = (weight != 0) & (weights != 0)
    empty = ~live.reshape(*scales.shape, -1).any(axis=2)
    scales[empty] = 0
    offsets[empty] = 0
    target = np.ascontiguousarray(weight, np.float32)
    tensor = _on_superblocks(target, weights, choice, scales, offsets)
    for _ in range(REFITS if choice.search else 0):
        best_scales, best_offsets = closed_form(target, tensor.codes, weights, bits, grid)
        known = np.isfinite(best_scales) & ~empty
        scales = np.where(known, best_scales, scales)
        offsets = np.where(known, best_offsets, offsets)
        with suppress(ValueError):  # float16 need not hold what would be better
            other = _on_superblocks(target, weights, choice, scales, offsets)
            tensor = _better(target, weights, tensor, other)
    return tensor


def _plainly_rounded(
    weight: NDArray[Any], importance: Float32, choice: GridChoice
) -> QuantizedTensor:
    """Round to tables whose scales are few as the tools do that define them."""
    target = np.ascontiguousarray(weight, np.float32)
    live = np.abs(target * (importance != 0)).reshape(len(target), -1, choice.group_size)
    divisor = np.float32(choice.divisor)
    scales = TABLES[choice.grid].plain_scales(live.max(axis=2) * divisor) / divisor
    offsets = np.zeros_like(scales)
    codes = _kernels.encode(target, scales, offsets, choice.kernel_grid)
    return QuantizedTensor(**choice.fields(codes, scales, offsets))


def _on_shared_scales(
    weight: NDArray[Any], importance: Float32, choice: GridChoice
) -> QuantizedTensor:
    """Round to a table whose scales several rows share: those that just span them or, with a search, the
    best of some smaller ones."""
    grid, size, target = choice.grid, choice.group_size, np.ascontiguousarray(weight, np.float32)
    starts, rows = row_starts(grid, len(target)), len(target)

    def by_block(values: Float32, reduce: np.ufunc) -> Float32:
        blocks: Float32 = reduce.reduceat(values, starts, axis=0)
        return blocks

    live = np.abs(target * (importance != 0)).reshape(rows, -1, size)
    largest = by_block(live.max(axis=2), np.maximum)
    unit = np.repeat(
        over_rows(grid, np.where(largest > 0, largest, np.float32(1)), rows), size, axis=1
    )
    least = np.full(largest.shape, np.inf, np.float32)
    codes, scales = np.zeros(target.shape, np.uint8), np.zeros(live.shape[:2], np.float32)
    for shrink in SHRINKS if choice.search else SHRINKS[:1]:
        spanning = largest / np.float32(TABLES[grid].points[-1])
        stored = rounded_scales(spanning * shrink, choice.scale_dtype).astype(np.float32)
        tried = over_rows(grid, stored, rows)
        found = _kernels.encode(target, tried, np.zeros_like(tried), choice.kernel_grid)
        change = TABLES[grid].by_code[found] * np.repeat(tried, size, axis=1)
        change = np.square((change - target) / unit) * importance
        error = by_block(change.reshape(rows, -1, size).sum(axis=2), np.add)
        better = over_rows(grid, error < least, rows)
        least = np.minimum(error, least)
        codes = np.where(np.repeat(better, size, axis=1), found, codes)
        scales = np.where(better, tried, scales)
    return QuantizedTensor(**choice.fields(codes, scales, np.zeros_like(scales)))


def _is_fitted(grid: Grid) -> bool:
    """Tell whether scales are searched for where nothing is said: as other tools do for GGUF's types."""
    return grid == "k" or (grid in TABLES and TABLES[grid].fitted)


def _on_superblocks(
    weight: Float32, importance: Float32, choice: GridChoice, scales: Float32, offsets: Float32
) -> QuantizedTensor:
    """Round to the superblocks that are nearest to these grids of groups."""
    bits, grid = choice.bits, choice.grid
    blocks = fit_superblocks(scales, offsets, importance, bits, grid)
    grids = expanded(blocks, bits, grid)
    vectors = vectors_of(grid)
    if vectors is None:
        codes = _kernels.encode(weight, *grids, choice.kernel_grid)
    else:
        codes = _kernels.encode_vectors(weight, grids[0], importance, vectors.type)
    return QuantizedTensor(**choice.fields(codes, *grids), superblocks=blocks)


def _better(
    weight: Float32, importance: Float32, one: QuantizedTensor, other: QuantizedTensor
) -> QuantizedTensor:
    """Take each superblock from where its error is less."""
    kept, tried = one.superblocks, other.superblocks
    if kept is None or tried is None:
        return one

    def errors(tensor: QuantizedTensor) -> Float32:
        change = tensor.dequantize()
        change -= weight
        change *= change
        change *= importance
        sums: Float32 = change.reshape(len(weight), -1, SUPERBLOCK).sum(axis=2)
        return sums

    chosen = errors(other) < errors(one)
    blocks = kept.replaced(chosen, tried)
    return replace(
        one,
        codes=np.where(np.repeat(chosen, SUPERBLOCK, axis=1), other.codes, one.codes),
        scales=blocks.scales(),
        biases=blocks.biases(),
        superblocks=blocks,
    )


def rtn_solver(inputs: StageInputs, options: MethodOptions) -> Solver:
    """Round to nearest; the statistics only weigh the grid search."""
    importance = inputs.importance if inputs.gram is None else inputs.gram.diagonal()

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        return quantize_rtn(
            weight,
            bits,
            size,
            grid=grid,
            scale_dtype=dtype,
            grid_search=_is_fitted(grid) if options.grid_search is None else options.grid_search,
            importance=importance,
        )

    return solve


METHODS = (Method("rtn", "RTN", rtn_solver, needs_inputs=False),)
