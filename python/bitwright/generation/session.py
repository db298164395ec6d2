"""A model in memory that reads tokens one after the other, and says what comes next."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from bitwright import _kernels
from bitwright.errors import BitwrightError
from bitwright.generation.cache import BlockCache, CachedOperations
from bitwright.generation.matrices import StoredMatrix, require_finite_logits, stored_matrix
from bitwright.loading.model import Model
from bitwright.models.block import ChunkStates, DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.operations import Float32

PIECE = 256  # tokens of a prompt that are read at once
Mark = tuple[int, list[Any]]


class ContextError(BitwrightError, ValueError):
    """A text is longer than the model knows positions."""


class Session:
    """A model in memory, its weights as they are stored, and the cache of what it has read.

    Parameters
    ----------
    model
        An open model. Any that can be evaluated: states of recurrences are kept as keys and values are.

    Attributes
    ----------
    ids
        What has been read.
    limit
        How many tokens it can read.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ids: list[int] = []
        config = model.config
        ropes = (config.rope, config.sliding_rope)
        self.limit = model.positions
        if any(rope.rope_type == "dynamic" for rope in ropes):
            self.limit = config.max_position_embeddings
        # Beyond these lengths longrope turns by other factors, from the first token on.
        self._turns = sorted(
            rope.original_max_position_embeddings or config.max_position_embeddings
            for rope in ropes
            if rope.rope_type == "longrope"
        )
        self._rope: Rotation | None = None
        matrices = self._read_matrices()
        self._embedding, self._head = (
            matrices[each] for each in (model.embedding_name, model.head_name)
        )
        self._caches: list[BlockCache] = []
        self._blocks: list[DecoderBlock] = []
        for index, layout in enumerate(model.layouts):
            prefix = model.block_prefix(index)
            own = {name: matrices[prefix + name] for name in (*layout.linears, *layout.floats)}
            block = copy(model.block(index))
            self._caches.append(BlockCache())
            known = block.operations
            block.operations = CachedOperations(
                known.weights,
                known.vectors,
                known.norm_kind,
                known.epsilon,
                own,
                self._caches[-1],
            )
            self._blocks.append(block)
        self._final = model.final_operations()

    def read(self, ids: Sequence[int]) -> Float32:
        """Read more tokens; return their states before the head ``[tokens, hidden_size]``.

        Raises
        ------
        ContextError
            If there are more than the model knows positions.
        """
        total, new = len(self.ids) + len(ids), list(ids)
        if total > self.limit:
            raise ContextError(
                f"{self.model.checkpoint.folder}: {total} tokens are more than the {self.limit} that the "
                f"model knows positions for; shorten the prompt or ask for fewer tokens"
            )
        if any(len(self.ids) <= turn < total for turn in self._turns) and self.ids:
            new = self.ids + new
            self.cut(0)
        states = [
            self._pass(new[first : first + PIECE], total) for first in range(0, len(new), PIECE)
        ]
        return np.concatenate(states)[-len(ids) :]

    def logits(self, states: Float32) -> Float32:
        """Return the logits ``[tokens, vocabulary]`` of states that `read` returned."""
        logits = np.empty((len(states), self._head.shape[0]), np.float32)
        self._head.product(states, None, logits)
        if self.model.caps_logits:
            _kernels.cap_logits(logits, *self.model.logit_cap)
        require_finite_logits(logits, self.model)
        return logits

    def next_logits(self, ids: Sequence[int]) -> Float32:
        """Read more tokens; return the logits ``[vocabulary]`` of what follows them."""
        following: Float32 = self.logits(self.read(ids)[-1:])[0]
        return following

    def goes_on_to(self, ids: Sequence[int]) -> Float32:
        """Make `ids` what has been read; return the logits of what follows.

        What is known of their beginning is not computed again."""
        same = 0
        for mine, given in zip(self.ids, ids[:-1], strict=False):
            if mine != given:
                break
            same += 1
        self.cut(same)
        return self.next_logits(ids[len(self.ids) :])

    def cut(self, length: int) -> None:
        """Forget all but the first so many tokens; where a recurrence cannot go back, forget all."""
        if length == len(self.ids):
            return
        turned = any(length <= turn < len(self.ids) for turn in self._turns)
        if length == 0 or turned or any(cache.is_recurrent for cache in self._caches):
            length, self._rope = 0, None
            for cache in self._caches:
                cache.forget()
        del self.ids[length:]
        for cache in self._caches:
            cache.cut(length)

    def mark(self) -> Mark:
        """Return what `back` takes."""
        return len(self.ids), [cache.mark() for cache in self._caches]

    def back(self, mark: Mark) -> None:
        """Forget what was read since a mark."""
        del self.ids[mark[0] :]
        for cache, state in zip(self._caches, mark[1], strict=True):
            cache.back(state)

    def _pass(self, ids: list[int], total: int) -> Float32:
        first = len(self.ids)
        hidden = self._embedding.rows(np.array(ids, np.int32))
        if self.model.config.embedding_scale != 1:
            hidden *= np.float32(self.model.config.embedding_scale)
        rope = self._rotation(first, len(ids), total)
        skips = self.model.architecture.layer_scale is None  # which follows the last stage
        for block in self._blocks:
            chunk = ChunkStates(hidden)
            for stage in block.stages:
                if skips and self._is_idle(stage, chunk):
                    continue
                block.advance(stage, block.stage_input(stage, chunk), chunk, rope)
        self.ids += ids
        return self._final.norm(self.model.names.final_norm, hidden)

    @staticmethod
    def _is_idle(stage: Stage, chunk: ChunkStates) -> bool:
        """Tell whether a stage is that of an expert that no token goes to."""
        if stage.kind not in ("expert", "expert_output") or stage.expert is None:
            return False
        return chunk.routes is not None and not chunk.routes.rows[stage.expert].size

    def _rotation(self, first: int, count: int, total: int) -> Rotation:
        """Return the rotary tables of some positions."""
        known = self._rope
        crossed = [turn for turn in self._turns if known and known.length <= turn < total]
        if known is None or known.length < total or crossed:
            room = max(total, min(2 * total, self.limit))
            room = min([room, *(turn for turn in self._turns if turn >= total)])
            known = self._rope = self.model.rotation(room)
        rows = slice(first, first + count)
        tables = {kind: (cos[rows], sin[rows]) for kind, (cos, sin) in known.tables.items()}
        scale = known.query_scale
        return Rotation(count, tables, None if scale is None else scale[rows])

    def _read_matrices(self) -> dict[str, StoredMatrix]:
        """Read all matrices, the largest first, while there is room beside them for its codes."""
        model = self.model
        shapes = dict(model.linear_shapes())
        for index, layout in enumerate(model.layouts):
            shapes |= {
                model.block_prefix(index) + name: each for name, each in layout.floats.items()
            }
        table = model.table_shape
        shapes |= {model.embedding_name: table, model.head_name: table}
        order = sorted(shapes, key=lambda name: -shapes[name][0] * shapes[name][1])
        packed = model.quantized_layers()
        return {name: stored_matrix(model, name, shapes[name], name in packed) for name in order}
