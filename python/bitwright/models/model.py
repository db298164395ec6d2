"""A checkpoint as a model: streamed, one decoder block in memory at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _kernels
from bitwright.checkpoint import Checkpoint, ModelConfig
from bitwright.errors import CheckpointError
from bitwright.formats import detect_format
from bitwright.models import ARCHITECTURES
from bitwright.models.block import DecoderBlock, Float32, Rotation
from bitwright.models.rope import rope_tables
from bitwright.statistics import require_finite
from bitwright.tensor import QuantizedTensor


class Model:
    """A decoder over a checkpoint folder, quantized or not; weights are read as they are needed.

    Parameters
    ----------
    checkpoint
        An open checkpoint.

    Raises
    ------
    CheckpointError
        If the config contradicts the tensors, or asks for what is not supported.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        source = checkpoint.folder / "config.json"
        self.config = ModelConfig.from_dict(checkpoint.config, source, ARCHITECTURES.keys())
        self.architecture = ARCHITECTURES[self.config.model_type]
        self.format = detect_format(checkpoint)
        self.embedding_name, self.head_name = self._embedding_and_head()

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.embedding_name == self.head_name

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that config.json declares, or else that of the embedding."""
        return self.config.dtype or self.checkpoint.dtype(f"{self.embedding_name}.weight")

    def block_prefix(self, index: int) -> str:
        """Return the start of the names of block `index`'s tensors."""
        return self.architecture.block.format(index) + "."

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return ``(out, in)`` of every linear in the blocks, by full name without ``.weight``."""
        shapes = self.architecture.linear_shapes(self.config)
        return {
            self.block_prefix(index) + name: shape
            for index in range(self.config.num_hidden_layers)
            for name, shape in shapes.items()
        }

    def quantized(self, name: str) -> QuantizedTensor | None:
        """Return layer `name` as it is stored, None if it is in float."""
        return self.format.read(self.checkpoint, name) if self.format else None

    def weight(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Return the weight of layer `name` in float32, dequantized if it must be.

        Raises
        ------
        CheckpointError
            If it is absent or has another shape.
        NonFiniteError
            If a value is NaN or infinite.
        """
        tensor = self.quantized(name)
        if tensor is not None:
            self._check_shape(f"{name} (quantized)", tensor.shape, shape)
            weight = tensor.dequantize()
            require_finite(weight, f"{self.checkpoint.folder}: quantized layer {name}")
            return weight
        return self.vector_or_matrix(f"{name}.weight", shape)

    def vector_or_matrix(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Return tensor `name` in float32; raises as `weight`."""
        self._check_shape(name, self.checkpoint.shape(name), shape)
        array = self.checkpoint.read(name)
        if array.dtype.kind not in "fV":
            raise CheckpointError(
                f"{self.checkpoint.file(name)}: tensor {name} is {array.dtype}, expected floats"
            )
        array = np.ascontiguousarray(array, np.float32)
        require_finite(array, f"{self.checkpoint.file(name)}: tensor {name}")
        return array

    def block(self, index: int) -> DecoderBlock:
        """Read block `index`."""
        prefix, names, config = self.block_prefix(index), self.architecture, self.config
        weights = {}
        for name, shape in names.linear_shapes(config).items():
            weights[f"{name}.weight"] = self.weight(prefix + name, shape)
            if names.has_bias(name, config):
                weights[f"{name}.bias"] = self.vector_or_matrix(f"{prefix}{name}.bias", shape[:1])
        for norm in (names.attention_norm, names.mlp_norm):
            weights[f"{norm}.weight"] = self.weight(prefix + norm, (config.hidden_size,))
        return DecoderBlock(weights, names, config)

    def embedding(self) -> Float32:
        """Read the embedding matrix ``[vocabulary, hidden_size]``."""
        return self.weight(self.embedding_name, (self.config.vocab_size, self.config.hidden_size))

    def head(self) -> Float32:
        """Read the output matrix ``[vocabulary, hidden_size]``."""
        return self.weight(self.head_name, (self.config.vocab_size, self.config.hidden_size))

    def final_norm(self, hidden: Float32) -> Float32:
        """Return `hidden` after the last norm."""
        weight = self.weight(self.architecture.final_norm, (self.config.hidden_size,))
        normed = np.empty_like(hidden)
        _kernels.rms_norm(hidden, weight, self.config.rms_norm_eps, normed)
        return normed

    def rotation(self, length: int) -> Rotation:
        """Return the rotary tables for samples of `length` tokens."""
        config = self.config
        return Rotation(
            *rope_tables(config.rope, config.head_dim, length, config.max_position_embeddings)
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

        First the embeddings, then the states after each block, at last those after the final norm.
        All but the last are views of one buffer: copy what must outlive the next step.
        """
        ids = self.check_ids(input_ids)
        hidden = self.embedding()[ids.reshape(-1)]
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

        Examples
        --------
        >>> import bitwright
        >>> model = bitwright.load_model(bitwright.demo_folder())
        >>> model.logits([[1, 2, 3]]).shape
        (1, 3, 512)
        """
        *_, hidden = self.hidden_states(input_ids)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = np.empty((len(rows), self.config.vocab_size), np.float32)
        _kernels.linear(rows, self.head(), None, logits, False)
        return logits.reshape(*hidden.shape[:2], -1)

    def _embedding_and_head(self) -> tuple[str, str]:
        embedding, head = self.architecture.embedding, self.architecture.head
        if not self.config.tie_word_embeddings:
            return embedding, head
        # A tied matrix may be stored under either name; transformers takes the embedding's first.
        stored = [name for name in (embedding, head) if self._is_stored(name)]
        if not stored:
            raise CheckpointError(
                f"{self.checkpoint.folder}: neither {embedding}.weight nor {head}.weight is stored"
            )
        return stored[0], stored[0]

    def _is_stored(self, name: str) -> bool:
        return any(f"{name}.{part}" in self.checkpoint for part in ("weight", "qweight"))

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != tuple(expected):
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensor {name} has shape {list(found)}, but config.json "
                f"asks for {list(expected)}"
            )


def load_model(path: str | os.PathLike[str]) -> Model:
    """Open a checkpoint folder as a model; weights are read block by block when they are needed.

    Parameters
    ----------
    path
        Folder with config.json and safetensors files: float, or quantized in a format that is read.

    Returns
    -------
    Model

    Raises
    ------
    CheckpointNotFoundError, CheckpointError, UnsupportedModelError
        If the folder is absent, damaged or not supported; the message says what and where.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.load_model(bitwright.demo_folder()).config.num_hidden_layers
    3
    """
    return Model(Checkpoint(Path(path)))
