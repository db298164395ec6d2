"""The files that a run reads, which must not change while it runs, nor before it is resumed."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bitwright.errors import CheckpointError
from bitwright.files.seals import file_checksum
from bitwright.warned import warn

AT_ONCE = 64 << 20  # bytes that are read for checksums however short a run is
# What more than these may take of a run's time, at so many bytes per second.
SHARE, SPEED = 0.01, 1e9
SETTLED = 2 * 10**9  # nanoseconds; in less, some file systems give two changes one time


class ModelFiles(Protocol):
    """A model that is read from files."""

    def input_files(self) -> list[Path]:
        """Return all files that it is read from."""
        ...


class _Stamp(NamedTuple):
    """The stamp of a file: size, times and inode, one of which differs after any change.

    Times are in nanoseconds: of the content, and of anything about the file, which nobody can set. Some
    network file systems make up inodes whenever they are asked."""

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, place: Path) -> "_Stamp":
        found = os.stat(place)
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def is_but_for_inode(self, other: Sequence[int]) -> bool:
        return list(self[:3]) == list(other[:3])


@dataclass(eq=False)
class _Known:
    """A file's stamp, when it was taken, and a checksum of the content that it had then, if known."""

    stamp: _Stamp
    checksum: int | None = None
    noted: int = field(default_factory=time.time_ns)
    keeps_inode: bool = True

    def record(self) -> list[Any]:
        """Return it for JSON, without a stamp that another change may have, too."""
        young = max(self.stamp.modified, self.stamp.changed) > self.noted - SETTLED
        return [None if young and self.checksum is not None else list(self.stamp), self.checksum]


_seen: ContextVar[dict[Path, _Known] | None] = ContextVar("seen", default=None)


@contextmanager
def same_inputs() -> Iterator[None]:
    """Let all stages of a command compare its inputs with their state when the first stage read them."""
    if _seen.get() is not None:
        yield
        return
    token = _seen.set({})
    try:
        yield
    finally:
        _seen.reset(token)


def note_model(model: ModelFiles) -> None:
    """Note what a model's files are like when a command opens it."""
    if _seen.get() is not None:
        InputFiles().watch_model(model)


def whole_checksum(path: Path) -> int:
    """Return the checksum of a whole file, which a command reads once for it.

    Raises
    ------
    CheckpointError
        If it is not what it was when the command read it first, or cannot be read.
    """
    files = InputFiles()
    files.watch([path])
    files.check()
    checksum = files.checksum(path)
    if checksum is None:
        raise CheckpointError(
            f"{path}: was changed or taken away while it was read. Run again when nobody writes to it"
        )
    return checksum


class InputFiles:
    """The input files of a run: their stamps and checksums, while it runs and when it is resumed.

    Stamps (size, times, inode) are looked at again and again. Where one of them is another, a checksum
    of the whole file decides: who touches a file, or copies it over itself or elsewhere, ends no run.
    Checksums are taken of files whose stamps tell that they have not changed so far, when there is
    a state to resume from; of many bytes only as far as that takes no more than a hundredth of the run's
    time. A file without one counts as changed when its stamp is another.

    Attributes
    ----------
    are_those_of_first
        Whether they are the very files of the first MPI rank, which looks after them.
    """

    def __init__(self) -> None:
        self.are_those_of_first = False
        self._known: dict[Path, _Known] = {}
        self._recorded: dict[str, list[Path]] = {}
        self._start = time.monotonic()
        self._read = 0  # bytes, for checksums

    def watch(self, paths: Iterable[Path], recorded: bool = False) -> None:
        """Note what files are like now, or when the same command has noted them first.

        Those that are `recorded` have to be the same when a run is resumed; others, such as what the
        run itself has made, get no checksums."""
        for path in map(Path, paths):
            if path in self._known or not path.is_file():
                continue
            seen = _seen.get()
            known = _Known(_Stamp.of(path))
            place = Path(os.path.abspath(path))
            self._known[path] = known if seen is None else seen.setdefault(place, known)
            if recorded:
                self._recorded.setdefault(path.name, []).append(path)

    def watch_model(self, model: ModelFiles, recorded: bool = True) -> None:
        """Note what a model's files are like: weights, config, tokenizer and templates."""
        self.watch(model.input_files(), recorded)

    def take_checksums(self) -> bool:
        """Take the checksums that are missing, as far as there is time; tell whether any was taken."""
        if self.are_those_of_first:
            return False
        most = max(AT_ONCE, SHARE * SPEED * (time.monotonic() - self._start))
        found = False
        for path in (path for paths in self._recorded.values() for path in paths):
            known = self._known[path]
            size = known.stamp.size
            if known.checksum is None and self._read + size <= most:
                self._read += size
                found |= self.checksum(path) is not None
        return found

    def checksum(self, path: Path) -> int | None:
        """Return the checksum of a file that is watched, None if it changes meanwhile or is not there."""
        known = self._known.get(path)
        if known is not None and known.checksum is None:
            known.checksum = _checksum(path, known.stamp)
        return None if known is None else known.checksum

    def check(self) -> None:
        """Raise CheckpointError if a file is there that is not what it was when it was first watched."""
        if self.are_those_of_first:
            return
        for path, known in self._known.items():
            try:
                now = _Stamp.of(path)
            except FileNotFoundError:  # what is open stays as it is, and what is not will be missed
                continue
            alike = now.is_but_for_inode(known.stamp)
            if now == known.stamp or (alike and (known.checksum is None or not known.keeps_inode)):
                continue
            if known.checksum is None or _checksum(path, now) != known.checksum:
                what = "changed or touched" if known.checksum is None else "changed"
                raise CheckpointError(
                    f"{path}: was {what} while it was read, so what was made of it is not put into its "
                    f"place. Run again when nobody writes to it"
                )
            if now.modified != known.stamp.modified:
                warn(f"{path}: was touched while it was read; its content is the same")
            known.stamp, known.noted, known.keeps_inode = now, time.time_ns(), not alike

    def stamps(self) -> list[_Stamp]:
        """Return the stamps of the files."""
        return [known.stamp for known in self._known.values()]

    def checksums(self) -> dict[Path, int]:
        """Return the checksums that are known."""
        return {
            path: known.checksum
            for path, known in self._known.items()
            if known.checksum is not None
        }

    def records(self) -> dict[str, list[Any]]:
        """Return stamps and checksums of the recorded files, by their names, for JSON."""
        return {
            name: [self._known[path].record() for path in paths]
            for name, paths in self._recorded.items()
        }

    def differences(self, records: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compare the recorded files with what `records` has told of them in an interrupted run.

        Returns
        -------
        dict, dict
            Of what has another content: what it was then, and what it is, in words for users.
        """
        self.check()
        was: dict[str, Any] = {}
        now: dict[str, Any] = {}
        for name in dict.fromkeys([*records, *self._recorded]):
            paths, known = self._recorded.get(name, []), records.get(name, [])
            same = [self._is(path, *record) for path, record in zip(paths, known, strict=False)]
            if len(paths) != len(known) or not all(same):
                what = f"content of {name}"
                was[what] = _words(checksum for _, checksum in known)
                now[what] = _words(self._known[path].checksum for path in paths)
        return was, now

    def _is(self, path: Path, stamp: list[int] | None, checksum: int | None) -> bool:
        known = self._known[path]
        alike = stamp is not None and known.stamp.is_but_for_inode(stamp)
        if stamp == list(known.stamp) or (alike and checksum is None):
            known.checksum = known.checksum if checksum is None else checksum
            return True
        known.checksum = _checksum(path, known.stamp)
        return checksum is not None and known.checksum == checksum


def _words(checksums: Iterable[int | None]) -> str:
    words = ("not known" if each is None else f"{each:08x}" for each in checksums)
    return ", ".join(words) or "not there"


def _checksum(path: Path, stamp: _Stamp) -> int | None:
    """Return the checksum of a file that has this stamp before and after it is read, None of another."""
    try:
        if not _Stamp.of(path).is_but_for_inode(stamp):
            return None
        checksum = file_checksum(path, 0, stamp.size)
        return checksum if _Stamp.of(path).is_but_for_inode(stamp) else None
    except OSError:  # who reads it for the run says why
        return None
