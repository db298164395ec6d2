"""Second moments of a layer's inputs: the Gram matrix and mean magnitudes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.arrays import floats
from bitwright.products import add_gram
from bitwright.ranks import Sum, current


def gram(
    activations: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return ``XᵀX / tokens``, the second moments of a layer's inputs.

    The Hessian in GPTQ (arXiv:2210.17323, eq. 2) is twice the sum ``XᵀX``. Only half of the
    products are computed (a symmetric rank update).

    Parameters
    ----------
    activations
        ``[tokens, in]`` or ``[batch, length, in]`` float32, C-contiguous: used in place. Tensors of
        PyTorch are, too, by DLPack; float64, halves and other layouts are copied to float32.
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
    activations = floats(activations, rows=True)
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
    """Second moments of one layer's inputs, gathered chunk by chunk of tokens, by all ranks.

    Parameters
    ----------
    channels
        Number of input channels of the layer.
    magnitudes
        Gather the mean magnitude of each channel too.
    """

    def __init__(self, channels: int, magnitudes: bool = False) -> None:
        self.channels = channels
        self.tokens = 0
        self.first_tokens = 0
        self._first: Sum | None = None
        self._rest = Sum((channels, channels))  # lower triangle only
        self._magnitudes = Sum((channels,), np.float64) if magnitudes else None

    def add(self, activations: NDArray[np.float32], leaf: int = 0) -> None:
        """Add the activations ``[tokens, channels]`` float32 of a chunk; see `Sum` for the leaf."""
        add_gram(activations, self._rest.place(leaf))
        if self._magnitudes is not None:
            self._magnitudes.place(leaf)[...] += np.abs(activations).sum(axis=0)
        self.tokens += len(activations)

    def end_first_part(self) -> None:
        """Let `gather` return the gram of what was added until now, too."""
        self._rest.join()
        self._first, self._rest = self._rest, Sum((self.channels, self.channels))
        self.first_tokens = self.tokens

    def gather(self) -> "Moments":
        """Sum over all ranks, and return the moments; all ranks call this together."""
        ranks = current()
        self.tokens = round(ranks.total([self.tokens]))
        self.first_tokens = round(ranks.total([self.first_tokens]))
        first = None
        if self._first is None:
            total = self._rest.total()
        elif self.first_tokens == self.tokens:
            total = first = self._first.total()
        else:
            first, total = self._first.total(), self._rest.total()
            total += first
        magnitudes = None if self._magnitudes is None else self._magnitudes.total()
        self._first, self._rest = None, Sum((0, 0))
        if first is not None and first is not total:
            _finish(first, self.first_tokens)
        _finish(total, self.tokens)
        return Moments(
            total,
            first,
            None if magnitudes is None else magnitudes / max(self.tokens, 1),
            self.tokens,
        )


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments that `LayerStatistics` has gathered.

    Parameters
    ----------
    gram
        ``XᵀX / tokens`` ``[channels, channels]`` float32.
    first_gram
        The same of the first part of the tokens, where one was ended; the very same array if that were all.
    mean_abs
        ``mean|x|`` ``[channels]`` float64, if it was asked for.
    tokens
        How many there were.
    """

    gram: NDArray[np.float32]
    first_gram: NDArray[np.float32] | None
    mean_abs: NDArray[np.float64] | None
    tokens: int

    def is_finite(self) -> bool:
        """Tell whether every activation was finite: a square is never negative, so NaN and infinity stay on
        the diagonal."""
        return bool(np.isfinite(self.gram.diagonal()).all())


def _finish(gram: NDArray[np.float32], tokens: int) -> None:
    _kernels.mirror_lower(gram)
    gram /= max(tokens, 1)
