"""What a method needs to know of a layer's inputs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.errors import NonFiniteError


def gram(
    activations: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return ``XᵀX / tokens``, the second moments of a layer's inputs.

    The Hessian of the GPTQ paper (Frantar et al. 2023, eq. 3) is this up to a factor. Only half of the
    products are computed (a symmetric rank update).

    Parameters
    ----------
    activations
        ``[tokens, in]`` float32, C-contiguous; used in place, never copied.
    out
        ``[in, in]`` float32, C-contiguous, that receives the result; a new array by default.

    Returns
    -------
    NDArray
        ``[in, in]`` float32, symmetric; `out` if it was given.

    Raises
    ------
    TypeError, ValueError
        If an array has another dtype or layout (the error names it), or there are no tokens.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> bitwright.gram(np.array([[1, 2], [3, 4]], np.float32))
    array([[ 5.,  7.],
           [ 7., 10.]], dtype=float32)
    """
    if np.ndim(activations) == 2 and len(activations) == 0:
        raise ValueError("activations: there are no tokens")
    if out is None:
        out = np.zeros((np.shape(activations)[-1],) * 2, np.float32)
    elif isinstance(out, np.ndarray) and out.flags.writeable:
        out.fill(0)
    _kernels.accumulate_gram(activations, out)
    _kernels.mirror_lower(out)
    out /= len(activations)
    return out


class LayerStatistics:
    """Second moments of one layer's inputs, gathered chunk by chunk of tokens.

    Parameters
    ----------
    channels
        Number of input channels of the layer.
    magnitudes
        Gather the mean magnitude of each channel too.
    """

    def __init__(self, channels: int, magnitudes: bool = False) -> None:
        self.tokens = 0
        self._sum = np.zeros((channels, channels), np.float32)  # lower triangle only
        self._magnitudes = np.zeros(channels) if magnitudes else None

    def add(self, activations: NDArray[np.float32]) -> None:
        """Add the activations ``[tokens, channels]`` float32 of a chunk."""
        _kernels.accumulate_gram(activations, self._sum)
        if self._magnitudes is not None:
            self._magnitudes += np.abs(activations).sum(axis=0)
        self.tokens += len(activations)

    def mean_abs(self) -> NDArray[np.float64]:
        """Return ``mean|x|`` ``[channels]``; ValueError if it was not gathered."""
        if self._magnitudes is None:
            raise ValueError("magnitudes: were not gathered")
        return self._magnitudes / max(self.tokens, 1)

    def is_finite(self) -> bool:
        """Tell whether every activation so far was finite: a square is never negative, so NaN and
        infinity stay on the diagonal."""
        return bool(np.isfinite(self._sum.diagonal()).all())

    def so_far(self) -> NDArray[np.float32]:
        """Return ``XᵀX / tokens`` of what was added until now, in an array of its own."""
        total = self._sum / np.float32(max(self.tokens, 1))
        _kernels.mirror_lower(total)
        return total

    def gram(self) -> NDArray[np.float32]:
        """Return ``XᵀX / tokens`` ``[channels, channels]``; the sums are handed over, not copied."""
        total, self._sum = self._sum, np.zeros((0, 0), np.float32)
        _kernels.mirror_lower(total)
        total /= max(self.tokens, 1)
        return total


def require_finite(array: NDArray[Any], name: str) -> None:
    """Raise NonFiniteError, naming `name` and the first bad position, unless all values are finite."""
    # A sum is NaN or infinite if a term is, and takes a fraction of the time; it may overflow, though.
    with np.errstate(all="ignore"):
        if array.dtype == np.float32 and np.isfinite(array.sum()):
            return
    finite = np.isfinite(array)
    if finite.all():
        return
    position = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise NonFiniteError(
        f"{name}: value {float(array[position])} at {list(position)}, "
        f"{int(finite.size - finite.sum())} of {finite.size} values are NaN or infinite"
    )
