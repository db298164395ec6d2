"""A decoder as a whole: embedding, blocks, last norm and head, over weights from anywhere."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.arrays import require_finite
from bitwright.errors import UnsupportedModelError
from bitwright.models.architecture import Architecture, Names
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.config import LayerType, ModelConfig, RopeConfig
from bitwright.models.layout import BlockLayout
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.operations import BlockWeights, Float, Float32, Operations
from bitwright.models.rope import query_scale, rope_tables


class WeightSource(Protocol):
    """Where the arrays of a model come from, by full name; a `Model` is one."""

    def weight(self, name: str, shape: tuple[int, ...]) -> Float:
        """Return the matrix of layer `name`."""
        ...

    def vector(self, name: str, shape: tuple[int, ...]) -> Float:
        """Return tensor `name`."""
        ...


class Decoder(WeightSource):
    """The computation of a decoder; a subclass says where its weights come from.

    Parameters
    ----------
    config
        Its sizes.
    architecture
        Its family.
    folder
        Its path or name, for messages.

    Attributes
    ----------
    names
        Names of its tensors outside the blocks.
    embedding_name, head_name
        The layers with these matrices; one and the same where they are tied.
    layouts
        Of its blocks.
    """

    embedding_name: str
    head_name: str
    layouts: tuple[BlockLayout, ...]

    def __init__(self, config: ModelConfig, architecture: Architecture, folder: Path) -> None:
        self.config = config
        self.architecture = architecture
        self.folder = folder
        self.names: Names = architecture.names[0]

    @abstractmethod
    def rows(self, name: str) -> MatrixRows:
        """Return the embedding or the head, by its name, as rows that are read when they are needed."""

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.embedding_name == self.head_name

    @property
    def table_shape(self) -> tuple[int, int]:
        """``(vocabulary, hidden_size)`` of embedding and head."""
        return self.config.vocab_size, self.config.hidden_size

    @property
    def positions(self) -> int:
        """How many positions the model was trained on, or reaches with its RoPE scaling."""
        declared, rope = self.config.max_position_embeddings, self.config.rope
        scaled = int(rope.factor * (rope.original_max_position_embeddings or declared))
        return max(declared, scaled)

    @property
    def nested(self) -> bool:
        """Whether the language model is part of a multimodal model."""
        return "language_model." in self.names.block

    def block_prefix(self, index: int) -> str:
        """Return the start of the names of block `index`'s tensors."""
        return self.names.block.format(index) + "."

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return ``(out, in)`` of every linear in the blocks, by full name without ``.weight``."""
        return {
            self.block_prefix(index) + name: shape
            for index, layout in enumerate(self.layouts)
            for name, shape in layout.linears.items()
        }

    def input_channels(self) -> set[int]:
        """Return the numbers of input channels of the linears."""
        return {channels for _, channels in self.linear_shapes().values()}

    def block(self, index: int, source: "WeightSource | None" = None) -> DecoderBlock:
        """Return block `index`; its weights are read from the checkpoint, or another source, as they are
        needed."""
        prefix, layout = self.block_prefix(index), self.layouts[index]
        known = self if source is None else source

        def read(name: str) -> Float:
            if name in layout.vectors:
                return known.vector(prefix + name, layout.vectors[name])
            linear = name.removesuffix(".weight")
            shape = layout.linears.get(linear) or layout.floats[linear]
            return known.weight(prefix + linear, shape)

        weights = BlockWeights(read, {})
        return DecoderBlock(weights, layout, self.architecture, self.config.at(index), index)

    def embed(
        self, ids: NDArray[np.int32], matrix: NDArray[Any] | MatrixRows | None = None
    ) -> Float:
        """Return the first hidden states ``[tokens, hidden_size]`` of token ids of any shape."""
        table = self.rows(self.embedding_name) if matrix is None else matrix
        flat = ids.reshape(-1)
        rows: Float = table.gather(flat) if isinstance(table, MatrixRows) else table[flat]
        if rows.dtype != np.float64:
            rows = rows.astype(np.float32, copy=False)
        require_finite(rows, f"{self.folder}: {self.embedding_name} of these tokens")
        if self.config.embedding_scale != 1:
            with np.errstate(over="ignore"):  # whoever uses the states looks at them
                rows *= np.float32(self.config.embedding_scale)
        return rows

    @property
    def logit_cap(self) -> tuple[float, float]:
        """The divisor of the logits, and the soft cap applied after it (0: none)."""
        return self.config.logits_divisor, self.config.final_softcap or 0.0

    @property
    def caps_logits(self) -> bool:
        """Whether the logits are scaled or capped after the head."""
        return self.logit_cap != (1, 0)

    def head_logits(self, states: Float, head: MatrixRows) -> Float:
        """Return the logits ``[tokens, vocabulary]`` of states after the last norm."""
        logits = head.outputs(states)
        for name, extent in self._head_vectors().items():
            logits += self.vector(name, extent)
        if self.caps_logits:
            _kernels.cap_logits(logits, *self.logit_cap)
        return logits

    def final_norm(self, hidden: Float) -> Float:
        """Return `hidden` after the last norm."""
        return self.final_operations().norm(self.names.final_norm, hidden)

    def final_operations(self, source: "WeightSource | None" = None) -> Operations:
        """Return the operations after the last block, that is, its norm."""
        known, shapes = self if source is None else source, self._final_vectors()
        weights = BlockWeights(lambda name: known.vector(name, shapes[name]), {})
        return Operations(weights, shapes, self.architecture.norm_kind, self.config.norm_eps)

    def rotation(self, length: int, dtype: DTypeLike = np.float32) -> Rotation:
        """Return the rotary tables for samples of `length` tokens."""
        config = self.config
        if config.latent is not None and 0 < config.latent.chosen_tokens < length:
            raise UnsupportedModelError(
                f"{self.folder}: samples of {length} tokens, but beyond {config.latent.chosen_tokens} "
                f'("index_topk") {config.model_type} attends to chosen tokens only, which is not computed; '
                f"take shorter samples"
            )
        ropes: dict[LayerType, RopeConfig] = {
            "full_attention": config.rope,
            "sliding_attention": config.sliding_rope,
        }
        tables = {
            kind: rope_tables(
                rope, rope.rotary_dim or config.rotary_dim, length, config.max_position_embeddings
            )
            for kind, rope in ropes.items()
        }
        return Rotation(
            length,
            {
                kind: (cosines.astype(dtype, copy=False), sines.astype(dtype, copy=False))
                for kind, (cosines, sines) in tables.items()
            },
            query_scale(config.rope, length, dtype),
        )

    def check_ids(self, input_ids: ArrayLike) -> NDArray[np.int32]:
        """Return token ids as ``[batch, length]`` int32, or raise ValueError or TypeError."""
        ids = np.asarray(input_ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"input_ids: expected integers, got {ids.dtype}")
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"input_ids: expected shape [batch, length], got {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"input_ids: from {ids.min()} to {ids.max()}, but the model's vocabulary has "
                f"{self.config.vocab_size} entries"
            )
        return np.ascontiguousarray(ids, np.int32)

    def hidden_states(self, input_ids: ArrayLike) -> Iterator[Float32]:
        """Yield the hidden states ``[batch, length, hidden_size]`` float32.

        First the embeddings, then the states after each block, last those after the final norm.
        All but the last are views of one buffer: copy what is to be kept beyond the next step.
        """
        ids = self.check_ids(input_ids)
        hidden = self.embed(ids)
        shape = (*ids.shape, self.config.hidden_size)
        yield hidden.reshape(shape)
        rope = self.rotation(ids.shape[1])
        for index in range(self.config.num_hidden_layers):
            self.block(index).forward(hidden, rope)
            if index + 1 < self.config.num_hidden_layers:
                yield hidden.reshape(shape)
        yield self.final_norm(hidden).reshape(shape)

    def logits(self, input_ids: ArrayLike) -> Float32:
        """Return the logits of every position.

        Parameters
        ----------
        input_ids
            ``[batch, length]`` integers, token ids.

        Returns
        -------
        NDArray
            ``[batch, length, vocabulary]`` float32.

        Raises
        ------
        TypeError, ValueError
            If `input_ids` is not such an array or an id is not in the vocabulary.
        CheckpointError
            If a tensor is absent, damaged or of the wrong shape.
        NonFiniteError
            If a weight or a logit is NaN or infinite.

        Examples
        --------
        >>> import bitwright
        >>> model = bitwright.load_model(bitwright.demo_folder())
        >>> model.logits([[1, 2, 3]]).shape
        (1, 3, 512)
        """
        *_, hidden = self.hidden_states(input_ids)
        logits = self.head_logits(hidden.reshape(-1, hidden.shape[-1]), self.rows(self.head_name))
        require_finite(logits, f"{self.folder}: logits of these tokens")
        return logits.reshape(*hidden.shape[:2], -1)

    def _final_vectors(self) -> dict[str, tuple[int]]:
        parts = ("weight", "bias") if self.architecture.norm_kind == "layer_norm" else ("weight",)
        return {f"{self.names.final_norm}.{part}": (self.config.hidden_size,) for part in parts}

    def _head_vectors(self) -> dict[str, tuple[int]]:
        """Return the bias of the head, if it has one."""
        bias = f"{self.names.head}.bias"
        return {bias: (self.config.vocab_size,)} if self.architecture.rules.head_bias else {}
