"""Importance matrices of llama.cpp: mean squares of the inputs of each tensor, as GGUF or older .dat."""

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.gguf_file import Header, TensorInfo, tensor_offsets, write_header
from bitwright.checkpoint.gguf_names import GgufNames
from bitwright.errors import CheckpointError, StatisticsError, malformed_as, shown
from bitwright.files.home import expands_home
from bitwright.files.replacing import followed, replaced
from bitwright.files.text_file import read_bytes
from bitwright.loading.model import Model
from bitwright.statistics.folder import Statistics

MOST_BYTES = 1 << 30  # those of the largest public models have some hundred MB
CHUNK = 512  # tokens that llama.cpp counts by
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _SIZE = (f"imatrix.{key}" for key in ("datasets", "chunk_count", "chunk_size"))


@dataclass(frozen=True, eq=False)
class Importance:
    """What is known of a tensor's inputs.

    Parameters
    ----------
    sums
        Of their squares over all tokens, ``[matrices, in]``; a stack of experts has several matrices.
    counts
        The tokens that each has seen, ``[matrices]``.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    def means(self, matrix: int) -> NDArray[np.float32]:
        """Return the mean squares of a matrix's inputs; ones for one that no token came to, as llama.cpp
        takes them."""
        count = self.counts[matrix if len(self.counts) > 1 else 0]
        if count <= 0:
            return np.ones(self.sums.shape[1], np.float32)
        means: NDArray[np.float32] = self.sums[matrix] / np.float32(count)
        return means


class ImportanceMatrix:
    """An importance matrix.

    Parameters
    ----------
    entries
        By the names that tensors have in GGUF files.
    datasets
        What it was made from.
    chunks
        Over how many pieces of text.
    """

    def __init__(
        self, entries: Mapping[str, Importance], datasets: tuple[str, ...] = (), chunks: int = 0
    ) -> None:
        self.entries = dict(entries)
        self.datasets = datasets
        self.chunks = chunks
        self.path: Path | None = None

    @classmethod
    @expands_home
    def load(cls, path: str | os.PathLike[str]) -> "ImportanceMatrix":
        """Read a file that llama.cpp, or `save`, has written.

        Raises
        ------
        StatisticsError
            If it is damaged, or no such file.
        """
        place = Path(path)
        if not place.is_file():
            raise StatisticsError(f"{place}: there is no such file; --imatrix takes llama.cpp's")
        content = read_bytes(place, MOST_BYTES, StatisticsError)
        what = f"{place}: is not an importance matrix"
        remedy = "; make one with llama-imatrix or bitwright statistics export"
        with malformed_as(StatisticsError, what, remedy, CheckpointError, struct.error):
            is_gguf = content.startswith(b"GGUF")
            found = _from_gguf(content, place) if is_gguf else _from_dat(content)
            if not found.entries:
                raise ValueError("holds no tensors")
            for name, entry in found.entries.items():
                sound = np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()
                if not sound or (entry.sums < 0).any() or (entry.counts < 0).any():
                    raise ValueError(f"values of {shown(name)} are negative, NaN or infinite")
        found.path = place
        return found

    @expands_home
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as llama-quantize reads it: as GGUF, or in the older way if the name ends in .dat.

        Raises
        ------
        OutputError
            If that fails.
        """
        target = followed(path)
        content = self._as_dat() if target.suffix == ".dat" else self._as_gguf()
        with replaced(target) as place:
            place.write_bytes(content)

    def fingerprint(self) -> str:
        """Return a digest of all values."""
        known = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            known.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
        return known.hexdigest()[:16]

    def keys(self) -> dict[str, Any]:
        """Return what a GGUF file says of the matrix that it was made with."""
        said: dict[str, Any] = {} if self.path is None else {"file": self.path.name}
        said |= {"dataset": self.datasets[0]} if self.datasets else {}
        said |= {"entries_count": np.uint32(len(self.entries))}
        said |= {"chunks_count": np.uint32(self.chunks)} if self.chunks > 0 else {}
        return {f"quantize.imatrix.{key}": value for key, value in said.items()}

    def _as_gguf(self) -> bytes:
        arrays: dict[str, NDArray[np.float32]] = {}
        for name in sorted(self.entries):
            entry = self.entries[name]
            arrays[name + _SUMS] = entry.sums
            arrays[name + _COUNTS] = entry.counts[:, None]
        infos = [TensorInfo(name, np.dtype("<f4"), each.shape) for name, each in arrays.items()]
        metadata = {
            "general.type": "imatrix",
            _DATASETS: list(self.datasets) or ["unknown"],
            _CHUNKS: self.chunks,
            _SIZE: CHUNK,
        }
        out = BytesIO()
        start = write_header(out, metadata, infos)
        for array, end in zip(arrays.values(), tensor_offsets(infos)[1:], strict=True):
            out.write(np.ascontiguousarray(array, "<f4").tobytes())
            out.write(bytes(start + end - out.tell()))
        return out.getvalue()

    def _as_dat(self) -> bytes:
        parts = [struct.pack("<i", len(self.entries))]
        for name in sorted(self.entries):
            entry = self.entries[name]
            calls = max(1, math.ceil(float(entry.counts.max()) / CHUNK))
            means = np.stack([entry.means(each) for each in range(len(entry.sums))]) * calls
            encoded = name.encode()
            parts += [struct.pack("<i", len(encoded)), encoded]
            parts += [struct.pack("<ii", calls, means.size), means.astype("<f4").tobytes()]
        dataset = (self.datasets or ("unknown",))[-1].encode()
        parts += [struct.pack("<ii", self.chunks, len(dataset)), dataset]
        return b"".join(parts)


def _from_gguf(content: bytes, path: Path) -> ImportanceMatrix:
    header = Header(BytesIO(content), path)
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, (info, place) in header.tensors.items():
        if info.dtype != np.float32:
            raise ValueError(f"tensor {shown(name)} is not of float32")
        array = np.frombuffer(content, "<f4", math.prod(info.shape), place)
        arrays[name] = array.reshape(-1, info.shape[-1])
    entries = {}
    for name in [each.removesuffix(_SUMS) for each in arrays if each.endswith(_SUMS)]:
        sums, counts = arrays[name + _SUMS], arrays[name + _COUNTS].reshape(-1)
        if len(counts) not in (1, len(sums)):
            raise ValueError(f"{shown(name)} has {len(sums)} matrices and {len(counts)} counts")
        entries[name] = Importance(sums, counts)
    datasets = header.metadata.get(_DATASETS, [])
    chunks = header.metadata.get(_CHUNKS, 0)
    told = tuple(map(str, datasets)) if isinstance(datasets, list) else ()
    return ImportanceMatrix(entries, told, chunks if type(chunks) is int else 0)


def _from_dat(content: bytes) -> ImportanceMatrix:
    """Read the older format: mean squares times a number of calls, experts one behind the other."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if not 0 <= count <= len(content) - position:
            raise ValueError(f"{count} bytes should follow at byte {position}")
        position += count
        return content[position - count : position]

    def integer() -> int:
        value: int = struct.unpack("<i", take(4))[0]
        return value

    entries = {}
    for _ in range(integer()):
        name = take(integer()).decode()
        calls = integer()
        values = np.frombuffer(take(4 * integer()), "<f4")
        if not len(values) or name in entries:
            raise ValueError(f"{shown(name)} is empty or there twice")
        entries[name] = Importance(values[None], np.array([max(calls, 1)], np.float32))
    if position == len(content):  # the rest is newer
        return ImportanceMatrix(entries)
    chunks, dataset = integer(), take(integer()).decode(errors="replace")
    return ImportanceMatrix(entries, (dataset,) if dataset else (), chunks)


class ModelImportance:
    """An importance matrix, for the layers of a model.

    Parameters
    ----------
    matrix
        Of the same model.
    model
        Its layers.

    Raises
    ------
    StatisticsError
        If the matrix is of another model.
    """

    def __init__(self, matrix: ImportanceMatrix, model: Model) -> None:
        self.matrix = matrix
        self._places = gguf_places(model)
        self._shapes = {
            **model.linear_shapes(),
            **dict.fromkeys(
                (model.names.embedding, model.names.head),
                model.table_shape,
            ),
        }
        self._experts = model.config.experts.count if model.config.experts else 0
        known = {name for name, _ in self._places.values()} & matrix.entries.keys()
        if not known:
            raise StatisticsError(
                f"{matrix.path}: knows none of the tensors of {model.checkpoint.folder}; it has "
                f"{', '.join(map(shown, [*matrix.entries][:3]))}. Make one of this model"
            )
        # llama.cpp multiplies nothing with an embedding, unless that is the head, too.
        looked_up = set() if model.tied else {self._places[model.names.embedding][0]}
        self.missing = sorted({name for name, _ in self._places.values()} - known - looked_up)

    def of(self, layer: str) -> NDArray[np.float32] | None:
        """Return the mean squares of a layer's inputs, None where they are not known.

        Raises
        ------
        StatisticsError
            If there are not as many as the layer has inputs.
        """
        name, expert = self._places.get(layer, ("", None))
        entry = self.matrix.entries.get(name)
        if entry is None:
            return None
        channels = self._shapes[layer][1]
        matrices = 1 if expert is None else self._experts
        if entry.sums.size != matrices * channels or len(entry.counts) not in (1, matrices):
            raise StatisticsError(
                f"{self.matrix.path}: has {entry.sums.size} values for {name}, but {matrices} x {channels} "
                f"are read there. Is it of another model?"
            )
        shaped = Importance(entry.sums.reshape(matrices, channels), entry.counts)
        return shaped.means(expert or 0)


def gguf_places(model: Model) -> dict[str, tuple[str, int | None]]:
    """Return the tensor of a GGUF file that holds each layer, embedding and head included, and the place of
    an expert in it."""
    names = GgufNames(model.checkpoint.config, model.checkpoint.folder / "config.json")
    found: dict[str, tuple[str, int | None]] = {}
    for name in (*model.linear_shapes(), model.names.embedding, model.names.head):
        place = model.experts.get(name)
        stored = names.gguf_name(f"{name if place is None else place.stacked_name}.weight")
        found[name] = stored, None if place is None else place.index
    return found


def stages_of_tensors(model: Model) -> dict[str, list[str]]:
    """Return the stages that tensors of GGUF files read, by the names of these; of a stack of experts one
    for each."""
    places, found = gguf_places(model), dict[str, dict[int, str]]()
    for index, layout in enumerate(model.layouts):
        prefix = model.block_prefix(index)
        routers = [each for each in layout.stages if each.kind == "router"]
        for stage in layout.stages:
            read = prefix + (stage if stage.has_own_input else routers[0]).name
            for name in stage.linears:
                tensor, expert = places[prefix + name]
                found.setdefault(tensor, {})[expert or 0] = read
    found[places[model.names.head][0]] = {0: model.names.head}
    return {tensor: [stages[each] for each in sorted(stages)] for tensor, stages in found.items()}


def imatrix_of(
    statistics: Statistics, tensors: Mapping[str, list[str]], dataset: str
) -> ImportanceMatrix:
    """Return the importance matrix that statistics hold, for tensors by the stages that they read."""
    entries = {}
    for tensor, stages in tensors.items():
        sums, counts = [], []
        for stage in stages:
            moments = statistics.read(stage)
            channels = statistics.stages[stage].channels
            count = 0 if moments is None else moments.tokens
            counts.append(count)
            sums.append(
                np.zeros(channels, np.float32)
                if moments is None
                else moments.gram.diagonal() * np.float32(count)
            )
            del moments
        entries[tensor] = Importance(np.stack(sums), np.array(counts, np.float32))
    return ImportanceMatrix(entries, (dataset,), math.ceil(statistics.tokens / CHUNK))
