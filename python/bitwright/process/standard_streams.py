"""Standard output and standard error of the command, and errors of writing to them."""

import io
import sys
from collections.abc import Callable
from typing import Any, TextIO

from bitwright.errors import OutputError

CLOSED_PIPE = 141  # as the shell says of what SIGPIPE ends


class _Descriptor(io.FileIO):
    """A file that is open already. It is told of once if it cannot be written; then it takes everything.

    Parameters
    ----------
    descriptor
        Of the file.
    failed
        Gets the error, and may raise another.
    """

    def __init__(self, descriptor: int, failed: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._failed = failed
        self._lost = False

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Write all of the data, or tell of the error."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and not self._lost:
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                self._lost = True
                self._failed(error)
        return size


def tell_of_lost_output() -> None:
    """Let a standard output that cannot be written be an error that names it, or where it is a pipe that
    nobody reads any more, the silent end that other tools have; and let what cannot be said on standard
    error be no reason to end anything.

    What is not the stream that Python has begun with is left alone.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = _over(sys.stdout, 1, _output_failed)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _over(sys.stderr, 2, lambda error: None)


def flush_output() -> None:
    """Write what is still to be written to standard output, while an error can be told."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _over(stream: TextIO | None, descriptor: int, failed: Callable[[OSError], None]) -> Any:
    """Return a stream like another one over its descriptor; the same if there is none."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _Descriptor(descriptor, failed)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _output_failed(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise SystemExit(CLOSED_PIPE) from error
    raise OutputError(
        f"standard output: cannot be written: {error.strerror or error}. Send it where there is room"
    ) from error
