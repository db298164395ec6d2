"""Refinement: alternating updates of grids and codes in the metric of the Gram matrix.

The codes are updated by cyclic coordinate descent, as in QuantEase (Behdin et al. 2023, arXiv:2309.01885),
which keeps the grids fixed; see docs/methods/refine.md."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.arrays import require_finite
from bitwright.grids.choice import FLOAT_DTYPES
from bitwright.grids.choice import kernel_grid as grid_for_kernels
from bitwright.grids.superblocks import expanded, fit_superblocks
from bitwright.grids.tables import Vectors, shares_rows, vectors_of
from bitwright.grids.tensor import QuantizedTensor, SuperBlocks
from bitwright.methods.gptq import GptqTensor

ROUNDS = 2
VECTOR_SWEEPS = 2  # of each round, over vectors, whose scales are only fitted on the way


def refine(
    tensor: QuantizedTensor,
    weight: NDArray[np.float32],
    gram: NDArray[np.float32],
    *,
    rounds: int = ROUNDS,
    damping: float = 0.01,
    overwrite_gram: bool = False,
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    """Lower the error of a layer's output, from wherever any method has left it.

    In each round scales and biases get their closed form, which is least squares in the metric of the gram.
    Then, group by group, a new range or integer zero is taken where that gains, with its codes rounded as
    GPTQ does within the group, and each code gets its best value given all others. Scales and biases are
    rounded to their stored dtype inside the loop: no step raises the error of what is stored.
    The scales of "k" grids are fitted with their superblocks again, and each row keeps the better; those
    that rows share stay. Where codes are vectors, the eight weights of a unit get their best ones together.

    Parameters
    ----------
    tensor
        ``[out, in]``, with groups of consecutive channels.
    weight
        ``[out, in]`` float32, what it stands for.
    gram
        ``[in, in]`` float32 second moments of the layer's inputs.
    rounds
        How often.
    damping
        Added to the gram's diagonal, relative to its mean, so that what calibration has not seen counts.
    overwrite_gram
        Add it in `gram` itself, and take it away in the end, which saves a copy.

    Returns
    -------
    QuantizedTensor
        With the same grid, bits and dtypes.
    NDArray
        ``[rounds + 1]`` float64, ``tr((W - Ŵ)(G + D)(W - Ŵ)ᵀ)`` before and after every round; it never
        rises.

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
    >>> gram = bitwright.gram(inputs)
    >>> _, errors = bitwright.refine(bitwright.quantize_rtn(weight, bits=3), weight, gram)
    >>> bool(errors[-1] < 0.5 * errors[0])
    True
    """
    check_refinable(tensor, weight, damping)
    with damped_gram(gram, damping, overwrite_gram) as damped:
        return _refine_damped(tensor, weight, damped, rounds)


def check_refinable(tensor: QuantizedTensor, weight: NDArray[np.float32], damping: float) -> None:
    """Raise ValueError or TypeError unless a tensor can be refined towards a weight."""
    if tensor.group_index is not None:
        raise ValueError("tensor: only groups of consecutive channels can be refined")
    if weight.shape != tensor.shape:
        raise ValueError(f"weight: expected shape {tensor.shape}, got {weight.shape}")
    if not (damping >= 0 and np.isfinite(damping)):
        raise ValueError(f"damping: expected a finite value from 0 on, got {damping}")
    if tensor.scales.dtype not in FLOAT_DTYPES and tensor.table is None:
        raise TypeError(f"tensor: scales are {tensor.scales.dtype}")
    require_finite(weight, "weight")


@contextmanager
def damped_gram(
    gram: NDArray[np.float32], damping: float, overwrite: bool
) -> Iterator[NDArray[np.float32]]:
    """Yield a gram with a share of its diagonal's mean added to that: the very array with `overwrite`, as
    it was afterwards."""
    kept = gram.diagonal().copy()
    live = kept[kept > 0]
    damped = gram if overwrite else gram.copy()
    diagonal = np.diag_indices_from(damped)
    damped[diagonal] += np.float32(damping * (live.mean() if live.size else 1))
    try:
        yield damped
    finally:
        damped[diagonal] = kept


def kernel_grid(tensor: QuantizedTensor) -> _kernels.Grid:
    """Return a tensor's grid for kernels."""
    return grid_for_kernels(
        tensor.bits, tensor.group_size, tensor.grid, tensor.scales.dtype, False, tensor.divisor
    )


def _refine_damped(
    tensor: QuantizedTensor, weight: NDArray[np.float32], damped: NDArray[np.float32], rounds: int
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    vectors, blocks = vectors_of(tensor.grid), tensor.superblocks
    if vectors is not None and blocks is not None:
        return _refine_vectors(tensor, vectors, blocks, weight, damped, rounds)
    if blocks is not None:
        return _refine_superblocks(tensor, blocks, weight, damped, rounds)
    codes, (scales, offsets) = tensor.codes.copy(), tensor.grids()
    objectives = _kernels.refine(
        weight,
        damped,
        codes,
        scales,
        offsets,
        kernel_grid(tensor),
        rounds,
        shares_rows(tensor.grid),
    )
    return with_grids(tensor, codes, scales, offsets), objectives


def with_grids(
    tensor: QuantizedTensor,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
) -> QuantizedTensor:
    """Return a tensor with other codes, scales and biases or zeros, rounded to its dtypes already."""
    changed: dict[str, Any] = {"codes": codes}
    if tensor.divisor != 1:
        scales = scales * np.float32(tensor.divisor)
    changed["scales"] = scales.astype(tensor.scales.dtype)
    if tensor.biases is not None:
        changed["biases"] = offsets.astype(tensor.biases.dtype)
    elif tensor.zeros is not None:
        changed["zeros"] = offsets.astype(tensor.zeros.dtype)
    if isinstance(tensor, GptqTensor):
        changed["column_losses"] = None  # they were those of other codes
    return replace(tensor, **changed)


def _refine_superblocks(
    tensor: QuantizedTensor,
    blocks: SuperBlocks,
    weight: NDArray[np.float32],
    gram: NDArray[np.float32],
    rounds: int,
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    """Refine a grid with superblocks: its scales take their closed form and are fitted with superblocks
    again, the codes follow, and each row keeps what has the least error."""
    bits, grid = tensor.bits, kernel_grid(tensor)
    codes = tensor.codes.copy()
    importance = np.ascontiguousarray(gram.diagonal())

    def refined(
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        only: bool,
    ) -> None:
        _kernels.refine(weight, gram, codes, scales, offsets, grid, 1, only)

    def errors(codes: NDArray[np.uint8], blocks: SuperBlocks) -> NDArray[np.float64]:
        change = with_superblocks(tensor, codes, blocks).dequantize()
        np.subtract(weight, change, out=change)
        return np.maximum(_kernels.row_quadratic_forms(change, gram), 0)

    objectives = [float(errors(codes, blocks).sum())]
    for _ in range(rounds):
        free, (scales, offsets) = codes.copy(), expanded(blocks, bits, tensor.grid)
        refined(free, scales, offsets, False)
        fitted = fit_superblocks(scales, offsets, importance, bits, tensor.grid)
        refined(free, *expanded(fitted, bits, tensor.grid), True)
        refined(codes, *expanded(blocks, bits, tensor.grid), True)
        kept, tried = errors(codes, blocks), errors(free, fitted)
        rows = tried < kept
        codes[rows] = free[rows]
        blocks = blocks.replaced(rows, fitted)
        objectives.append(float(np.where(rows, tried, kept).sum()))
    return with_superblocks(tensor, codes, blocks), np.array(objectives)


def _refine_vectors(
    tensor: QuantizedTensor,
    vectors: Vectors,
    blocks: SuperBlocks,
    weight: NDArray[np.float32],
    gram: NDArray[np.float32],
    rounds: int,
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    """Refine vectors and their scales as they are stored."""
    codes, d, scale_codes = tensor.codes.copy(), blocks.d.copy(), blocks.scale_codes.copy()
    objectives = _kernels.refine_vectors(
        weight, gram, codes, d, scale_codes, vectors.type, VECTOR_SWEEPS * rounds
    )
    found = with_superblocks(tensor, codes, SuperBlocks(d, scale_codes))
    return found, objectives[::VECTOR_SWEEPS]


def with_superblocks(
    tensor: QuantizedTensor, codes: NDArray[np.uint8], blocks: SuperBlocks
) -> QuantizedTensor:
    """Return a tensor of a grid with superblocks with other codes and superblocks."""
    changed: dict[str, Any] = {"column_losses": None} if isinstance(tensor, GptqTensor) else {}
    return replace(
        tensor,
        codes=codes,
        scales=blocks.scales(),
        biases=blocks.biases(),
        superblocks=blocks,
        **changed,
    )
