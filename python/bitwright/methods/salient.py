"""Salient-weight AWQ: symmetric 4 bits, with ranges chosen to protect the salient weights."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.arrays import require_finite
from bitwright.errors import check_choice
from bitwright.grids.tensor import Grid, QuantizedTensor
from bitwright.methods.gptq import factor_gram, quantize_gptq
from bitwright.methods.method import (
    ACTIVATION_METHODS,
    ActivationMethod,
    Method,
    MethodOptions,
    Solver,
    StageInputs,
)

Float32 = NDArray[np.float32]
BITS = 4


def compute_activation_stats(activations: ArrayLike, method: ActivationMethod = "rms") -> Float32:
    """Return the magnitude of each input channel.

    Parameters
    ----------
    activations
        ``[batch, length, in]`` or ``[tokens, in]``.
    method
        ``"mean"`` or ``"max"`` of the magnitudes, or their root mean square ``"rms"``.

    Returns
    -------
    NDArray
        ``[in]`` float32.

    Raises
    ------
    ValueError
        If there are no tokens, a value is NaN or infinite, or the method is unknown.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.compute_activation_stats([[[3.0, -1.0], [-4.0, 1.0]]], method="mean")
    array([3.5, 1. ], dtype=float32)
    """
    check_choice("method", method, ACTIVATION_METHODS)
    tokens = as_tokens(activations)
    if method == "rms":
        stats = np.sqrt(np.mean(np.square(tokens), axis=0))
    else:
        stats = getattr(np, method)(np.abs(tokens), axis=0)
    return np.asarray(stats, np.float32)


def find_salient_weights(
    weights: ArrayLike, stats: ArrayLike, salient_ratio: float = 0.01
) -> tuple[NDArray[np.bool_], Float32]:
    """Find the weights with the largest product of magnitude and input.

    Parameters
    ----------
    weights
        ``[in, out]``.
    stats
        ``[in]``, from `compute_activation_stats`.
    salient_ratio
        Share of the weights, from 0 to 1.

    Returns
    -------
    mask
        ``[in, out]`` bool.
    importance
        ``[in]`` float32, `stats` divided by its largest.

    Raises
    ------
    ValueError
        If shapes do not match, a value is NaN, infinite or negative, or the ratio is out of range.

    Examples
    --------
    >>> import bitwright
    >>> mask, importance = bitwright.find_salient_weights([[1.0, 2.0], [3.0, 1.0]], [4, 1], 0.25)
    >>> mask
    array([[False,  True],
           [False, False]])
    """
    matrix = as_matrix(weights)
    magnitudes = np.asarray(stats, np.float32)
    check_ratio(salient_ratio)
    if magnitudes.shape != matrix.shape[:1]:
        raise ValueError(
            f"stats: has shape {list(magnitudes.shape)}, weights have {len(matrix)} input channels"
        )
    require_finite(magnitudes, "stats")
    if (magnitudes < 0).any():
        raise ValueError("stats: magnitudes are never negative")
    largest = magnitudes.max()
    importance = magnitudes / largest if largest > 0 else magnitudes
    sizes = np.abs(matrix)
    largest = sizes.max()
    if largest > 0:
        sizes = sizes / largest
    product = importance[:, None] * sizes
    count = int(matrix.size * salient_ratio)
    if count == 0:
        return np.zeros(matrix.shape, np.bool_), importance
    return product >= np.partition(product.ravel(), -count)[-count], importance


def quantize_salient(
    weight: Float32,
    gram: Float32,
    mask: NDArray[np.bool_],
    group_size: int,
    scale_dtype: DTypeLike,
) -> QuantizedTensor:
    """Round ``[out, in]`` weights to a symmetric 4-bit grid, protecting those in the mask.

    GPTQ with ranges that are searched for, and with the full ones; of the two, each row takes what has the
    smaller ``δ G δᵀ + δₛ G δₛᵀ``, δ its change and δₛ that of its salient weights.
    """
    factor = factor_gram(gram)
    tensors = [
        quantize_gptq(
            weight,
            factor,
            BITS,
            group_size,
            grid="symmetric",
            scale_dtype=scale_dtype,
            grid_search=search,
        )
        for search in (True, False)
    ]
    errors = []
    for tensor in tensors:
        change = tensor.dequantize() - weight
        errors.append(
            _kernels.row_quadratic_forms(change, gram)
            + _kernels.row_quadratic_forms(change * mask, gram)
        )
    second = errors[1] < errors[0]
    return QuantizedTensor(
        codes=np.where(second[:, None], tensors[1].codes, tensors[0].codes),
        scales=np.where(second[:, None], tensors[1].scales, tensors[0].scales),
        biases=None,
        zeros=tensors[0].zeros,
        bits=BITS,
        group_size=group_size,
        grid="symmetric",
    )


def as_matrix(weights: ArrayLike) -> Float32:
    matrix = np.ascontiguousarray(weights, np.float32)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"weights: expected shape [in, out], got {list(matrix.shape)}")
    require_finite(matrix, "weights")
    return matrix


def as_tokens(activations: ArrayLike) -> Float32:
    array = np.asarray(activations)
    if array.dtype.kind not in "fiuV" or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"activations: expected floats [batch, length, in], got {array.dtype} of shape "
            f"{list(array.shape)}"
        )
    tokens = np.ascontiguousarray(array.reshape(-1, array.shape[-1]), np.float32)
    require_finite(tokens, "activations")
    return tokens


def check_ratio(salient_ratio: float) -> None:
    if not 0 <= salient_ratio <= 1:
        raise ValueError(f"salient_ratio: expected 0 to 1, got {salient_ratio}")


def _solver(inputs: StageInputs, options: MethodOptions) -> Solver:
    if inputs.gram is None:
        raise ValueError("method: salient needs calibration data or activations")
    gram = inputs.gram
    stats = np.sqrt(gram.diagonal()) if inputs.magnitudes is None else inputs.magnitudes

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        mask, _ = find_salient_weights(weight.T, stats, options.salient_ratio)
        tensor = quantize_salient(weight, gram, mask.T, size or weight.shape[1], dtype)
        # Where only affine grids are stored the same grid is written with its bias, which is exact: -8 s.
        return tensor if grid != "affine" else tensor.as_affine()

    return solve


METHODS = (
    Method(
        "salient",
        "AWQ of salient weights",
        _solver,
        needs_gram=True,
        whole_layers=True,
        uses_magnitudes=True,
        through_transformers=False,
        bits=BITS,
        grid="symmetric",
        copies=4,
    ),
)
