"""The memory budget of a run, and the refusal of one that needs more."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from bitwright import _kernels
from bitwright.errors import MemoryBudgetError
from bitwright.process.memory import (
    give_back,
    group_memory,
    machine_memory,
    process_memory,
    resident_bytes,
)
from bitwright.ranks import current

FREE_SHARE = 0.75  # of the memory that is free, which a run takes at most unless told otherwise
THREAD_BYTES = 3_000_000  # of OpenBLAS' buffers, and of the weights of a tile that are widened
VARIATION = 10_000_000  # of what a process has taken before it begins, from one time to another
FIGURES = 3  # of a number of bytes in a message
UNITS = (("GB", 9), ("MB", 6), ("kB", 3), ("bytes", 0))


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
        """Raise MemoryBudgetError, with a budget that would work, where `least` is more than this one."""
        if least <= self.bytes:
            return
        given, remedy = self.given, f"Give it more (memory, --memory {_up(least + VARIATION)})"
        if least > self.limit:
            whose = "of its control group" if self.group else "of the process (ulimit -v, -d)"
            given = f"what the limit {whose} leaves"
            remedy = f"Raise that by {_up(least - self.limit + VARIATION)} GB"
        needed, there = told_apart(least, self.bytes)
        raise MemoryBudgetError(
            f"{folder}: this run needs at least {needed}, but {given} is {there}. {remedy}{instead}",
            least,
        )


_begun: ContextVar[Budget | None] = ContextVar("_begun", default=None)


@contextmanager
def one_budget(memory: float | None) -> Iterator[None]:
    """Give all stages of a command the budget that it began with, measured from the same base."""
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
    """Format a number of bytes to three figures, in smaller units below a tenth of a gigabyte."""
    count = max(count, 0)
    return _said(count, count, FIGURES)


def told_apart(more: float, less: float) -> tuple[str, str]:
    """Format two numbers of bytes, the larger one first, in the same unit and to as many figures as
    tell them apart.

    Parameters
    ----------
    more, less
        Bytes.

    Returns
    -------
    tuple of str

    Examples
    --------
    >>> told_apart(291_400_000, 290_000_000)
    ('0.291 GB', '0.290 GB')
    >>> told_apart(12_000_000_001, 12_000_000_000)
    ('12.000000001 GB', '12.000000000 GB')
    """
    more, less = math.ceil(more), max(math.floor(less), 0)
    figures = FIGURES
    while _said(more, more, figures) == _said(less, more, figures):
        figures += 1
    return _said(more, more, figures), _said(less, more, figures)


def _said(count: float, like: float, figures: int) -> str:
    """Format a number of bytes in the unit and to the decimals that give another one so many figures."""
    like = max(like, 1)
    unit, exponent = next(
        (unit, exponent) for unit, exponent in UNITS if like >= 10 ** (exponent - 1)
    )
    decimals = min(exponent, max(0, figures + exponent - len(str(int(like)))))
    return f"{Decimal(count).scaleb(-exponent):.{decimals}f} {unit}"


def _up(count: float) -> str:
    """Format bytes as gigabytes, rounded up, to be parsed as a number."""
    hundredths = -(-math.ceil(count) // 10_000_000)
    return f"{hundredths // 100}.{hundredths % 100:02d}"
