"""Embeddings and heads, read row by row when needed: neither is ever whole in float32."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.arrays import require_finite
from bitwright.models.operations import Float, Float32

PIECE_BYTES = 16 << 20  # of rows in float32 that exist at one time
SOLVED_ROWS = 256  # whole tiles of products: pieces of so many rows have the bits of the whole


class MatrixRows:
    """A matrix ``[vocabulary, hidden_size]`` with only some of its rows in memory at a time.

    Parameters
    ----------
    read
        Returns rows [first, last) in float32, or in the 16 bits that they are stored in.
    shape
        ``(vocabulary, hidden_size)``.
    name
        Of the matrix, for messages.
    """

    def __init__(
        self, read: Callable[[int, int], NDArray[Any]], shape: tuple[int, int], name: str
    ) -> None:
        self.shape = shape
        self.name = name
        self._read = read
        self._finite: set[int] = set()  # the first rows of pieces that hold nothing else

    def pieces(self, dtype: np.dtype[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield all rows, some at a time, for products with states of a dtype; NonFiniteError if a value is
        NaN or infinite."""
        for rows in self._ranges():
            piece = self._read(rows.start, rows.stop)
            if rows.start not in self._finite:
                require_finite(piece, f"{self.name}, rows from {rows.start} on")
                self._finite.add(rows.start)
            yield rows, piece.astype(dtype, copy=False) if dtype == np.float64 else piece
            del piece  # before the next one is read

    def floats(self, rows: slice) -> Float32:
        """Return some rows in float32; NonFiniteError if a value is NaN or infinite."""
        piece = self._read(rows.start, rows.stop).astype(np.float32, copy=False)
        require_finite(piece, f"{self.name}, rows from {rows.start} on")
        return piece

    def gather(self, ids: NDArray[np.int32]) -> NDArray[Any]:
        """Return the rows ``[tokens, hidden_size]`` of token ids ``[tokens]``, as they are read."""
        found: NDArray[Any] | None = None
        for rows in self._ranges():
            here = (ids >= rows.start) & (ids < rows.stop)
            if not here.any():
                continue
            piece = self._read(rows.start, rows.stop)
            if found is None:
                found = np.empty((len(ids), self.shape[1]), piece.dtype)
            found[here] = piece[ids[here] - rows.start]
        return np.empty((0, self.shape[1]), np.float32) if found is None else found

    def outputs(self, states: Float) -> Float:
        """Return the product with states ``[tokens, hidden_size]``, ``[tokens, vocabulary]``."""
        outputs = np.empty((len(states), self.shape[0]), states.dtype)
        for rows, piece in self.pieces(states.dtype):
            whole = rows.stop - rows.start == self.shape[0]
            part = outputs if whole else np.empty((len(states), len(piece)), states.dtype)
            _kernels.linear(states, piece, None, part, False)
            if not whole:
                outputs[:, rows] = part
            del piece, part
        return outputs

    def backward(self, above: Float, gradient: Float) -> None:
        """Write the gradient of the states, given that of the outputs ``[tokens, vocabulary]``."""
        for rows, piece in self.pieces(above.dtype):
            part = np.ascontiguousarray(above[:, rows])
            _kernels.linear_backward_input(part, piece, gradient, rows.start > 0)
            del piece, part

    def _ranges(self) -> Iterator[slice]:
        count, width = self.shape
        step = piece_rows(width)
        for first in range(0, count, step):
            yield slice(first, min(first + step, count))


def piece_rows(width: int) -> int:
    """Return how many rows of so many float32 values are read at a time."""
    return max(1, PIECE_BYTES // (4 * width))


def solved_rows(width: int) -> int:
    """Return how many rows of so many values are quantized at a time."""
    return max(1, piece_rows(width) // SOLVED_ROWS) * SOLVED_ROWS
