"""One run on several processes, over MPI: how work is shared among ranks, and their messages.

All of bitwright asks `current` for the ranks; outside of MPI there is one, which talks to nobody."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.errors import MissingExtraError

T = TypeVar("T")
MESSAGE_ELEMENTS = 1 << 26  # of one message: counts are 32-bit numbers in many MPI libraries
LEAVES = 8  # of the tree of a sum in a fixed order: the most ranks that can share it
ROWS = 16  # of a layer that are solved together, see cpp/quant/gptq.cpp
FIXED_ROWS = 256  # of a layer that are computed by themselves where the order is fixed
# By which the launchers of MPICH, Open MPI and Slurm tell how many ranks there are.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


class Ranks:
    """The only process of a run.

    Attributes
    ----------
    rank, size
        Which of how many ranks this is.
    local_size
        How many of them share this machine's memory.
    fixed_order
        Whether sums are taken, and layers cut into pieces, in a way that does not depend on the number of
        ranks.
    """

    rank = 0
    size = 1
    local_size = 1

    def __init__(self, fixed_order: bool = False) -> None:
        self.fixed_order = fixed_order

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, count: int, unit: int = 1) -> range:
        """Return this rank's part of `count` things: consecutive ones, in whole units but for the last."""
        return share(count, self.rank, self.size, unit)

    def leaves(self, count: int) -> list[range]:
        """Return this rank's part of what is added up over `count` things, leaf by leaf."""
        if not self.fixed_order:
            return [self.share(count)]
        starts = [-(-leaf * count // LEAVES) for leaf in range(LEAVES + 1)]
        return [range(starts[leaf], starts[leaf + 1]) for leaf in self.share(LEAVES)]

    def most_summands(self, chunks: int) -> int:
        """Return how many arrays a `Sum` over so many chunks of all ranks holds at most."""
        # The leaf that grows and, of what was added up before it, one for each level of the tree.
        return max(1, min(chunks, LEAVES.bit_length())) if self.fixed_order else 1

    def rows(self, count: int, unit: int = ROWS) -> list[slice]:
        """Return this rank's part of a layer's rows, in the pieces to compute one by one.

        A matrix product of fewer rows may round otherwise, so in a fixed order the pieces are the same for
        any number of ranks. No piece ends inside of a unit of rows that belong together.
        """
        fixed = -(-FIXED_ROWS // unit) * unit
        mine = self.share(count, fixed if self.fixed_order else unit)
        step = fixed if self.fixed_order else max(1, len(mine))
        return [slice(first, min(first + step, mine.stop)) for first in mine[::step]]

    def sum(self, array: NDArray[Any]) -> None:
        """Replace a C-contiguous array, of the same shape on all ranks, by the sum of theirs."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, to every rank."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return the first rank's value."""
        return value

    def send(self, array: NDArray[Any], to: int) -> None:
        """Send a C-contiguous array to a rank that receives it."""

    def receive(self, array: NDArray[Any], source: int) -> None:
        """Fill an array with what a rank sends."""

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank alone; all return its result, or raise what it raises."""
        found: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                found = function()
            except Exception as raised:
                if self.size == 1:
                    raise
                error = raised
        found, error = self.broadcast((found, error))
        if error is not None:
            raise error
        return found  # type: ignore[return-value]

    def total(self, values: Iterable[float]) -> float:
        """Return the sum of all ranks' values, one after the other, the same on every rank."""
        return sum((value for part in self.gather(list(values)) for value in part), 0.0)

    def all(self, value: bool) -> bool:
        """Tell whether a condition holds on every rank."""
        return all(self.gather(bool(value)))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)


class MpiRanks(Ranks):
    """The ranks of an MPI communicator.

    Parameters
    ----------
    comm
        An ``mpi4py`` communicator.
    fixed_order
        See `Ranks`.
    """

    def __init__(self, comm: Any, fixed_order: bool = False) -> None:
        super().__init__(fixed_order)
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        local = comm.Split_type(_mpi().COMM_TYPE_SHARED)
        self.local_size: int = local.Get_size()
        local.Free()

    def sum(self, array: NDArray[Any]) -> None:
        """As `Ranks.sum`."""
        for piece in _pieces(array):
            # Reduced once and sent, so that all ranks have the same bits.
            if self.rank == 0:
                self._comm.Reduce(_mpi().IN_PLACE, piece, root=0)
            else:
                self._comm.Reduce(piece, None, root=0)
            self._comm.Bcast(piece, root=0)

    def gather(self, value: T) -> list[T]:
        """As `Ranks.gather`."""
        found: list[T] = self._comm.allgather(value)
        return found

    def broadcast(self, value: T) -> T:
        """As `Ranks.broadcast`."""
        first: T = self._comm.bcast(value, root=0)
        return first

    def send(self, array: NDArray[Any], to: int) -> None:
        """As `Ranks.send`."""
        for piece in _pieces(array):
            self._comm.Send(piece, dest=to)

    def receive(self, array: NDArray[Any], source: int) -> None:
        """As `Ranks.receive`."""
        for piece in _pieces(array):
            self._comm.Recv(piece, source=source)


class Sum:
    """An array that is added up over the chunks of all ranks.

    With `Ranks.fixed_order` chunks are added up leaf by leaf, and the leaves as a binary tree over all of
    them: whatever part of the tree a rank has, the same numbers are added in the same order.

    Parameters
    ----------
    shape, dtype
        Of the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._ranks = current()
        self._nodes: list[_Node] = []

    def place(self, leaf: int = 0) -> NDArray[Any]:
        """Return the array to add the next chunk to; `leaf` says which leaf of all it belongs to."""
        if not self._ranks.fixed_order:
            leaf = 0
        if not self._nodes or self._nodes[-1].leaf != leaf:
            self._grow(_Node(0, leaf, leaf, np.zeros(self.shape, self.dtype)))
        return self._nodes[-1].array

    def join(self) -> None:
        """Add up what belongs together, now that nothing more comes to the last leaf."""
        while len(self._nodes) > 1 and self._nodes[-2].is_twin(self._nodes[-1]):
            right = self._nodes.pop()
            left = self._nodes[-1]
            left.array += right.array
            self._nodes[-1] = _Node(left.level + 1, left.index // 2, -1, left.array)

    def total(self) -> NDArray[Any]:
        """Return the sum, the same on all ranks, and forget it; all ranks call this together."""
        ranks = self._ranks
        if not ranks.fixed_order:
            total = self.place()
            ranks.sum(total)
            self._nodes = []
            return total
        self.join()
        counts = ranks.gather([(node.level, node.index) for node in self._nodes])
        if ranks.is_first:
            for source, nodes in enumerate(counts):
                for level, index in nodes if source else ():
                    array = np.empty(self.shape, self.dtype)
                    ranks.receive(array, source)
                    self._grow(_Node(level, index, -1, array))
            self.join()
            total = np.zeros(self.shape, self.dtype) if not self._nodes else self._nodes[0].array
            for node in self._nodes[1:]:
                total += node.array
        else:
            for node in self._nodes:
                ranks.send(node.array, 0)
            total = np.zeros(self.shape, self.dtype)
        self._nodes = []
        ranks.sum(total)  # of one that is not zero
        return total

    def _grow(self, node: "_Node") -> None:
        """Add a node on the right, after all twins before it have been added up."""
        self.join()
        self._nodes.append(node)


@dataclass(eq=False)
class _Node:
    """The sum of the leaves from ``index << level`` on, `leaf` while it is one that grows."""

    level: int
    index: int
    leaf: int
    array: NDArray[Any]

    def is_twin(self, right: "_Node") -> bool:
        return self.level == right.level and self.index % 2 == 0 and right.index == self.index + 1


_current: ContextVar[Ranks | None] = ContextVar("ranks", default=None)
_alone = Ranks()


def current() -> Ranks:
    """Return the ranks that runs are spread over now."""
    return _current.get() or _alone


@contextmanager
def spread_over(comm: Any | None = None, fixed_order: bool = False) -> Iterator[Ranks]:
    """Spread what is called in the ``with`` block over the ranks of a communicator, each of which calls it.

    The folder that is written, with what lies beside it during the run, and the model must be there under
    the same names for all ranks. The first rank writes.

    Parameters
    ----------
    comm
        An ``mpi4py`` communicator; None for this process alone.
    fixed_order
        Take all sums in an order, and matrix products in pieces, that do not depend on the number of
        ranks: any number of them, of as many threads each, gives the same bytes on processors of one kind.
        It takes the memory of some more grams, and more time in all where layers are wide.

    Yields
    ------
    Ranks

    Examples
    --------
    >>> import bitwright
    >>> with bitwright.spread_over() as ranks:  # mpi4py.MPI.COMM_WORLD, in a program that mpirun starts
    ...     ranks.size
    1
    """
    ranks = Ranks(fixed_order) if comm is None else MpiRanks(comm, fixed_order)
    token = _current.set(ranks)
    try:
        yield ranks
    finally:
        _current.reset(token)


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process is one of several that an MPI launcher has started."""
    return any(environment.get(name, "1") not in ("", "0", "1") for name in SIZES)


def world() -> Any:
    """Return mpi4py's communicator of all processes.

    Raises
    ------
    MissingExtraError
        If mpi4py is not installed.
    """
    return _mpi().COMM_WORLD


def leaf_of(number: int, count: int) -> int:
    """Return the leaf of one of `count` things, see `Ranks.leaves`."""
    return number * LEAVES // count


def share(count: int, rank: int, size: int, unit: int = 1) -> range:
    """Return the part of one of `size` ranks, as `Ranks.share`.

    Examples
    --------
    >>> [list(share(5, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    units = -(-count // unit)
    first, stop = units * rank // size, units * (rank + 1) // size
    return range(min(first * unit, count), min(stop * unit, count))


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingExtraError(
            "several MPI ranks were started, but mpi4py cannot be imported: pip install bitwright[mpi] "
            f"({error})"
        ) from error
    return MPI


def _pieces(array: NDArray[Any]) -> list[NDArray[Any]]:
    flat = array.reshape(-1)
    if not np.shares_memory(flat, array) and array.size:
        raise ValueError("array: must be C-contiguous")
    return [
        flat[first : first + MESSAGE_ELEMENTS] for first in range(0, len(flat), MESSAGE_ELEMENTS)
    ]
