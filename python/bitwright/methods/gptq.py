"""GPTQ (Frantar, Ashkboos, Hoefler and Alistarh 2023, arXiv:2210.17323, algorithm 1)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright import _kernels
from bitwright.arrays import floats, require_finite
from bitwright.grids.choice import GridChoice
from bitwright.grids.tables import fits_plainly, has_superblocks, shares_rows, vectors_of
from bitwright.grids.tensor import Grid, QuantizedTensor, SuperBlocks
from bitwright.methods.method import Method, MethodOptions, Solver, StageInputs
from bitwright.methods.rtn import quantize_rtn

MOST_DAMPING = 1.0
UNIT = 8  # columns whose vectors are chosen together
SOLVING_SPEED = 0.86  # next to a large product of matrices (bench/RESULTS.md)


@dataclass(frozen=True, eq=False)
class GramFactor:
    """The factor of a damped gram; layers that share their input share it.

    Parameters
    ----------
    upper
        ``[in, in]`` float32, upper triangular U with ``(G + damping * mean(diag G) * I)⁻¹ = UᵀU``,
        columns permuted by `order`.
    order
        ``[in]`` int32, the column that is quantized at each step.
    importance
        ``[in]`` float32, ``1 / U[j, j]²`` of each column; zero for a dead channel.
    damping
        The damping that was needed, relative to the mean of the diagonal.
    act_order
        Whether `order` puts the columns with the largest inputs first.
    """

    upper: NDArray[np.float32]
    order: NDArray[np.int32]
    importance: NDArray[np.float32]
    damping: float
    act_order: bool


@dataclass(frozen=True, eq=False)
class GptqTensor(QuantizedTensor):
    """A `QuantizedTensor` with GPTQ's account of its error.

    Parameters
    ----------
    column_losses
        ``[in]`` float64; each column's part of ``tr((W - Ŵ)(G + D)(W - Ŵ)ᵀ)``, D the damping.
    damping
        The damping that was used, relative to the mean of the gram's diagonal.
    """

    column_losses: NDArray[np.float64] | None = None
    damping: float = 0.0


def factor_gram(
    gram: NDArray[np.float32], *, damping: float = 0.01, act_order: bool = True, unit: int = 1
) -> GramFactor:
    """Factor the inverse of a damped gram, once for all layers that share it.

    Parameters
    ----------
    gram
        ``[in, in]`` float32, C-contiguous and symmetric, for example from `bitwright.gram`.
    damping
        Added to the diagonal, relative to its mean over the live channels. Where the sum is not
        positive definite in float32 the damping is raised tenfold until it is.
    act_order
        Quantize the columns with the largest inputs first.
    unit
        Consecutive columns that stay together: `UNIT` for grids of vectors.

    Returns
    -------
    GramFactor

    Raises
    ------
    TypeError, ValueError
        If `gram` is not such a matrix, holds NaN or infinity, or is not positive semi-definite at all.

    Notes
    -----
    `GramFactor.importance` is the exact cost of a step of GPTQ (eq. 2 of the paper): an error e in
    column j adds ``e² / U[j, j]²`` to the objective, once the later columns have made up for it.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> factor = bitwright.factor_gram(np.diag(np.array([1, 4, 2], np.float32)), damping=0)
    >>> factor.order, factor.importance.round(3)
    (array([1, 2, 0], dtype=int32), array([1., 4., 2.], dtype=float32))
    """
    if not (damping >= 0 and np.isfinite(damping)):
        raise ValueError(f"damping: expected a finite value from 0 on, got {damping}")
    gram = floats(gram)
    if not isinstance(gram, np.ndarray) or gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram: expected a matrix [in, in], got shape {np.shape(gram)}")
    diagonal = np.ascontiguousarray(gram.diagonal(), np.float32)
    if not np.isfinite(diagonal).all() or (diagonal < 0).any():
        raise ValueError("gram: the diagonal holds NaN, infinite or negative values")
    order = np.arange(len(diagonal), dtype=np.int32)
    if act_order:
        if len(diagonal) % unit:
            raise ValueError(f"unit: {unit} does not divide the {len(diagonal)} channels of gram")
        energies = diagonal.reshape(-1, unit).sum(axis=1)
        order = order.reshape(-1, unit)[np.argsort(-energies, kind="stable")].reshape(-1)
    live = diagonal[diagonal > 0]
    mean = float(live.mean()) if live.size else 1.0
    while True:
        upper = _kernels.inverse_factor(gram, order, damping * mean)
        if upper is not None:
            importance = np.empty_like(diagonal)
            importance[order] = np.float32(1) / np.square(upper.diagonal())
            importance[diagonal == 0] = 0
            return GramFactor(upper, order, importance, damping, act_order)
        if damping >= MOST_DAMPING:
            raise ValueError(
                f"gram: not positive semi-definite, even with damping {damping:g} of its diagonal"
            )
        damping = max(10 * damping, 1e-4)


def quantize_gptq(
    weight: NDArray[Any],
    gram: NDArray[np.float32] | GramFactor,
    bits: int = 4,
    group_size: int | None = 64,
    *,
    grid: Grid = "affine",
    scale_dtype: DTypeLike | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    static_groups: bool | None = None,
    block_size: int = 128,
    grid_search: bool = True,
) -> GptqTensor:
    """Quantize column by column; the later columns compensate each rounding error.

    Parameters
    ----------
    weight
        ``[out, in]`` float32, float16 or bfloat16, C-contiguous; read in place.
    gram
        ``[in, in]`` float32 second moments of the layer's inputs (`bitwright.gram`), or their factor
        from `factor_gram`; then `damping` and `act_order` are those of the factor.
    bits, group_size, grid, scale_dtype
        As for `quantize_rtn`.
    damping
        Added to the gram's diagonal, relative to its mean; raised tenfold while the factorization
        fails. The result says what was used.
    act_order
        Quantize the columns with the largest inputs first. Groups stay consecutive channels, so that
        every format can hold the result; this needs static groups.
    static_groups
        Fit all grids to the original weights, instead of each when its first column is reached and the
        weights have moved. By default on where `act_order` is.
    block_size
        Columns between two lazy updates of the rest: speed only.
    grid_search
        Fit each grid by a search over 20 ranges for the least error, weighted by what an error costs
        in each column, instead of spanning the smallest and the largest weight.

    Returns
    -------
    GptqTensor

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or a weight is NaN or infinite; the message names it.

    Notes
    -----
    Channels that never were active (a zero on the gram's diagonal) take no part in fitting the grid and are
    rounded to its nearest point.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> rng = np.random.default_rng(0)
    >>> inputs = rng.standard_normal((512, 64), dtype=np.float32) @ rng.random((64, 64), np.float32)
    >>> weight = rng.standard_normal((16, 64), dtype=np.float32)
    >>> def error(tensor):
    ...     return float(np.square(inputs @ (tensor.dequantize() - weight).T).sum())
    >>> gptq = bitwright.quantize_gptq(weight, bitwright.gram(inputs), bits=3)
    >>> error(gptq) < 0.7 * error(bitwright.quantize_rtn(weight, bits=3))
    True
    """
    weight = floats(weight, halves=True)
    choice = GridChoice.check(weight, bits, group_size, grid, scale_dtype, grid_search)
    require_finite(weight, "weight")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    vectors = vectors_of(grid)
    if not isinstance(gram, GramFactor):
        unit = 1 if vectors is None else UNIT
        gram = factor_gram(gram, damping=damping, act_order=act_order, unit=unit)
    if gram.importance.shape != weight.shape[1:]:
        raise ValueError(f"gram: has {gram.importance.size} channels, weight has {weight.shape[1]}")
    if static_groups is None:
        static_groups = gram.act_order
    if gram.act_order and not static_groups:
        raise ValueError(
            "static_groups: act_order needs them, since groups stay consecutive channels"
        )
    blocks: SuperBlocks | None = None
    given: tuple[NDArray[np.float32], ...] = ()
    static_groups = static_groups or fits_plainly(grid)
    if has_superblocks(grid) or shares_rows(grid) or fits_plainly(grid):
        if not static_groups:
            raise ValueError(f"static_groups: {grid} grids need them")
        rounded = quantize_rtn(
            weight,
            bits,
            group_size,
            grid=grid,
            scale_dtype=choice.scale_dtype,
            grid_search=grid_search,
            importance=gram.importance,
        )
        blocks, given = rounded.superblocks, rounded.grids()
        if vectors is not None:
            return _on_vectors(weight, gram, rounded, choice, vectors.type, block_size)
    codes, scales, offsets, losses = _kernels.quantize_gptq(
        weight,
        gram.upper,
        gram.order,
        gram.importance,
        choice.kernel_grid,
        block_size,
        static_groups,
        *given,
    )
    return GptqTensor(
        **choice.fields(codes, scales, offsets),
        superblocks=blocks,
        column_losses=losses,
        damping=gram.damping,
    )


def _on_vectors(
    weight: NDArray[Any],
    gram: GramFactor,
    rounded: QuantizedTensor,
    choice: GridChoice,
    type: str,
    block_size: int,
) -> GptqTensor:
    """Choose vectors of codes on the scales of a rounded tensor."""
    wide, scales = np.ascontiguousarray(weight, np.float32), rounded.grids()[0]
    codes = rounded.codes
    losses = _kernels.quantize_vectors(
        wide, gram.upper, gram.order, codes, scales, type, block_size
    )
    return GptqTensor(
        **choice.fields(codes, *rounded.grids()),
        superblocks=rounded.superblocks,
        column_losses=losses,
        damping=gram.damping,
    )


def gptq_solver(inputs: StageInputs, options: MethodOptions) -> Solver:
    """GPTQ, with the gram factored once for all layers that share it."""
    if inputs.gram is None:
        raise ValueError("method: gptq needs calibration data")
    moments = inputs.gram
    factors: dict[int, GramFactor] = {}  # one at most, since layers of one input rarely need two

    def factor(grid: Grid) -> GramFactor:
        unit = 1 if vectors_of(grid) is None or not options.act_order else UNIT
        if unit not in factors:
            factors.clear()
            factors[unit] = factor_gram(
                moments, damping=options.damping, act_order=options.act_order, unit=unit
            )
        return factors[unit]

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        return quantize_gptq(
            weight,
            factor(grid),
            bits,
            size,
            grid=grid,
            scale_dtype=dtype,
            block_size=options.block_size,
            grid_search=options.grid_search is not False,
        )

    return solve


def solving_operations(out: int, channels: int) -> float:
    """Return how many floating-point operations solving a layer takes, for the forecast of the time."""
    return out * channels**2 / SOLVING_SPEED + 2000.0 * out * channels


METHODS = (
    Method(
        "gptq",
        "GPTQ",
        gptq_solver,
        needs_gram=True,
        factors_gram=True,
        corrects=True,
        operations=solving_operations,
    ),
)
