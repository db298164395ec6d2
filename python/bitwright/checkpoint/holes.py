"""Files that are long and hold next to nothing: tensors in their holes are refused, by name."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from bitwright.checkpoint.shard import places_in
from bitwright.errors import shown

LARGE = 1 << 30  # bytes that no sound file leaves out, however many of its weights are zero
LEAST_HELD = 16  # one byte of so many, of a tensor that is larger
MOST_PIECES = 1024  # of one tensor that are looked at
BLOCK = 512  # bytes that the system counts by, on every file system


def hole_problem(file: BinaryIO, places: Callable[[], Mapping[str, tuple[int, int]]]) -> str | None:
    """Say of which tensor a file has next to nothing: it was never written, or is there to deceive.

    Parameters
    ----------
    file : binary file
        A regular one, open to be read; it is left anywhere.
    places : callable
        Returns where each tensor begins and how long it is, in bytes; called only if the file has less
        than it seems to have.

    Returns
    -------
    str or None
        What is wrong, to be told after the name of the file; None if nothing is.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    found = os.fstat(file.fileno())
    held = getattr(found, "st_blocks", found.st_size) * BLOCK
    if found.st_size < LARGE or held > found.st_size - LARGE:
        return None
    for name, (start, size) in places().items():
        if size > LARGE and _held(file.fileno(), start, size) < size // LEAST_HELD:
            return f"has next to nothing of tensor {shown(name)}, which lies in a hole of the file"
    return None


def hole_in_safetensors(path: Path) -> str | None:
    """Return what `hole_problem` says of a sound safetensors file."""
    with open(path, "rb") as file:
        return hole_problem(file, lambda: places_in(path))


def _held(descriptor: int, start: int, size: int) -> int:
    """Return about how many bytes of a part of a file are not in holes."""
    held, place, end = 0, start, start + size
    try:
        for _ in range(MOST_PIECES):
            first = os.lseek(descriptor, place, os.SEEK_DATA)
            if first >= end:
                return held
            place = min(os.lseek(descriptor, first, os.SEEK_HOLE), end)
            held += place - first
            if place == end:
                return held
    except OSError as error:
        return held if error.errno == errno.ENXIO else size  # nothing more, or nobody knows
    return held * size // (place - start)
