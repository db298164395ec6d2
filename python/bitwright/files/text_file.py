"""Reads small files whole, with a limit on their size."""

import os
import stat
from pathlib import Path

from bitwright.errors import BitwrightError, CalibrationError

TEXT_LIMIT = 32 << 20  # bytes; the tokenizer needs about 130 bytes of memory for each of them


def read_bytes(path: Path, limit: int, kind: type[BitwrightError] = CalibrationError) -> bytes:
    """Read a regular file: never more of it than it has when it is opened.

    Parameters
    ----------
    path : pathlib.Path
        File to read.
    limit : int
        The most bytes that it may have.
    kind : type, optional
        Of the error.

    Returns
    -------
    bytes
        Its content.

    Raises
    ------
    CalibrationError
        If the file is too large, not a regular one, or cannot be read.
    """
    try:
        # Otherwise opening a pipe would wait for someone to write to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise kind(f"{path}: is not a regular file, so it is not read")
            if found.st_size > limit:
                raise kind(f"{path}: is larger than {limit >> 20} MiB; give a smaller one")
            return file.read(found.st_size)
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path, limit: int) -> str:
    """Read a file as UTF-8, less its byte order mark; otherwise as `read_bytes`."""
    try:
        return read_bytes(path, limit).decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: is not UTF-8 text, see byte {error.start}. Convert it to UTF-8"
        ) from error
