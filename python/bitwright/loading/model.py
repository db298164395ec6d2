"""A checkpoint as a decoder: streamed, one block in memory at a time."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arrays import require_finite
from bitwright.checkpoint import Checkpoint, CheckpointSlice, open_checkpoint
from bitwright.checkpoint.hub import model_place
from bitwright.checkpoint.reader import written_dtype
from bitwright.errors import CheckpointError, shown
from bitwright.files.home import expands_home
from bitwright.files.inputs import note_model
from bitwright.formats import Format, detect_format
from bitwright.formats.stored import is_float
from bitwright.grids.tensor import QuantizedTensor
from bitwright.loading.absorbed import join_absorbed
from bitwright.loading.biases import split_biases
from bitwright.loading.contents import (
    has_own_head,
    is_stored,
    kinds_of,
    settle_names,
    untied,
    warn_of_head,
    warn_of_unused,
    without_harmless,
)
from bitwright.loading.scaled_floats import decode_scaled_floats
from bitwright.loading.shifted import undo_shifts
from bitwright.markup import html_table
from bitwright.models import ARCHITECTURES
from bitwright.models.architecture import LatentAttention
from bitwright.models.config import (
    MODEL_DTYPES,
    OTHER_FLOATS,
    ModelConfig,
    float_config,
    plainly_spelled,
)
from bitwright.models.decoder import Decoder
from bitwright.models.layout import BlockLayout, ExpertPlace, block_layout
from bitwright.models.matrix_rows import MatrixRows, piece_rows
from bitwright.models.operations import Float32


@dataclass(frozen=True)
class _Part:
    """The place of a matrix: a tensor or, in a stack of experts, some rows of one of its matrices, which
    may be stored ``transposed``."""

    tensor: str
    index: int | None = None
    rows: slice | None = None
    transposed: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix in a tensor of this shape."""
        if self.index is None:
            return stored
        if len(stored) != 3 or not 0 <= self.index < stored[0]:
            return stored  # which is not that of any linear, and will be named
        out, channels = stored[:0:-1] if self.transposed else stored[1:]
        return (len(range(*(self.rows or slice(None)).indices(out))), channels)

    def read(self, checkpoint: Checkpoint) -> NDArray[np.generic]:
        """Read the matrix in its stored dtype."""
        if self.index is None:
            return checkpoint.read(self.tensor)
        if not self.transposed and (self.rows is None or self.rows.step is None):
            return checkpoint.read_part(self.tensor, self.index, self.rows)
        whole = checkpoint.read_part(self.tensor, self.index)
        whole = whole.T if self.transposed else whole
        return whole if self.rows is None else whole[self.rows]


class Model(Decoder):
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
        rules = {name: family.rules for name, family in ARCHITECTURES.items()}
        read = checkpoint.config
        config = ModelConfig.from_dict(read, source, rules)
        super().__init__(config, ARCHITECTURES[config.family], checkpoint.folder)
        settle_names(checkpoint, self.names)
        decode_scaled_floats(checkpoint)
        self.format = detect_format(checkpoint)
        if isinstance(self.architecture.attention, LatentAttention):
            blocks = map(self.block_prefix, range(self.config.num_hidden_layers))
            join_absorbed(checkpoint, self.architecture.attention, blocks, self.format)
        blocks = map(self.block_prefix, range(self.config.num_hidden_layers))
        undo_shifts(checkpoint, self.architecture, blocks, self.names.final_norm)
        if self.architecture.experts is not None:
            blocks = map(self.block_prefix, range(self.config.num_hidden_layers))
            split_biases(checkpoint, self.architecture.experts, blocks)
        if self.config.tie_word_embeddings and has_own_head(checkpoint, self.names):
            warn_of_head(checkpoint, self.names.head)
            checkpoint.config = untied(checkpoint.config)
        if checkpoint.config is not read:  # what contradicts the tensors is corrected
            self.config = ModelConfig.from_dict(checkpoint.config, source, rules)
        self.embedding_name, self.head_name = self._embedding_and_head()
        self.experts: dict[str, ExpertPlace] = {}
        self._rows: dict[str, MatrixRows] = {}
        for name in (self.embedding_name, self.head_name):
            self._check_matrix(name, self.table_shape)
        for name, extent in (self._final_vectors() | self._head_vectors()).items():
            self._check_vector(name, extent)
        layouts: list[BlockLayout] = []
        for index in range(self.config.num_hidden_layers):
            layouts.append(block_layout(self.architecture, self.config, index))
            # Before the next: a config.json may ask for any number of layers that are not there.
            self._check_block(index, layouts[-1])
        self.layouts = tuple(layouts)
        self._channels = dict.fromkeys(
            (self.embedding_name, self.head_name), self.config.hidden_size
        )
        self._channels |= {name: shape[1] for name, shape in self.linear_shapes().items()}

    def __repr__(self) -> str:
        config, stored = self.config, "float" if self.format is None else self.format.name
        return (
            f"<Model {self.checkpoint.folder.name}: {config.model_type} in {stored}, "
            f"{config.num_hidden_layers} blocks, {config.hidden_size} channels, "
            f"{config.vocab_size} tokens>"
        )

    def _repr_html_(self) -> str:
        config = self.config
        facts = [
            ("model", self.checkpoint.folder.name),
            ("family", config.model_type),
            ("stored in", "float" if self.format is None else self.format.name),
            ("blocks", config.num_hidden_layers),
            ("channels", config.hidden_size),
            ("experts", None if config.experts is None else config.experts.count),
            ("tokens", f"{config.vocab_size:,}"),
            ("size", f"{self.checkpoint.stored_bytes() / 1e6:,.1f} MB"),
        ]
        return html_table(facts)

    @property
    def vocab_size(self) -> int:
        """The size of the model's vocabulary."""
        return self.config.vocab_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that config.json declares, or else that of the embedding or, if that is quantized, the
        last norm."""
        matrix = f"{self.embedding_name}.weight"
        stored = matrix if self._is_float(matrix) else f"{self.names.final_norm}.weight"
        return self.config.dtype or written_dtype(self.checkpoint.dtype(stored))

    def never_quantized(self) -> list[str]:
        """Return the full names of the matrices that stay in float: routers, and what is not the
        decoder's, such as a vision tower."""
        routers = [
            self.block_prefix(index) + name
            for index, layout in enumerate(self.layouts)
            for name in layout.floats
        ]
        decoder = (self.names.embedding, self.names.head, self.names.block.partition("{}")[0])
        others = [
            name.removesuffix(".weight")
            for name in self.checkpoint.names()
            if name.endswith(".weight")
            and not name.startswith(decoder)
            and len(self.checkpoint.shape(name)) == 2
        ]
        return routers + others

    def quantized(self, name: str) -> QuantizedTensor | None:
        """Return layer `name` as it is stored, None if it is in float."""
        if self.format is None:
            return None
        place, channels = self.experts.get(name), self._channels.get(name)
        if place is not None and f"{place.stacked_name}.weight" in self.checkpoint:
            slices = CheckpointSlice(self.checkpoint, place.index)
            return self.format.read(slices, place.stacked_name, channels)
        return self.format.read(self.checkpoint, name, channels)

    def stored(self, name: str, shape: tuple[int, int]) -> QuantizedTensor:
        """Return quantized layer `name` as it is stored, to be stored again.

        Raises
        ------
        CheckpointError
            If it is not quantized, or has another shape.
        NonFiniteError
            If a scale or bias is NaN or infinite.
        """
        tensor = self.quantized(name)
        if tensor is None:
            raise CheckpointError(f"{self.checkpoint.folder}: layer {name} is not quantized")
        self._check_shape(f"{name} (quantized)", tensor.shape, shape)
        for label, array in (("scales", tensor.scales), ("biases", tensor.biases)):
            if array is not None:
                require_finite(array, f"{self.checkpoint.folder}: {label} of layer {name}")
        return tensor

    def written_name(self, tensor: str) -> str | None:
        """Return the name that a float tensor is written under: a tied matrix has the embedding's, and is
        written once (None)."""
        if not self.tied:
            return tensor
        if tensor == f"{self.embedding_name}.weight":
            return f"{self.names.embedding}.weight"
        return None if tensor == f"{self.names.head}.weight" else tensor

    def unused(self) -> list[str]:
        """Return the unused tensors; parts of a multimodal model that are not the
        decoder's are none of them."""
        parts = ("weight", *(() if self.format is None else self.format.parts))
        layers = {self.names.embedding, self.names.head, *self.linear_shapes()}
        used = {*self._final_vectors(), *self._head_vectors()}
        for index, layout in enumerate(self.layouts):
            prefix = self.block_prefix(index)
            layers |= {prefix + name for name in layout.floats}
            used |= {prefix + name for name in layout.vectors}
        for place in self.experts.values():
            layers.add(place.stacked_name)
            used |= {place.stack.gate_up, place.stack.down, f"{place.stacked_name}.bias"}
        used |= {f"{layer}.{part}" for layer in layers for part in parts}
        inner = self.names.embedding.rpartition(".")[0].removesuffix(".model")
        decoder = (f"{inner}.", f"{self.names.head.partition('.')[0]}.")
        return [
            name
            for name in self.checkpoint.names()
            if name not in used
            and (self.architecture.rules.section is None or name.startswith(decoder))
        ]

    def warn_of_unused(self) -> None:
        """Name the unused tensors in a warning, if there are any that matter."""
        names = without_harmless(self.checkpoint, self.unused())
        kinds = kinds_of(names, self.names.block, self.config.num_hidden_layers)
        warn_of_unused(self.checkpoint, names, kinds)

    def config_for(self, format: type[Format]) -> dict[str, Any]:
        """Return config.json for weights in a format, but for what it says of these.

        Raises
        ------
        ValueError
            If the format's engine cannot load a model with such a head.
        """
        format.check_head(self.config.model_type, self.tied)
        config = plainly_spelled(float_config(self.checkpoint.config))
        if format.refuses_unknown and self.architecture.rules.section is None:
            # Engines take other defaults than transformers, or none.
            config.setdefault("tie_word_embeddings", self.tied)
        elif format.refuses_unknown and isinstance(config.get("text_config"), dict):
            tied = {"tie_word_embeddings": self.tied}
            if self.config.model_type != "gemma3":  # for which engines look for the head
                config |= {"text_config": {**config["text_config"], **tied}, **tied}
        for key in ("dtype", "torch_dtype"):
            if config.get(key) in OTHER_FLOATS:
                config[key] = str(self.dtype)
        return format.spell(config)

    def left_out(self, format: type[Format]) -> set[str]:
        """Return the tensors that are not written, as the format's engine would refuse them."""
        return set(self.unused()) if format.refuses_unknown else set()

    def quantized_layers(self) -> dict[str, tuple[int, int]]:
        """Return ``(out, in)`` of every layer that is quantized, by full name."""
        packed = set(self.packed_tensors().values())
        matrix = self.table_shape
        shapes = {self.embedding_name: matrix, self.head_name: matrix, **self.linear_shapes()}
        return {
            name: shape
            for name, shape in shapes.items()
            if name in packed
            or (name in self.experts and self.experts[name].stacked_name in packed)
        }

    def packed_tensors(self) -> dict[str, str]:
        """Return the tensors that hold quantized layers, and which layer each holds: of stacked experts the
        stack."""
        if self.format is None:
            return {}
        parts, layers = self.format.parts, set()
        for name in (*self.linear_shapes(), self.embedding_name, self.head_name):
            place = self.experts.get(name)
            layers |= {name} if place is None else {name, place.stacked_name}
        found: dict[str, str] = {}
        for layer in layers:
            there = [f"{layer}.{part}" for part in parts if f"{layer}.{part}" in self.checkpoint]
            if not there or (len(there) == 1 and self._is_float(there[0])):
                continue
            found |= dict.fromkeys(there, layer)
        return found

    def stored_dtype(self, tensor: str) -> np.dtype[Any]:
        """Return the dtype that a float tensor is stored in when it is written, by its full name."""
        if tensor not in self.checkpoint and tensor.endswith(".weight"):
            tensor = self._source(tensor.removesuffix(".weight")).tensor
        return written_dtype(self.checkpoint.dtype(tensor))

    def stacked_tensors(self) -> dict[str, list[str]]:
        """Return the tensors that hold several experts, and the layers in each."""
        stacks: dict[str, list[str]] = {}
        for name in self.experts:
            part = self._source(name)
            if part.index is not None:
                stacks.setdefault(part.tensor, []).append(name)
        return stacks

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
        return self._floats(self._source(name), shape)

    def floats(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the weight of a layer that is not quantized as it is stored, in 16 or 32 bits; raises as
        `weight`."""
        part, checkpoint = self._source(name), self.checkpoint
        self._check_shape(part.tensor, part.shape(checkpoint.shape(part.tensor)), shape)
        self._check_floats(part.tensor)
        array = part.read(checkpoint)
        if array.dtype not in MODEL_DTYPES.values():
            array = array.astype(np.float32)
        require_finite(array, f"{checkpoint.file(part.tensor)}: tensor {part.tensor}")
        return np.ascontiguousarray(array)

    def vector(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Return tensor `name` in float32; raises as `weight`."""
        place = self.experts.get(name.removesuffix(".bias"))
        if place is not None and name not in self.checkpoint:
            biases = self._floats(_Part(f"{place.stacked_name}.bias"), self._all_biases(shape))
            own: Float32 = biases[place.index]
            return own
        return self._floats(_Part(name), shape)

    def rows(self, name: str) -> MatrixRows:
        """Return the rows of the embedding or the head, by its name, which are read as they are needed."""
        if name in self._rows:
            return self._rows[name]
        shape = self.table_shape
        tensor = self.quantized(name)
        if tensor is not None:
            self._check_shape(f"{name} (quantized)", tensor.shape, shape)
            return MatrixRows(
                tensor.dequantize, shape, f"{self.checkpoint.folder}: quantized layer {name}"
            )
        stored = f"{name}.weight"
        self._check_shape(stored, self.checkpoint.shape(stored), shape)
        self._check_floats(stored)

        def read(first: int, last: int) -> NDArray[Any]:
            rows = self.checkpoint.read_rows(stored, first, last)
            return rows if rows.dtype in MODEL_DTYPES.values() else rows.astype(np.float32)

        # Kept: it holds no weights, and knows which of them it has looked at.
        self._rows[name] = MatrixRows(
            read, shape, f"{self.checkpoint.file(stored)}: tensor {stored}"
        )
        return self._rows[name]

    def is_quantized(self, name: str) -> bool:
        """Tell whether codes of a layer are stored, without reading them."""
        stored = f"{name}.weight"
        return not (stored in self.checkpoint and self._is_float(stored))

    def codes_bytes(self, name: str) -> int:
        """Return what `rows` of the embedding or the head holds: of a quantized matrix all codes, with
        their grids, which is there twice while they are unpacked."""
        table = self.config.vocab_size * self.config.hidden_size
        return table + table // 16 if self.is_quantized(name) else 0

    def piece_bytes(self, name: str) -> int:
        """Return what a piece of these rows takes beside that, where there are several also the room that
        the one before has left."""
        vocabulary, width = self.table_shape
        rows = piece_rows(width)
        piece = width * min(vocabulary, rows) * (2 if rows < vocabulary else 1)
        if self.is_quantized(name):
            return 4 * piece
        dtype = self.checkpoint.dtype(f"{name}.weight")
        return piece * (dtype.itemsize if dtype in MODEL_DTYPES.values() else 4 + dtype.itemsize)

    def embedding(self) -> Float32:
        """Read the embedding matrix ``[vocabulary, hidden_size]``."""
        return self.weight(self.embedding_name, self.table_shape)

    def embedding_table(self) -> NDArray[Any] | MatrixRows:
        """Read the embedding matrix as it is stored, in 16 or 32 bits, or get ready to read its rows, for
        `embed`."""
        name = f"{self.embedding_name}.weight"
        shape = self.table_shape
        if (
            not self._is_float(name)
            or self.checkpoint.shape(name) != shape
            or self.checkpoint.dtype(name) not in MODEL_DTYPES.values()
        ):
            return self.rows(self.embedding_name)
        return self.checkpoint.read(name)

    def _embedding_and_head(self) -> tuple[str, str]:
        embedding, head = self.names.embedding, self.names.head
        if not self.config.tie_word_embeddings:
            if is_stored(self.checkpoint, embedding) and not is_stored(self.checkpoint, head):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: there is no {head}.weight, and config.json does not say "
                    f"that the embedding is the head, too; transformers would make one up. If it is, "
                    f'write "tie_word_embeddings": true there; otherwise fetch the file with the head'
                )
            return embedding, head
        # A tied matrix may be stored under either name; transformers takes the embedding's first.
        stored = [name for name in (embedding, head) if is_stored(self.checkpoint, name)]
        if not stored:
            raise CheckpointError(
                f"{self.checkpoint.folder}: neither {embedding}.weight nor {head}.weight is stored"
            )
        return stored[0], stored[0]

    def _source(self, name: str) -> _Part:
        """Return where the weight of a layer is stored."""
        direct, place = f"{name}.weight", self.experts.get(name)
        if direct in self.checkpoint or place is None:
            return _Part(direct)
        stacked = f"{place.stacked_name}.weight"
        if stacked in self.checkpoint:
            return _Part(stacked, place.index)
        stack, rows = place.stack, None
        tensor = stack.down if place.role == "down" else stack.gate_up
        if tensor not in self.checkpoint:
            return _Part(direct)
        if place.role != "down":
            rows = (
                slice(0, place.size) if place.role == "gate" else slice(place.size, 2 * place.size)
            )
            if stack.interleaved:
                rows = slice(int(place.role == "up"), None, 2)
        return _Part(tensor, place.index, rows, self._is_transposed(place))

    def _is_transposed(self, place: ExpertPlace) -> bool:
        """Tell whether the stacks of an expert have their last two axes swapped."""
        stack, size, hidden = place.stack, place.size, place.hidden
        for tensor, shape in ((stack.gate_up, (2 * size, hidden)), (stack.down, (hidden, size))):
            if tensor in self.checkpoint and shape[0] != shape[1]:
                stored = self.checkpoint.shape(tensor)[1:]
                if stored in (shape, shape[::-1]):
                    return stored == shape[::-1]
        return stack.transposed

    def _floats(self, part: _Part, shape: tuple[int, ...]) -> Float32:
        checkpoint, name = self.checkpoint, part.tensor
        self._check_shape(name, part.shape(checkpoint.shape(name)), shape)
        self._check_floats(name)
        array = np.ascontiguousarray(part.read(checkpoint), np.float32)
        require_finite(array, f"{checkpoint.file(name)}: tensor {name}")
        return array

    def _check_block(self, index: int, layout: BlockLayout) -> None:
        """Compare the headers of the weight files with what config.json asks for in a block, and note where
        its experts are."""
        prefix = self.block_prefix(index)
        for name, place in layout.experts.items():
            stacked = prefix + place.stacked
            stack = place.stack
            stack = replace(stack, gate_up=prefix + stack.gate_up, down=prefix + stack.down)
            self.experts[prefix + name] = replace(
                place, prefix=prefix + place.prefix, stacked=stacked, stack=stack
            )
        for name, extent in layout.vectors.items():
            self._check_vector(prefix + name, extent)
        for name, shape in (*layout.linears.items(), *layout.floats.items()):
            self._check_matrix(prefix + name, shape)

    def _all_biases(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        experts = self.config.experts
        return shape if experts is None else (experts.count, *shape)

    def _check_vector(self, tensor: str, extent: tuple[int, ...]) -> None:
        place = self.experts.get(tensor.removesuffix(".bias"))
        if place is not None and tensor not in self.checkpoint:
            tensor, extent = f"{place.stacked_name}.bias", self._all_biases(extent)
        self._check_shape(tensor, self.checkpoint.shape(tensor), extent)
        self._check_floats(tensor)

    def _check_matrix(self, name: str, shape: tuple[int, int]) -> None:
        part = self._source(name)
        tensor = part.tensor
        if self.format is None or self._is_float(tensor):
            self._check_shape(tensor, part.shape(self.checkpoint.shape(tensor)), shape)
            self._check_floats(tensor)
            return
        # The format compares the sizes of packed tensors when it reads them. Until then, there must be
        # some, and no weight has less than 1.5 bits.
        place, stored = self.experts.get(name), 0
        for layer in (name,) if place is None else (name, place.stacked_name):
            for packed in (f"{layer}.{end}" for end in self.format.parts):
                if packed in self.checkpoint:
                    count = math.prod(self.checkpoint.shape(packed))
                    stored += count * self.checkpoint.dtype(packed).itemsize
        if not stored:
            self.checkpoint.shape(tensor)  # which is not there
        if 1.5 * math.prod(shape) > 8 * stored:
            raise CheckpointError(
                f"{self.checkpoint.folder}: quantized layer {name} has {stored} bytes, too few for the "
                f"shape {list(shape)} that config.json asks for"
            )

    def _check_floats(self, tensor: str) -> None:
        if not self._is_float(tensor):
            raise CheckpointError(
                f"{self.checkpoint.file(tensor)}: tensor {tensor} is "
                f"{shown(str(self.checkpoint.dtype(tensor)))}, expected floats"
            )

    def _is_float(self, tensor: str) -> bool:
        if tensor not in self.checkpoint:
            return False
        return is_float(self.checkpoint.dtype(tensor))

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != tuple(expected):
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensor {name} has shape {shown(list(found))}, but "
                f"config.json asks for {list(expected)}"
            )


@expands_home
def load_model(path: str | os.PathLike[str]) -> Model:
    """Open a checkpoint folder as a model; weights are read block by block when they are needed.

    Parameters
    ----------
    path
        Folder with config.json and safetensors files, or a GGUF file: float, or quantized in a format that
        is read; or the name of a model at the hub, ``ORG/NAME`` or ``ORG/NAME@REVISION``, which is fetched.

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
    checkpoint = open_checkpoint(model_place(path))
    note_model(checkpoint)
    return Model(checkpoint)
