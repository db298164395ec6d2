"""Round-to-nearest."""

from typing import Any

from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.methods.grid import GridChoice, check_importance
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
        ``"affine"`` (as MLX fits it), ``"zero_point"`` or ``"symmetric"``.
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
    codes, scales, offsets = _kernels.quantize_rtn(
        weight,
        check_importance(importance, weight.shape[1]),
        choice.bits,
        choice.group_size,
        choice.grid,
        choice.scale_dtype.name,
        choice.search,
    )
    return QuantizedTensor(**choice.fields(codes, scales, offsets))
