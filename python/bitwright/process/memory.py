"""The memory that this process has taken, and how much machine, control groups and limits leave it."""

import ctypes
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from bitwright.process.control_groups import control_groups

# Of a thread's stack and of what malloc sets aside for it: addresses, which hold nothing yet.
THREAD_ADDRESSES = 80_000_000


def machine_memory() -> float:
    """Return the bytes that are free, or can be made free, on the machine."""
    return float(psutil.virtual_memory().available)


def group_memory(root: Path = Path("/")) -> float:
    """Return the bytes that are left to the control groups of this process: infinity without a limit, less
    than nothing where they have too much.

    Parameters
    ----------
    root
        Of the file system.
    """
    return min(_left_to_groups(root), default=math.inf)


def process_memory(threads: int) -> float:
    """Return the bytes that its resource limits (ulimit -v, -d) leave to this process.

    Parameters
    ----------
    threads
        How many of them it may still start.

    Returns
    -------
    float
        Infinity without a limit, less than nothing where it has too much.
    """
    known = [math.inf]
    with suppress(OSError, ValueError, IndexError):
        pages = [int(word) for word in Path("/proc/self/statm").read_text().split()]
        for kind, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                known.append(limit - used * resource.getpagesize() - threads * THREAD_ADDRESSES)
    return min(known)


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    # getrusage begins with the peak of the process that started this one, on Linux.
    with suppress(OSError, StopIteration), open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Give what the heap holds and nobody uses back to the system, where that can be asked for."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Return the resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def _left_to_groups(root: Path) -> Iterator[float]:
    """Yield what each group leaves."""
    for group, first_version in control_groups("memory", root):
        most, now, prefix = "memory.max", "memory.current", ""
        if first_version:
            most, now, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        with suppress(OSError, ValueError):
            limit, used = (int((group / file).read_text()) for file in (most, now))
            yield limit - used + _file_pages(group, prefix)


def _file_pages(group: Path, prefix: str) -> int:
    """Return the bytes of files that are kept in memory as long as nobody else needs it."""
    kinds = {f"{prefix}{kind}_file" for kind in ("active", "inactive")}
    words = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(count) for kind, count in words if kind in kinds)
