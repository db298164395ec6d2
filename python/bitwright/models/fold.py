"""Folding a scale of a linear's input channels into the norm or linear that computes them."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import check_choice

Float32 = NDArray[np.float32]
FoldKind = Literal["linear", "layer_norm", "biasless_layer_norm", "rms_norm", "offset_rms_norm"]
FOLD_KINDS: tuple[FoldKind, ...] = (
    "linear",
    "layer_norm",
    "biasless_layer_norm",
    "rms_norm",
    "offset_rms_norm",
)


def fold_scale(
    kind: FoldKind,
    scale: Float32,
    weight: Float32,
    bias: Float32 | None = None,
    dtype: np.dtype[Any] | type[Any] = np.float32,
) -> tuple[Float32, Float32 | None, Float32]:
    """Divide the outputs of a norm or linear by a scale per channel.

    The linears that read these outputs are to be multiplied by the scale that is returned, column by
    column; the function computed then stays the same.

    Parameters
    ----------
    kind
        ``"linear"`` (y = Wx + b), ``"layer_norm"`` (y = g·x̂ + b), ``"biasless_layer_norm"`` and
        ``"rms_norm"`` (y = g·x̂) or ``"offset_rms_norm"`` (y = (1 + g)·x̂, Gemma's).
    scale
        ``[channels]`` float32, above zero.
    weight, bias
        Of the norm ``[channels]``, or of the linear ``[channels, in]`` and ``[channels]``; float32.
    dtype
        What weight and bias are stored in; the results are rounded to it.

    Returns
    -------
    weight, bias
        The new ones, float32.
    scale
        ``[channels]``, to multiply the columns of the following linears by. A norm's gain is rounded
        when it is stored; this is the quotient after rounding, so that the folded model computes what
        the original does, to float32's precision. For a linear, or where there is a bias,
        it is `scale` itself.

    Raises
    ------
    ValueError
        If `kind` is unknown, shapes do not match, or a scale is not above zero.

    Examples
    --------
    >>> import numpy as np
    >>> from bitwright import fold_scale
    >>> gain, scale = np.array([2, 3], np.float32), np.array([4, 0.5], np.float32)
    >>> fold_scale("rms_norm", scale, gain)[0]
    array([0.5, 6. ], dtype=float32)
    """
    check_choice("kind", kind, FOLD_KINDS)
    if weight.ndim != (2 if kind == "linear" else 1) or scale.shape != weight.shape[:1]:
        raise ValueError(
            f"scale: of shape {list(scale.shape)} for a {kind} weight of {list(weight.shape)}"
        )
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("scale: expected finite values above zero")

    def stored(array: Float32) -> Float32:
        return array.astype(dtype, copy=False).astype(np.float32, copy=False)

    # All of them are y = A x̂ + b with the channels as rows of A, and y / s = (A / s) x̂ + b / s. Gemma's
    # A = 1 + g becomes 1 + g′ = (1 + g) / s, hence g′ = (1 + g) / s − 1.
    if kind == "linear":
        return (
            stored(weight / scale[:, None]),
            None if bias is None else stored(bias / scale),
            scale,
        )

    offset = np.float32(1 if kind == "offset_rms_norm" else 0)
    folded = stored((weight + offset) / scale - offset)
    if bias is not None:
        return folded, stored(bias / scale), scale
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact = (weight + offset) / (folded + offset)
    # A gain of zero stays zero, whatever it is divided by.
    usable = np.isfinite(exact) & (exact > 0)
    return folded, None, np.where(usable, exact, scale).astype(np.float32)
