"""How much memory a run may take, and the refusal of one that needs more."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from bitwright import _kernels
from bitwright.distributed import current
from bitwright.errors import MemoryBudgetError
from bitwright.memory import give_back, group_memory, machine_memory, process_memory, resident_bytes

FREE_SHARE = 0.75  # of the memory that is free, which a run takes at most unless told otherwise
THREAD_BYTES = 10_000_000  # of OpenBLAS' buffers and ours


@dataclass(frozen=True)
class Budget:
    """What a process may take.

    Parameters
    ----------
    bytes
        That at most.
    base
        Of these, what it has taken already, with what its threads will.
    limit
        What would get it killed.
    given
        What `bytes` is, in words.
    group
        Whether `limit` is that of a control group.
    """

    bytes: float
    base: int
    limit: float
    given: str
    group: bool

    @classmethod
    def of(cls, memory: float | None) -> "Budget":
        """Return the budget that is asked for.

        Parameters
        ----------
        memory
            Gigabytes (10⁹ bytes) for each process; by default three quarters of what is free, shared by the
            MPI ranks of this machine, beside what it has.

        Raises
        ------
        ValueError
            If the budget is not a positive number.
        """
        begun = _begun.get()
        if begun is not None:
            give_back()  # what the stages before have taken
            return begun
        if memory is not None and not memory > 0:
            raise ValueError(f"memory: expected gigabytes, more than 0, got {memory}")
        ranks = current()
        taken, threads = resident_bytes(), _kernels.num_threads()
        group = group_memory() / ranks.local_size
        own = process_memory(threads + 1)  # with that of the progress bar
        limit = taken + min(group, own)
        free = min(machine_memory() / ranks.local_size, group, own)
        return cls(
            min(limit, taken + FREE_SHARE * free if memory is None else memory * 1e9),
            taken + THREAD_BYTES * threads,
            limit,
            "what it has and three quarters of what is free" if memory is None else "the budget",
            group < own,
        )

    def require(self, least: int, folder: Path, instead: str = "") -> None:
        """Raise MemoryBudgetError, with the smallest budget that would work, where `least` is more."""
        if least <= self.bytes:
            return
        given, remedy = self.given, f"Give it more (memory, --memory {_up(least)})"
        if least > self.limit:
            whose = "of its control group" if self.group else "of the process (ulimit -v, -d)"
            given = f"what the limit {whose} leaves"
            remedy = f"Raise that by {_up(least - self.limit)} GB"
        raise MemoryBudgetError(
            f"{folder}: this run needs at least {gigabytes(least)}, but {given} is "
            f"{gigabytes(self.bytes)}. {remedy}{instead}",
            least,
        )


_begun: ContextVar[Budget | None] = ContextVar("_begun", default=None)


@contextmanager
def one_budget(memory: float | None) -> Iterator[None]:
    """Let all stages of a command have the budget that it began with, beside what it had taken then."""
    token = _begun.set(_begun.get() or Budget.of(memory))
    try:
        yield
    finally:
        _begun.reset(token)


def require_all(plans: Iterable[Callable[[], object]]) -> None:
    """Make the plans of all stages of a command; raise the MemoryBudgetError that asks for most, if any."""
    refused = []
    for plan in plans:
        try:
            plan()
        except MemoryBudgetError as error:
            refused.append(error)
    if refused:
        raise max(refused, key=lambda error: error.least)


def gigabytes(count: float) -> str:
    """Say a number of bytes, in smaller units where two decimals of a gigabyte say nothing."""
    count = max(count, 0)
    return f"{count / 1e9:.2f} GB" if count >= 1e8 or count == 0 else f"{count / 1e6:.2f} MB"


def _up(count: float) -> str:
    return f"{math.ceil(count / 1e7) / 100:g}"
