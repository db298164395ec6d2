"""Checksums of the files that a run resumes from: one that has changed since is refused."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bitwright.files.replacing import output_errors

READ_BYTES = 1 << 20


class Seals:
    """The checksums (CRC-32) of files in a folder, that are kept up as files grow.

    Parameters
    ----------
    folder
        That of the files, which are named relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[int, int]] = {}

    def note(self, path: Path, size: int, checksum: int) -> None:
        """Take the checksum of the first so many bytes of a file from who has just written them."""
        self._known[path.relative_to(self._folder).as_posix()] = size, checksum

    def of(self, files: Mapping[Path, int]) -> dict[str, tuple[int, int]]:
        """Return size and checksum of the first so many bytes of each file. Of a file that has grown since
        the last call, only what was added is read."""
        found = {}
        for path, size in files.items():
            name = path.relative_to(self._folder).as_posix()
            start, checksum = self._known.get(name, (0, 0))
            if start > size:
                start, checksum = 0, 0
            found[name] = size, _checksum(path, start, size, checksum) if size > start else checksum
        self._known = found
        return found

    def broken(self, seals: Mapping[str, Any], whole: bool = False) -> Path | None:
        """Return the first of the files that is not what `of` has seen, None if all are. What they have
        more than that counts only if they are `whole`."""
        for name, (size, checksum) in seals.items():
            path = self._folder / name
            if not path.is_file() or _checksum(path, 0, int(size)) != checksum:
                return path
            if whole and path.stat().st_size != int(size):
                return path
        self._known = {name: (int(size), int(value)) for name, (size, value) in seals.items()}
        return None


def files_of(folder: Path) -> dict[Path, int]:
    """Return all files in a folder, and in those in it, with their sizes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_size for path in files}


def content_checksum(content: object) -> int:
    """Return a checksum of what JSON holds, the same before it is written and after it is read."""
    return zlib.crc32(json.dumps(content).encode())


def buffers_checksum(buffers: Iterable[Any], checksum: int = 0) -> int:
    """Return a checksum of contiguous buffers, one after another, or continue one."""
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    return checksum


def _checksum(path: Path, start: int, end: int, checksum: int = 0) -> int:
    """Go on with a checksum from one place in a file to another; −1 where the file ends before."""
    with output_errors(path, "read"):
        return file_checksum(path, start, end, checksum)


def file_checksum(path: Path, start: int, end: int, checksum: int = 0) -> int:
    """Go on with a checksum from one place in any file to another; −1 where the file ends before.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            read = file.read(min(READ_BYTES, end - start))
            if not read:
                return -1
            checksum = zlib.crc32(read, checksum)
            start += len(read)
    return checksum
