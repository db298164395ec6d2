"""Files read whole, which must not be larger than their kind ever is."""

from pathlib import Path

from bitwright.errors import CalibrationError

TEXT_LIMIT = 32 << 20  # bytes; the tokenizer needs about 130 bytes of memory for each of them


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a file.

    Parameters
    ----------
    path : pathlib.Path
        File to read.
    limit : int
        The most bytes that it may have.

    Returns
    -------
    bytes
        Its content.

    Raises
    ------
    CalibrationError
        If the file is too large or cannot be read.
    """
    try:
        if path.stat().st_size > limit:
            raise CalibrationError(f"{path}: is larger than {limit >> 20} MiB; give a smaller one")
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path, limit: int) -> str:
    """Read a file as UTF-8, less its byte order mark; otherwise as `read_bytes`."""
    try:
        return read_bytes(path, limit).decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: is not UTF-8 text, see byte {error.start}. Convert it to UTF-8"
        ) from error
