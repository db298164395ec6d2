"""A model's losses and gradients over a batch, with gradient checkpointing (Chen et al. 2016,
arXiv:1604.06174)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright import _kernels
from bitwright.models.block import Rotation
from bitwright.models.decoder import Decoder
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.operations import Float
from bitwright.models.tape import OnLinear, Tape

HEAD_BYTES = 2 << 20  # of logits that exist at one time,
HEAD_ROWS = 128  # but not those of fewer rows: the whole matrix is read for them


class Loss(Protocol):
    """Losses of some consecutive rows of a batch, and their gradients."""

    def __call__(self, first: int, logits: Float, gradient: Float | None) -> NDArray[np.float64]:
        """Return the losses of rows from `first` on, given their logits ``[rows, vocabulary]``; write the
        gradient of what is minimized into `gradient` unless it is None."""
        ...


def logit_rows(row_bytes: int, most_bytes: int) -> int:
    """Return how many positions, with so many bytes of logits each, have their logits in memory at once."""
    return max(HEAD_ROWS, most_bytes // row_bytes)


class Network:
    """A `Decoder` whose matrices come from elsewhere, and its gradients.

    Of the activations, the hidden states before attention and MLP of every block are kept, and everything
    in between is recomputed, one sub-block and some samples at a time.

    Parameters
    ----------
    model
        The source of sizes and of all other weights.
    weights
        Returns a layer's matrix by its full name and shape; the checkpoint's own by default.
    rows
        Returns the rows of embedding and head by their full names; by default those of `weights`, or the
        checkpoint's own.
    dtype
        float32, or float64 for finite differences.
    """

    def __init__(
        self,
        model: Decoder,
        weights: Callable[[str, tuple[int, ...]], Float] | None = None,
        dtype: DTypeLike = np.float32,
        *,
        rows: Callable[[str], MatrixRows] | None = None,
    ) -> None:
        self.model = model
        self.dtype = np.dtype(dtype)
        self._rows = rows or (model.rows if weights is None else self._rows_of_weight)
        self._weights = model.weight if weights is None else weights
        self._vectors: dict[str, Float] = {}

    def weight(self, name: str, shape: tuple[int, ...]) -> Float:
        """Return the matrix of layer `name`."""
        return self._weights(name, shape).astype(self.dtype, copy=False)

    def vector(self, name: str, shape: tuple[int, ...]) -> Float:
        """Return tensor `name`, which is read once."""
        if name not in self._vectors:
            self._vectors[name] = self.model.vector(name, shape).astype(self.dtype, copy=False)
        return self._vectors[name]

    def set_vector(self, name: str, array: Float) -> None:
        """Replace tensor `name`."""
        self._vectors[name] = array.astype(self.dtype, copy=False)

    def final_states(self, ids: NDArray[np.int32]) -> Float:
        """Return the input of the head, ``[samples * length, hidden_size]``."""
        hidden, rope = self._start(ids)
        for index in range(len(self.model.layouts)):
            self.model.block(index, self).forward(hidden, rope)
        return self.model.final_operations(self).norm(self.model.names.final_norm, hidden)

    def losses(self, ids: NDArray[np.int32], loss: Loss) -> NDArray[np.float64]:
        """Return the loss of every position ``[samples * length]`` of token ids ``[samples, length]``."""
        return self._head(self.final_states(ids), loss, None, None)

    def gradients(
        self,
        ids: NDArray[np.int32],
        loss: Loss,
        on_linear: OnLinear,
        *,
        on_embedding: Callable[[NDArray[np.int32], Float], None] | None = None,
        on_head: OnLinear | None = None,
        vector_gradients: Mapping[str, Float] | None = None,
    ) -> NDArray[np.float64]:
        """Return the losses as `losses` does, and pass the gradients of the weights to callbacks.

        Parameters
        ----------
        ids
            ``[samples, length]`` int32.
        loss
            What is minimized.
        on_linear
            See `Tape`; called with full names, for each linear several times, whose gradients add up.
        on_embedding
            Called with the ids ``[tokens]`` and the gradient of their rows ``[tokens, hidden_size]``.
        on_head
            As `on_linear`, for the head.
        vector_gradients
            See `Tape`; by full names.
        """
        hidden, rope = self._start(ids)
        vectors = vector_gradients or {}
        kept = [
            self.model.block(index, self).forward_kept(hidden, rope)
            for index in range(len(self.model.layouts))
        ]
        final = Tape(self.model.final_operations(self), on_linear, vectors)
        states = final.norm(self.model.names.final_norm, hidden)
        gradient = np.empty_like(states)
        losses = self._head(states, loss, gradient, on_head)
        gradient = final.backward(states, gradient, hidden)
        del final, states, hidden
        for index in reversed(range(len(self.model.layouts))):
            self._block_backward(index, kept.pop(), gradient, rope, on_linear, vectors)
        if on_embedding is not None:
            gradient *= np.float32(self.model.config.embedding_scale)
            on_embedding(ids.reshape(-1), gradient)
        return losses

    def logits(self, states: Float, head: MatrixRows) -> Iterator[tuple[int, Float]]:
        """Yield the logits of some rows of the final states at a time, and which row is their first."""
        step = logit_rows(states.itemsize * head.shape[0], HEAD_BYTES)
        for first in range(0, len(states), step):
            yield first, self.model.head_logits(states[first : first + step], head)

    def _rows_of_weight(self, name: str) -> MatrixRows:
        shape = self.model.table_shape
        matrix = self.weight(name, shape)
        return MatrixRows(lambda first, last: matrix[first:last], shape, name)

    def _start(self, ids: NDArray[np.int32]) -> tuple[Float, Rotation]:
        hidden = self.model.embed(ids, self._rows(self.model.embedding_name))
        rope = self.model.rotation(ids.shape[1], self.dtype)
        return hidden.astype(self.dtype, copy=False), rope

    def _block_backward(
        self,
        index: int,
        kept: tuple[Float, ...],
        gradient: Float,
        rope: Rotation,
        on_linear: OnLinear,
        vector_gradients: Mapping[str, Float],
    ) -> None:
        block, prefix = self.model.block(index, self), self.model.block_prefix(index)
        within = {
            name.removeprefix(prefix): array
            for name, array in vector_gradients.items()
            if name.startswith(prefix)
        }

        def in_block(name: str, inputs: Float, above: Float) -> None:
            on_linear(prefix + name, inputs, above)

        for stages, before in zip(reversed(block.sub_blocks), reversed(kept), strict=True):
            pieces = [rope.chunks(each, rope.tape_rows) for each in (before, gradient)]
            for rows, above in zip(*pieces, strict=True):
                block.backward(stages, rows, above, rope, in_block, within)

    def _head(
        self, states: Float, loss: Loss, gradient: Float | None, on_head: OnLinear | None
    ) -> NDArray[np.float64]:
        """Return the losses; write the gradient of the states, so that logits never exist all at once."""
        model, head = self.model, self._rows(self.model.head_name)
        losses = np.empty(len(states))
        for first, logits in self.logits(states, head):
            rows = slice(first, first + len(logits))
            above = None if gradient is None else np.empty_like(logits)
            losses[rows] = loss(first, logits, above)
            if gradient is None or above is None:
                del logits  # before there are the next
                continue
            if model.caps_logits:
                _kernels.cap_logits_backward(logits, *model.logit_cap, above)
            if on_head is not None:
                on_head(model.head_name, states[rows], above)
            head.backward(above, gradient[rows])
            del logits, above  # before the next ones are computed
        return losses
