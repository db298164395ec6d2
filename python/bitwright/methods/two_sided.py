"""Refinement in the metrics of a layer's inputs and outputs together."""

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.arrays import require_finite
from bitwright.grids.superblocks import expanded
from bitwright.grids.tables import shares_rows, vectors_of
from bitwright.grids.tensor import QuantizedTensor
from bitwright.methods.refine import (
    check_refinable,
    damped_gram,
    kernel_grid,
    with_grids,
    with_superblocks,
)

SWEEPS, FITS = 8, 3  # over all codes, of which the first fit scales too
METRIC_ROWS = 256  # of a diagonal block of an output metric, see docs/methods/two_sided.md
PLANES_SPEED = 0.08  # of nearest planes, next to a large product of matrices (bench/RESULTS.md)
METRIC_DAMPING = 0.1  # on the diagonal of an output metric whose own has a mean of 1


def normalized_metric(sums: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return an output metric with a mean diagonal of 1, damped; None where there is nothing in it.

    `sums` ``[out, width]`` float32, that is changed, holds sums of products of gradients in diagonal
    blocks of `width` rows."""
    rows = np.arange(len(sums))
    diagonal = rows, rows % sums.shape[1]
    mean = sums[diagonal].mean(dtype=np.float64)
    if not (np.isfinite(mean) and mean > 0):
        return None
    sums *= np.float32(1 / mean)
    sums[diagonal] += np.float32(METRIC_DAMPING)
    return sums if np.isfinite(sums).all() else None


def two_sided_operations(out: int, channels: int) -> float:
    """Return how many floating-point operations two-sided refinement of a layer takes, those of slow
    kernels as so many more, for the forecast of the time."""
    rows = min(out, METRIC_ROWS)
    dense = 2.0 * (1 + FITS) * out * channels**2  # the residual, and what new grids change in it
    # Of each sweep: slopes in one product, nearest planes in the cache, one row after another.
    return dense + out * channels * rows * (2.0 * SWEEPS + FITS / PLANES_SPEED)


def refine_two_sided(
    tensor: QuantizedTensor,
    weight: NDArray[np.float32],
    gram: NDArray[np.float32],
    output_metric: NDArray[np.float32],
    *,
    sweeps: int = SWEEPS,
    fits: int = FITS,
    damping: float = 0.01,
    overwrite_gram: bool = False,
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    """Lower the error of a layer's output, each direction of which counts by what it does to predictions.

    The objective is ``tr(O (W - Ŵ)(G + D)(W - Ŵ)ᵀ)``, the error in the Kronecker-factored Fisher
    information of K-FAC (Martens and Grosse 2015, arXiv:1503.05671, eq. 1) that Tseng et al. 2025
    (arXiv:2505.22988) round weights in; here codes and grids are swept over, and no step raises it. Each
    sweep goes over the groups of channels. The first ones fit every row's scale and bias (or integer zero)
    of the group. All choose the codes, column by column: all rows by nearest planes, where that gains, and
    then each by itself. What is stored is what the next step sees.

    Parameters
    ----------
    tensor
        ``[out, in]``, with groups of consecutive channels.
    weight
        ``[out, in]`` float32, what it stands for.
    gram
        ``[in, in]`` float32 second moments of the layer's inputs.
    output_metric
        ``[out, width]`` float32: O in diagonal blocks of `width` rows, row i of it being row i of its
        block; symmetric and positive definite.
    sweeps, fits
        How many sweeps, and how many of them fit the grids. Those of grids with superblocks, or that rows
        share, stay.
    damping
        Added to the gram's diagonal, relative to its mean.
    overwrite_gram
        Add it in `gram` itself, and take it away in the end, which saves a copy.

    Returns
    -------
    QuantizedTensor
        With the same grid, bits and dtypes.
    NDArray
        ``[sweeps + 1]`` float64, the objective before and after every sweep; it never rises.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; the message names it.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> rng = np.random.default_rng(0)
    >>> inputs = rng.standard_normal((512, 64), dtype=np.float32) @ rng.random((64, 64), np.float32)
    >>> weight = rng.standard_normal((16, 64), dtype=np.float32)
    >>> gradients = rng.standard_normal((512, 16), dtype=np.float32) @ rng.random((16, 16), np.float32)
    >>> gram, metric = bitwright.gram(inputs), bitwright.gram(gradients)
    >>> rounded = bitwright.quantize_gptq(weight, gram, bits=3)
    >>> _, errors = bitwright.refine_two_sided(rounded, weight, gram, metric)
    >>> bool(errors[-1] < 0.7 * errors[0])
    True
    """
    check_refinable(tensor, weight, damping)
    if vectors_of(tensor.grid) is not None:
        raise ValueError(
            f"tensor: codes of {tensor.grid} are chosen eight together, which only refine does"
        )
    if output_metric.ndim != 2 or len(output_metric) != len(weight):
        raise ValueError(
            f"output_metric: expected {len(weight)} rows, got shape {output_metric.shape}"
        )
    require_finite(output_metric, "output_metric")
    codes, blocks = tensor.codes.copy(), tensor.superblocks
    if blocks is None:
        scales, offsets = tensor.grids()
        fits = 0 if shares_rows(tensor.grid) else fits
    else:
        (scales, offsets), fits = expanded(blocks, tensor.bits, tensor.grid), 0
    with damped_gram(gram, damping, overwrite_gram) as damped:
        objectives = _kernels.refine_two_sided(
            weight, damped, output_metric, codes, scales, offsets, kernel_grid(tensor), sweeps, fits
        )
    if blocks is not None:
        return with_superblocks(tensor, codes, blocks), objectives
    return with_grids(tensor, codes, scales, offsets), objectives
