"""Single files that appear whole or not at all, and errors that name what could not be written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError, OutputError


@contextmanager
def output_errors(path: Path, done: str = "written") -> Iterator[None]:
    """Turn the operating system's errors into OutputError, naming `path` and what cannot be done."""
    try:
        yield
    except BitwrightError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be {done}: {error.strerror or error}") from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a place to write to, which becomes `path` when the block ends well, and vanishes otherwise.

    Raises
    ------
    OutputError
        If the operating system refuses.
    """
    start = f".{path.name}.partial-"
    partial = path.with_name(f"{start}{os.getpid()}")
    with output_errors(path):
        try:
            for other in path.parent.glob(f"{start}*"):
                if other == partial or not _is_running(other.name.removeprefix(start)):
                    other.unlink(missing_ok=True)  # of a process that was killed
            yield partial
            synchronize(partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented, whole or not at all; OutputError if that fails."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def synchronize(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
