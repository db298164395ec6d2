"""Handling of Ctrl-C and SIGTERM by the command: while it starts, runs, cleans up and ends.

`startup` imports this before anything else, so it imports as little as it can."""

from __future__ import annotations

import atexit
import os
import signal
import time

TYPE_CHECKING = False  # to whom that is true; typing itself takes longer than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

INTERRUPTED, TERMINATED = 130, 143
# Of a second signal: what comes sooner is the same wish, as a terminal and mpiexec may each send one.
PATIENCE = 1.0  # seconds
OTHERS_WAIT = 1.0  # seconds, of MPI ranks, for the first one to say what is wrong with all of them
# By which the launchers of MPICH, Open MPI and others tell a rank its number.
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MPI_LOCALRANKID")
_SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar has hidden


class Terminated(KeyboardInterrupt):
    """SIGTERM, as whoever shuts a machine down or ends a job sends it: an interruption, too."""


def while_starting() -> None:
    """End the command at once: nothing is there to be cleaned up, and an exception that came out of the
    middle of an import might be swallowed, or become another one."""

    def leave(number: int, frame: FrameType | None) -> None:
        _leave(number, "nothing was written")

    _answer(leave)
    atexit.register(_ignore)  # what is registered first comes last, when nothing waits any more


def while_running() -> None:
    """Raise KeyboardInterrupt once; whoever asks again, and has waited, does not wait for the clean-up."""
    first: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if time.monotonic() - first[0] > PATIENCE:
            _leave(number, "what is left of this run is found by the next one with the same output")

    _answer(interrupt)


def while_ending(status: int) -> None:
    """End with the status of what is done: all that was to be said and written is."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(status)

    _answer(leave)


def _answer(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        # What a shell has put into the background ignores them.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _ignore() -> None:
    """Let the interpreter take itself apart in peace: it forgets handlers, and would die of the signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _leave(number: int, reason: str) -> NoReturn:
    word, status = ("interrupted", INTERRUPTED)
    if number == signal.SIGTERM:
        word, status = ("terminated", TERMINATED)
    if any(os.environ.get(name, "0") != "0" for name in RANKS):
        time.sleep(OTHERS_WAIT)
    else:
        begin = _SHOW_CURSOR + b"\n" if os.isatty(2) else b""
        try:  # noqa: SIM105, which wants an import
            os.write(2, begin + f"{word}; {reason}\n".encode())
        except OSError:
            pass
    os._exit(status)
