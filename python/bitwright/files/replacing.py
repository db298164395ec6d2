"""Single files that appear whole or not at all, and errors that name what could not be written."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError, OutputError, OutputExistsError

_ESCAPED = re.compile(r"\\([0-7]{3})")  # in lists of mount points


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
            for other in path.parent.glob(f"{glob.escape(start)}*"):
                if other == partial or not _is_running(other.name.removeprefix(start)):
                    other.unlink(missing_ok=True)  # of a process that was killed
            yield partial
            synchronize(partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the file that a place asked for stands for: what a link leads to, there or not."""
    return Path(os.path.realpath(path))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented, whole or not at all; OutputError if that fails."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def check_new_file(path: Path, read: Callable[[Path], object], overwrite: bool = False) -> None:
    """Check that a file can be written, before hours are spent on its content.

    Parameters
    ----------
    path
        The file.
    read
        Raises a BitwrightError unless a file is one that bitwright has made, which may be replaced.
    overwrite
        Whether any other file may be, too.

    Raises
    ------
    OutputExistsError
        If there is a file that may not be replaced.
    OutputError
        If none can be written there.
    """
    with output_errors(path):
        if path.is_dir():
            raise OutputError(f"{path}: cannot be written: it is a folder")
        if os.path.lexists(followed(path)) and not overwrite:
            try:
                read(path)
            except BitwrightError as error:
                raise taken(path, ", and is not what this command would write there") from error
        if path.exists() and is_mount_point(path):
            raise OutputError(
                f"{path}: cannot be replaced: it is a mount point. Mount the folder that it lies in"
            )
        folder = next(each for each in followed(path).parents if each.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: cannot be written: nothing can be made in {folder}")


def taken(path: Path, but: str = "") -> OutputExistsError:
    """Return the error for an output that exists, which says how to replace it."""
    return OutputExistsError(
        f"{path}: exists already{but}. Remove it, write elsewhere, or replace it (overwrite=True, "
        f"--overwrite)"
    )


def is_mount_point(place: Path) -> bool:
    """Tell whether a file or folder is a mount point, bind mounts included."""
    if os.path.ismount(place):
        return True
    try:
        # The only way to see bind mounts of the same file system.
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    points = (line.split(" ")[4] for line in lines)
    real = os.path.realpath(place)
    return any(real == _ESCAPED.sub(lambda code: chr(int(code[1], 8)), each) for each in points)


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
