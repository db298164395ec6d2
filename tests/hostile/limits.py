"""What must hold, whatever reads a file: it is quick, warns in words only and takes little memory."""

import signal
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bitwright.warned import BitwrightWarning

SECONDS = 120
MEMORY_FACTOR, MEMORY_BYTES = 16, 64 << 20


class Hung(BaseException):
    """Something took longer than `SECONDS`."""


@contextmanager
def limited(most: int) -> Iterator[None]:
    """Raise unless the block is quick, takes at most so many bytes and warns in our own words only."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise Hung

    resident = _resident(reset=True)
    handler = signal.signal(signal.SIGALRM, stop) or signal.SIG_DFL
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.start()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        touched = _resident() - resident
        assert peak <= most, f"{peak >> 20} MiB were allocated, of at most {most >> 20}"
        assert touched <= 2 * most, f"{touched >> 20} MiB were used, of at most {2 * most >> 20}"
        words = [str(each.message) for each in warned]
        assert all(issubclass(each.category, BitwrightWarning) for each in warned), words
        assert all(map(str.isprintable, words)), words


def _resident(reset: bool = False) -> int:
    """Return the most memory that this process has had since the last reset: what libraries in C, C++ and
    Rust allocate is in it. Zero where the system does not tell."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    return 0
