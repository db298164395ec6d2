"""The states of all calibration tokens between two stages: in memory, and in files beyond a budget."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.files.replacing import output_errors, synchronize
from bitwright.files.seals import buffers_checksum
from bitwright.models.block import ChunkStates
from bitwright.models.operations import Float32
from bitwright.models.routing import Routes
from bitwright.ranks import LEAVES, current, leaf_of

_numbers = count()  # of the states of this process, for the names of their files


@dataclass(frozen=True)
class ChunkPlan:
    """How tokens are cut into chunks, and which of them this rank has.

    Parameters
    ----------
    rows, chunk_rows
        Of all chunks together, and of each but the last.
    first_part
        How many chunks, from the first on, are computed in the original model, too.
    numbers
        The chunks of this rank, ascending.
    resident
        How many chunks of one `States` are in memory; those of higher places are in files. None for all.
    folder
        Where these files are.
    """

    rows: int
    chunk_rows: int
    first_part: int
    numbers: tuple[int, ...]
    resident: int | None = None
    folder: Path | None = None

    @classmethod
    def shared(
        cls,
        rows: int,
        chunk_rows: int,
        first_part: int,
        resident: int | None = None,
        folder: Path | None = None,
    ) -> "ChunkPlan":
        """Return the plan of this rank, with its share of both parts."""
        ranks = current()
        whole = cls(rows, chunk_rows, first_part, tuple(range(-(-rows // chunk_rows))))
        numbers: tuple[int, ...] = ()
        for part in (whole.numbers[:first_part], whole.numbers[first_part:]):
            for leaf in ranks.leaves(len(part)):
                numbers += part[leaf.start : leaf.stop]
        return replace(whole, numbers=numbers, resident=resident, folder=folder)

    def place(self, number: int) -> slice:
        """Return the rows of a chunk."""
        first = number * self.chunk_rows
        return slice(first, min(first + self.chunk_rows, self.rows))

    def leaf(self, number: int) -> int:
        """Return the leaf of the sum that a chunk belongs to, see `bitwright.ranks.Sum`."""
        if number < self.first_part:
            return leaf_of(number, self.first_part)
        rest = -(-self.rows // self.chunk_rows) - self.first_part
        return LEAVES + leaf_of(number - self.first_part, rest)

    def below(self, limit: int) -> "ChunkPlan":
        """Return the plan of the chunks whose number is below a limit."""
        rows = min(limit * self.chunk_rows, self.rows)
        return replace(
            self, rows=rows, numbers=tuple(each for each in self.numbers if each < limit)
        )


class States:
    """The hidden states of a rank's chunks, and intermediate activations for later stages.

    Chunks are visited in order, again and again. So the first ones stay in memory, as many as there is room
    for, and every other one is read from its file and written back: keeping what was used last would keep
    what is needed last. Plain reading and writing, since a full disk under a memory map kills the process.

    Parameters
    ----------
    plan
        Which chunks there are.
    hidden
        Of each chunk, ``[rows, hidden_size]`` float32.
    """

    def __init__(self, plan: ChunkPlan, hidden: Iterable[Float32]) -> None:
        self.plan = plan
        self._name = f"{current().rank}-{next(_numbers)}"
        self._chunks: list[ChunkStates | None] = []
        self._stored: list[list[tuple[str, tuple[int, ...]]]] = []
        self._routes: dict[int, Routes | None] = {}  # small next to what they route
        for place, states in enumerate(hidden):
            self._stored.append([])
            self._chunks.append(None)
            self._put(place, ChunkStates(states))

    def __len__(self) -> int:
        return len(self._chunks)

    def chunks(self) -> Iterator[ChunkStates]:
        """Yield the chunks in order; what is changed in them until the next one stays."""
        for place in range(len(self)):
            with self.opened(place) as chunk:
                yield chunk

    @contextmanager
    def opened(self, place: int) -> Iterator[ChunkStates]:
        """Yield one chunk, which is stored again when the block ends well."""
        chunk = self._get(place)
        yield chunk
        self._put(place, chunk)

    def hidden(self) -> Iterator[Float32]:
        """Yield the hidden states of every chunk, not to be changed."""
        for place in range(len(self)):
            yield self._get(place, only_hidden=True).hidden

    def copy(self, below: int | None = None) -> "States":
        """Return copies of the hidden states, of all chunks or of those whose number is below a limit."""
        plan = self.plan if below is None else self.plan.below(below)
        kept = (rows.copy() for _, rows in zip(plan.numbers, self.hidden(), strict=False))
        return States(plan, kept)

    def forget_inner(self) -> None:
        """Drop all but the hidden states, at the end of a block."""
        for place, chunk in enumerate(self._chunks):
            if chunk is not None:
                chunk.inner.clear()
                chunk.routes = None
            self._routes.pop(place, None)
            del self._stored[place][1:]

    def save(self, path: Path) -> tuple[int, int]:
        """Write the hidden states into a file of those of all ranks, each at its place; return how many
        bytes of its beginning are this rank's, and their checksum."""
        size = checksum = 0
        with output_errors(path), open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            for number, rows in zip(self.plan.numbers, self.hidden(), strict=True):
                place, data = self.plan.place(number), rows.reshape(-1).view(np.uint8).data
                start = place.start * rows.shape[1] * 4
                file.seek(start)
                file.write(data)
                if start == size:
                    size, checksum = start + len(data), buffers_checksum([data], checksum)
            file.flush()
            synchronize(path)
        return size, checksum

    def delete(self) -> None:
        """Forget everything; files are removed."""
        for place, chunk in enumerate(self._chunks):
            if chunk is None:
                self._path(place).unlink(missing_ok=True)
        self._chunks, self._stored = [], []

    def _get(self, place: int, only_hidden: bool = False) -> ChunkStates:
        chunk = self._chunks[place]
        if chunk is not None:
            return chunk
        path = self._path(place)
        with output_errors(path, "read"), open(path, "rb") as file:
            (_, shape), *inner = self._stored[place]
            chunk = ChunkStates(_read(file, shape))
            for name, shape in () if only_hidden else inner:
                chunk.inner[name] = _read(file, shape)
        chunk.routes = self._routes.get(place)
        return chunk

    def _put(self, place: int, chunk: ChunkStates) -> None:
        if self.plan.resident is None or place < self.plan.resident:
            self._chunks[place] = chunk
            return
        arrays = {"": chunk.hidden, **chunk.inner}
        path = self._path(place)
        with output_errors(path), open(path, "wb") as file:
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._stored[place] = [(name, array.shape) for name, array in arrays.items()]
        self._routes[place] = chunk.routes

    def _path(self, place: int) -> Path:
        if self.plan.folder is None:
            raise ValueError("folder: there is none")
        return self.plan.folder / f"{self._name}-{place}"


def read_states(path: Path, plan: ChunkPlan, hidden_size: int) -> Iterator[Float32]:
    """Yield the hidden states of a rank's chunks from a file of all.

    Raises
    ------
    OutputError
        If the file is shorter than that.
    """
    with output_errors(path, "read"), open(path, "rb") as file:
        for number in plan.numbers:
            rows = plan.place(number)
            file.seek(rows.start * hidden_size * 4)
            yield _read(file, (rows.stop - rows.start, hidden_size))


def _read(file: BufferedReader, shape: Sequence[int]) -> NDArray[Any]:
    array = np.empty(shape, np.float32)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise OSError("is shorter than what was written there")
    return array
