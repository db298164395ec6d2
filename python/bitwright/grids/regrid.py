"""A quantized tensor on another grid, with the same codes."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.grids.tables import TABLES, has_own_scales
from bitwright.grids.tensor import Grid, QuantizedTensor

Float32 = NDArray[np.float32]
# Two unit roundoffs of float16, the only dtype of scales in some formats: a stored value has been rounded
# once, and is rounded again on another grid.
ROUNDOFF = 2 * 2.0**-11
ROUNDING = (2 * ROUNDOFF) ** 2  # of a layer's energy: a weight s·c + b has two terms
ROWS = 1024  # that are compared at once


def regrid(
    tensor: QuantizedTensor,
    bits: int,
    group_size: int,
    grid: Grid,
    scale_dtype: np.dtype[Any],
) -> QuantizedTensor | None:
    """Store a tensor's codes in another precision: the same weights, but for the rounding of scales.

    More bits hold fewer, and small groups hold large ones. An integer zero is a bias of ``-scale * zero``
    and the other way round, and a symmetric grid holds any zero that leaves the codes in range.

    Parameters
    ----------
    tensor
        ``[out, in]``.
    bits, group_size, grid
        What it is to have.
    scale_dtype
        What its scales and biases are rounded to.

    Returns
    -------
    QuantizedTensor or None
        None where its codes are not among those of the precision. How far it is from `tensor`, see `lost`.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    >>> tensor = bitwright.quantize_rtn(weight, 4, 64, grid="zero_point", scale_dtype="float16")
    >>> found = regrid(tensor, 8, 32, "symmetric", np.dtype("float16"))
    >>> bool((found.dequantize() == tensor.dequantize()).all())
    True
    """
    own = tensor.stored_grid
    if (own, tensor.bits, tensor.group_size) == (grid, bits, group_size) and (
        has_own_scales(own) or tensor.scales.dtype == scale_dtype
    ):
        return tensor
    reordered = tensor.group_index is not None and group_size != tensor.group_size
    if grid == "k" or {own, grid} & {*TABLES}:
        return None
    if bits < tensor.bits or tensor.group_size % group_size or reordered:
        return None
    repeats = tensor.group_size // group_size
    scales, offsets = (np.repeat(each, repeats, axis=1) for each in tensor.grids())
    codes, zeros, biases = tensor.codes, None, None
    if grid == "affine":
        biases = offsets if tensor.grid == "affine" else -scales * offsets
    else:
        zeros = _zeros(scales, offsets, bits) if tensor.grid == "affine" else offsets
        top = 2**bits - 1
        if grid == "symmetric":
            middle = np.float32(2 ** (bits - 1))
            index: NDArray[Any] | None = tensor.group_index
            if index is None:
                index = np.repeat(np.arange(zeros.shape[1]), group_size)
            moved = codes + (middle - zeros)[:, index]
            if moved.min() < 0 or moved.max() > top:
                return None
            codes, zeros = moved.astype(np.uint8), np.full_like(zeros, middle)
        if zeros.min() < 0 or zeros.max() > top:
            return None
    with np.errstate(over="ignore"):
        return replace(
            tensor,
            codes=codes,
            scales=scales.astype(scale_dtype),
            biases=None if biases is None else biases.astype(scale_dtype),
            zeros=None if zeros is None else zeros.astype(np.uint8),
            bits=bits,
            group_size=group_size,
            grid=grid,
            superblocks=None,
        )


def lost(weight: Float32, stored: Float32) -> float:
    """Return ``‖stored - weight‖² / ‖weight‖²`` over all rows: 0 only where they are the same, infinity
    where that is no number."""
    return lost_in_pieces([(weight, stored)])


def lost_in_pieces(pieces: Iterable[tuple[Float32, NDArray[Any]]]) -> float:
    """Do as `lost` does with the rows of all pieces, each but the last of whole blocks of `ROWS`."""
    change = energy = 0.0
    same = True
    for weight, stored in pieces:
        same = same and np.array_equal(weight, stored)
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS].astype(np.float64)
            energy += float(np.square(rows).sum())
            rows -= stored[start : start + ROWS]
            change += float(np.square(rows).sum())
        del weight, stored  # before there is the next piece
    if same:
        return 0.0
    share = change / energy if energy > 0 else np.inf
    return share if np.isfinite(share) else np.inf


def is_rounding(tensor: QuantizedTensor, weight: Float32, stored: Float32) -> bool:
    """Tell whether a tensor's weights have moved by no more than what float16's rounding of scales costs.

    In all they may lose `ROUNDING` of their energy, and each weight may move by no more than `ROUNDOFF` of
    the two terms that it is the sum of: a scale that float16 holds badly, or not at all, is no rounding,
    however little its group counts.

    Parameters
    ----------
    tensor
        ``[out, in]``.
    weight, stored
        What it stands for, and what it is to be stored as.
    """
    steps, offsets = map(np.abs, tensor.grids())
    if tensor.grid != "affine":
        offsets *= steps
    index = tensor.group_index
    if index is None:
        index = np.arange(tensor.shape[1], dtype=np.int32) // np.int32(tensor.group_size)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        terms = steps[rows][:, index] * tensor.codes[rows] + offsets[rows][:, index]
        if not (np.abs(stored[rows] - weight[rows]) <= np.float32(ROUNDOFF) * terms).all():
            return False
    return lost(weight, stored) <= ROUNDING


def _zeros(scales: Float32, biases: Float32, bits: int) -> Float32:
    """Return the integer zeros that are nearest to what biases stand for, -1 where there are none."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zeros: Float32 = np.rint(-biases / scales)
    zeros[(scales == 0) & (biases == 0)] = 2 ** (bits - 1)  # any zero gives the same weights
    zeros[~np.isfinite(zeros)] = -1
    return zeros
