"""Round-to-nearest."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.methods.grid import GridChoice, check_importance
from bitwright.methods.k_grid import expanded, fit_superblocks
from bitwright.statistics import require_finite
from bitwright.tensor import Grid, QuantizedTensor


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
        are quantized as well; its group size is None, and its scales are products in float32.
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
    choice = GridChoice.check(weight, bits, group_size, grid, scale_dtype, grid_search)
    require_finite(weight, "weight")
    weights = check_importance(importance, weight.shape[1])
    codes, scales, offsets = _kernels.quantize_rtn(
        weight,
        weights,
        choice.bits,
        choice.group_size,
        choice.base,
        choice.scale_dtype.name,
        choice.search,
    )
    if grid != "k":
        return QuantizedTensor(**choice.fields(codes, scales, offsets))
    # Groups of zeros have a scale of their own choice, which must not count in that of the superblock.
    live = (weight != 0) & (weights != 0)
    empty = ~live.reshape(*scales.shape, -1).any(axis=2)
    scales[empty] = 0
    offsets[empty] = 0
    blocks = fit_superblocks(scales, offsets, weights, bits)
    scales, offsets = expanded(blocks, bits)
    rounded = np.ascontiguousarray(weight, np.float32)
    codes = _kernels.encode(rounded, scales, offsets, bits, choice.group_size, choice.base)
    return QuantizedTensor(**choice.fields(codes, scales, offsets), superblocks=blocks)
