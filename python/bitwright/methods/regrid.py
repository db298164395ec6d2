"""A quantized tensor on another grid, with exactly the same weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.tensor import Grid, QuantizedTensor

Float32 = NDArray[np.float32]


def regrid(
    tensor: QuantizedTensor,
    bits: int,
    group_size: int,
    grid: Grid,
    scale_dtypes: Sequence[np.dtype[Any]],
) -> QuantizedTensor | None:
    """Store a tensor's weights in another precision, exactly.

    More bits hold fewer, and small groups hold large ones. An integer zero is a bias of ``-scale * zero``
    and the other way round, if the dtype of scales has the number, and a symmetric grid holds any zero that
    leaves the codes in range.

    Parameters
    ----------
    tensor
        ``[out, in]``.
    bits, group_size, grid
        What it is to have.
    scale_dtypes
        What its scales may be stored in; the first that holds them is taken.

    Returns
    -------
    QuantizedTensor or None
        None where the weights would not be the same.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    >>> tensor = bitwright.quantize_rtn(weight, 4, 64, grid="zero_point", scale_dtype="float16")
    >>> found = regrid(tensor, 8, 32, "symmetric", [np.dtype("float16")])
    >>> bool((found.dequantize() == tensor.dequantize()).all())
    True
    """
    own = "k" if tensor.superblocks is not None else tensor.grid
    if (own, tensor.bits, tensor.group_size) == (grid, bits, group_size) and (
        own == "k" or tensor.scales.dtype in scale_dtypes
    ):
        return tensor
    reordered = tensor.group_index is not None and group_size != tensor.group_size
    if grid == "k" or bits < tensor.bits or tensor.group_size % group_size or reordered:
        return None
    repeats = tensor.group_size // group_size
    scales, offsets = (np.repeat(each, repeats, axis=1) for each in tensor.grids())
    codes, zeros, biases = tensor.codes, None, None
    if grid == "affine":
        biases = offsets if tensor.grid == "affine" else -scales * offsets
    else:
        zeros = _zeros(scales, offsets) if tensor.grid == "affine" else offsets
        if zeros is None:
            return None
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
    for dtype in scale_dtypes:
        with np.errstate(over="ignore"):
            stored = scales.astype(dtype)
            offset = None if biases is None else biases.astype(dtype)
        found = replace(
            tensor,
            codes=codes,
            scales=stored,
            biases=offset,
            zeros=None if zeros is None else zeros.astype(np.uint8),
            bits=bits,
            group_size=group_size,
            grid=grid,
            superblocks=None,
        )
        if np.array_equal(found.dequantize(), tensor.dequantize()):
            return found
    return None


def _zeros(scales: Float32, biases: Float32) -> Float32 | None:
    """Return the integer zeros that biases stand for, None if they do not."""
    if (scales == 0).any():
        return None
    zeros: Float32 = np.rint(-biases / scales)
    return zeros if np.array_equal(zeros * scales, -biases) else None
