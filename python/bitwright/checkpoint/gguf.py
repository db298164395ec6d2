"""A GGUF file as a checkpoint."""

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.gguf_file import BLOCKS, DECODED, TYPE_NAMES, Header, TensorInfo, decoded
from bitwright.checkpoint.gguf_metadata import config_from_gguf
from bitwright.checkpoint.gguf_names import ROTATION_TENSORS, GgufNames, nested
from bitwright.checkpoint.gguf_parts import check_parts, parts_of
from bitwright.checkpoint.holes import hole_problem
from bitwright.checkpoint.reader import READ_BESIDE, Checkpoint, _Tensor, read_json_object
from bitwright.errors import CheckpointError, malformed_as, shown
from bitwright.files.home import expands_home
from bitwright.files.links import REMEDY, check_no_links, is_own_file
from bitwright.models.config import MODEL_DTYPES, QUANTIZATION_KEYS
from bitwright.models.keys import Keys
from bitwright.warned import warn


@dataclass(eq=False)
class _GgufShard:
    """A file's tensors under the names of Hugging Face, with the interface of safetensors."""

    file: BinaryIO
    names: GgufNames
    tensors: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def get_tensor(self, name: str) -> NDArray[Any]:
        info, position = self.tensors[name]
        array = self.load(position, info.dtype, info.shape)
        return np.ascontiguousarray(self.names.from_gguf(info.name, array)[1])

    def get_slice(self, name: str) -> "_GgufSlice":
        return _GgufSlice(self, *self.tensors[name])

    def load(self, position: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        place = array.reshape(-1).view(np.uint8).data
        with self.lock:
            self.file.seek(position)
            # BufferedReader has readinto, but the type of all binary files does not say so.
            count = self.file.readinto(place)  # type: ignore[attr-defined]
        if count != len(place):
            raise ValueError("the file ends early")
        return decoded(array)


@dataclass(frozen=True)
class _GgufSlice:
    shard: _GgufShard
    info: TensorInfo
    position: int

    def __getitem__(self, part: slice | tuple[slice, slice]) -> NDArray[Any]:
        """Return consecutive rows of a matrix, or of one of a stack. Stacks have no reordered rows, and
        neither have embeddings and heads, the only matrices read this way."""
        if isinstance(part, slice):
            rows, width = self.info.shape
            first, last, _ = part.indices(rows)
            place = self.position + first * width * self.info.dtype.itemsize
            return self.shard.load(place, self.info.dtype, (max(last - first, 0), width))
        _, rows, width = self.info.shape
        first, last, _ = part[1].indices(rows)
        start = part[0].start * rows + first
        shape = (1, max(last - first, 0), width)
        skipped = start * width * self.info.dtype.itemsize
        return self.shard.load(self.position + skipped, self.info.dtype, shape)


class GgufCheckpoint(Checkpoint):
    """An open GGUF file: its configuration and its tensors, under the names of Hugging Face.

    What llama.cpp stores differently (reordered rows, norms with an offset) is undone on reading.
    Quantized matrices ``[out, in]`` are arrays of blocks ``[out, in / weights per block]``, see `BLOCKS`;
    those of types that no grid holds are read as float32.

    Parameters
    ----------
    path : str or os.PathLike
        The file; of a model in several files, any of them.

    Attributes
    ----------
    path : pathlib.Path
        The file, or the first of several.
    folder : pathlib.Path
        Where it lies.
    config : dict
        The config.json beside it if that is of the same model, otherwise one made from the metadata.
    metadata : dict
        The metadata in its header.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    CheckpointError
        If it is damaged.
    UnsupportedModelError
        If it is of a kind that is not read.
    """

    @expands_home
    def __init__(self, path: str | os.PathLike[str]) -> None:
        paths = parts_of(Path(path))
        self.path = paths[0]
        self.folder = self.path.parent
        check_parts(paths)
        beside_it = (self.folder / name for name in ("config.json", *READ_BESIDE))
        check_no_links(self.folder, (*paths, *beside_it))
        what = f"{self.path}: is not a sound GGUF file"
        damaged = malformed_as(CheckpointError, what, ". Download it again", IndexError)
        with ExitStack() as stack, damaged:
            headers = [_opened(part, stack) for part in paths]
            _check_split(headers)
            known = _Headers(headers)
            self.metadata = known.metadata
            self._stored_bytes = sum(info.nbytes for info in known.tensors.values())
            self._types = {TYPE_NAMES[info.dtype] for info in known.tensors.values()}
            beside = self._names_beside(known)
            self._owns_folder = beside is not None
            if self._owns_folder:
                check_no_links(self.folder)
            names = beside or self._own_names(known)
            self.config: dict[str, Any] = {
                key: value
                for key, value in names.config.raw.items()
                if key not in QUANTIZATION_KEYS
            }
            self._made = {}
            self._shards, self._tensors = {}, {}
            for header in headers:
                shard = _GgufShard(
                    header.file,
                    names,
                    {
                        names.name(name): place
                        for name, place in header.tensors.items()
                        if name not in ROTATION_TENSORS
                    },
                )
                self._shards[header.path] = shard
                for name, (info, _) in shard.tensors.items():
                    dtype, shape = info.read_as
                    self._tensors[name] = _Tensor(
                        header.path, TYPE_NAMES[dtype], names.shape(info.name, shape), name
                    )
            self._names = sorted(self._tensors)
            self._stack = stack.pop_all()
            weakref.finalize(self, self._stack.close)

    @property
    def source(self) -> Path:
        """The file, which no output may replace; others may lie beside it."""
        return self.path

    @property
    def owns_folder(self) -> bool:
        """Whether there is a config.json of the same model."""
        return self._owns_folder

    def dtype(self, name: str) -> np.dtype[Any]:
        """As `Checkpoint.dtype`, but quantized matrices are of structured types, see `BLOCKS`."""
        return BLOCKS[self._tensor(name).dtype]

    def decoded_type(self) -> str | None:
        """As `Checkpoint.decoded_type`."""
        return next((name for name in self._types if name in DECODED), None)

    def _own_names(self, headers: "_Headers") -> GgufNames:
        shapes = {name: info.shape for name, info in headers.tensors.items()}
        config = config_from_gguf(headers.metadata, shapes, headers.rotations(), self.path)
        stored = headers.tensors["token_embd.weight"].dtype
        known = [name for name, dtype in MODEL_DTYPES.items() if dtype == stored]
        return GgufNames({**config, "dtype": known[0] if known else "float32"}, self.path)

    def _names_beside(self, headers: "_Headers") -> GgufNames | None:
        """Return the names by the config.json beside the file, None unless it is of the same model."""
        said, tensors = Keys(headers.metadata, self.path), headers.tensors
        path = self.folder / "config.json"
        if os.path.isfile(path) and not is_own_file(path, self.folder):
            warn(
                f"{path}: leads out of its folder, so it is not looked at. If {self.path.name} belongs to "
                f"it, {REMEDY}"
            )
            return None
        with suppress(CheckpointError):
            config = nested(
                read_json_object(path), tie_word_embeddings="output.weight" not in tensors
            )
            names = GgufNames(config, path)
            stored, computed = headers.rotations(), names.extra_tensors()
            architecture = said.choice("general.architecture", [names.architecture])
            if (
                said.integer(f"{architecture}.block_count") == names.config.num_hidden_layers
                and said.integer(f"{architecture}.embedding_length") == names.config.hidden_size
                and "token_embd.weight" in tensors
                and tensors["token_embd.weight"].shape[0] == names.config.vocab_size
                and stored.keys() == computed.keys()
                and all(
                    stored[name].shape == computed[name].shape
                    and np.allclose(stored[name], computed[name], 1e-4)
                    for name in stored
                )
            ):
                return names
        return None


@dataclass
class _Headers:
    """What the headers of all files of a model say together; the first has the metadata."""

    headers: Sequence[Header]

    def __post_init__(self) -> None:
        # What is said of the split is not true of what is written with the rest.
        said = self.headers[0].metadata.items()
        self.metadata = {key: value for key, value in said if not key.startswith("split.")}
        self.tensors: dict[str, TensorInfo] = {}
        for header in self.headers:
            for name, (info, _) in header.tensors.items():
                if name in self.tensors:
                    raise header.damaged(f"tensor {shown(name)} is in another part, too")
                self.tensors[name] = info

    def rotations(self) -> dict[str, NDArray[np.float32]]:
        """Read the tensors that only GGUF has: the divisors of the rotary frequencies."""
        found = {}
        for header in self.headers:
            for name in ROTATION_TENSORS:
                if name not in header.tensors:
                    continue
                info, position = header.tensors[name]
                if info.dtype != np.float32 or len(info.shape) != 1:
                    raise header.damaged(f"tensor {shown(name)} is not a vector of float32")
                header.file.seek(position)
                found[name] = np.frombuffer(header.file.read(info.nbytes), np.float32)
        return found


def _opened(path: Path, stack: ExitStack) -> Header:
    try:
        file = stack.enter_context(path.open("rb"))
        header = Header(file, path)
        if problem := hole_problem(file, header.places):
            raise header.damaged(problem)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return header


def _check_split(headers: Sequence[Header]) -> None:
    """Raise unless every file says that it is that part of the model that its name says."""
    for number, header in enumerate(headers):
        said, count = header.split()
        if (said, count) != (number, len(headers)):
            raise CheckpointError(
                f"{header.path}: says that it is part {said + 1} of {count}, but its name says "
                f"{number + 1} of {len(headers)}. Give all files the names that they were made with, "
                f"such as model-00001-of-{count:05d}.gguf"
            )
    total = sum(len(header.tensors) for header in headers)
    for header in headers:
        expected = header.metadata.get("split.tensors.count", total)
        if len(headers) > 1 and expected != total:
            raise CheckpointError(
                f"{header.path}: the parts together should have {shown(expected)} tensors, but have "
                f"{total}: they are not of one model. Download them again"
            )
