"""The hidden folder in which a run works until its output is complete, beside the output or, where nothing
can be moved there, inside it. An interrupted run is resumed from it."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import BaseFileLock, FileLock, Timeout

from bitwright.checkpoint.reader import read_json_object
from bitwright.errors import (
    MALFORMED,
    CheckpointError,
    OutputError,
    OutputExistsError,
    RankError,
    ResumeError,
    malformed_as,
    shown,
)
from bitwright.files.inputs import InputFiles
from bitwright.files.replacing import (
    followed,
    is_mount_point,
    output_errors,
    replaced,
    synchronize,
    write_json,
)
from bitwright.files.seals import Seals, content_checksum
from bitwright.ranks import current
from bitwright.warned import warn

LOCK, STATE, REPLACED, LAST = "lock", "state.json", "replaced", "last"
CHECKSUM = "checksum"  # of the rest of a state
INPUTS = "inputs"  # the part of a state that tells what was read
# The parts of a run that have work folders of their own.
SENSITIVITIES, GRADIENTS = "sensitivities", "gradients"
LOCK_SECONDS = 0.1  # for a run that ends meanwhile, and removes its folder
# What the operating system says of folders that cannot be moved as a whole.
UNMOVABLE = (errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES)
_OF_FILE_SYSTEMS = "lost+found"  # what some of them keep at their roots


class WorkFolder:
    """The hidden folder ``.NAME.work`` beside an output NAME, held by one run at a time.

    It is in the output where that is a folder which cannot be moved, or beside which nothing can be
    written: a mount point, say, as containers have them.

    Of several MPI ranks, which enter it and call its methods all together, the first holds and changes
    it. It is removed when the ``with`` block ends, unless that is by an exception and `keep` is set: while
    there is a state to resume from. A process that is killed leaves it, too; the next one with the same
    output holds it then.

    Parameters
    ----------
    out
        What will be written. Its parents are made, and removed again if nothing comes of it.
    part
        Of the run, where several parts of it keep something each.

    Raises
    ------
    OutputError
        On entering, if another process holds the folder, or it cannot be made.
    """

    def __init__(self, out: str | os.PathLike[str], part: str = "") -> None:
        try:
            # A link is followed: what it points to is written and replaced, not the link.
            self.out = Path(os.path.realpath(out))
        except ValueError as error:
            raise OutputError(f"{shown(os.fspath(out))}: is not the name of a folder") from error
        self.path = work_path(self.out, part)
        self.is_inside = self.path.parent == self.out
        self.keep = False
        self.inputs = InputFiles()
        self.seals = Seals(self.path)
        self._committed: dict[str, Any] = {}
        self._ranks = current()
        self._lock: BaseFileLock | None = None
        self._made_parents: list[Path] = []

    def __enter__(self) -> Self:
        self._ranks = current()
        self._ranks.on_first(self._enter)
        return self

    def _enter(self) -> None:
        try:
            with output_errors(self.out):
                parent = self.out.parent
                self._made_parents = []
                missing = [place for place in (parent, *parent.parents) if not place.exists()]
                for place in reversed(missing):
                    place.mkdir()
                    self._made_parents.insert(0, place)
                self._take()
                self._put_back()
                if self._is_finished():
                    self._clear()
                (self.path / LAST).unlink(missing_ok=True)
                self.keep = (self.path / STATE).is_file()
        except BaseException:
            self._leave(remove=self._lock is not None and not self._holds_anything())
            with suppress(OSError):  # it holds something, or is another run's
                self.path.rmdir()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        finished = error is None or self._is_finished()
        kept = self.keep and not finished
        try:
            self._leave(remove=not kept)
        except KeyboardInterrupt as interrupt:
            self._leave(remove=not kept)
            error = interrupt
        if isinstance(error, KeyboardInterrupt):
            resumes = f"the same call resumes from what is done, in {self.path}"
            done = f"{self.out} is written" if finished else resumes if kept else str(error)
            raise type(error)(done) from error

    def check_place(self) -> None:
        """Raise OutputError if the folder cannot be made or held; nothing is left of trying."""
        if self._lock is None:
            self._enter()
            self._leave(remove=not self.keep)

    def resume(self, identity: Mapping[str, object], resume: bool = True) -> dict[str, Any] | None:
        """Return the state that an interrupted run of the same identity has committed last.

        Parameters
        ----------
        identity
            What the result depends on, by words that a user knows; anything that JSON holds.
        resume
            If False, or where there is no such run, the folder is emptied.

        Returns
        -------
        dict or None
            None if there is nothing to resume from.

        Raises
        ------
        ResumeError
            If the interrupted run, or another rank, has another identity; the message says what is
            different.
        """
        for rank, other in enumerate(self._ranks.gather(dict(identity))):
            if changes := _changes(identity, other):
                raise ResumeError(f"MPI rank {rank} has another {changes}. Give all ranks the same")
        first = self._ranks.broadcast(self.inputs.stamps())
        self.inputs.are_those_of_first = not self._ranks.is_first and first == self.inputs.stamps()
        state = self._ranks.on_first(lambda: self._resume(identity, resume))
        self.keep = state is not None
        return state

    def commit(self, identity: Mapping[str, object], state: Mapping[str, Any]) -> None:
        """Commit the state to resume from, in place of the last; the files that it names exist by now."""
        self._committed = {"identity": dict(identity), "state": dict(state)}
        self.check_inputs(again=True)
        self.keep = True

    def require(self, path: Path, size: int, or_more: bool = False) -> None:
        """Raise ResumeError unless a file that a state counts on has so many bytes, or at least so many."""
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < size or (found > size and not or_more):
            matter = "is no longer there" if found is None else f"has {found} bytes, not {size}"
            raise ResumeError(f"{path}: {matter}; {again_message(self.path)}")

    def check_inputs(self, again: bool = False) -> None:
        """Raise CheckpointError if a file that the run reads, see `inputs`, is another by now, or another
        for one of the ranks; all of them call this together.

        The state is written `again`, or when it can tell more of these files."""
        error = None
        try:
            self.inputs.check()
        except CheckpointError as raised:
            error = raised
        for each in self._ranks.gather(error):
            if each is not None:
                raise each
        again |= self.inputs.take_checksums()
        self._compare_inputs()
        self._ranks.on_first(lambda: self._write_state() if again else None)

    def keep_checksums(self) -> None:
        """Write the state again if it can tell more of the files that the run reads; a rank may call this
        by itself."""
        if self.inputs.take_checksums() and self._ranks.is_first:
            self._write_state()

    def _compare_inputs(self) -> None:
        """Raise RankError if a rank has read another file under the name of one that the first has read."""
        first, *others = self._ranks.gather(self.inputs.checksums())
        for rank, checksums in enumerate(others, start=1):
            for path, checksum in checksums.items():
                if first.get(path, checksum) != checksum:
                    raise RankError(
                        f"{path}: is another file for MPI rank {rank} than for the first. Give all ranks "
                        f"the same"
                    )

    def _write_state(self) -> None:
        if self._committed:
            write_sealed(self.path / STATE, {**self._committed, INPUTS: self.inputs.records()})

    def require_seals(self, known: Mapping[str, Any], whole: bool = False) -> None:
        """Raise ResumeError if a file that a state counts on is not what it was then."""
        broken = self._ranks.on_first(lambda: self.seals.broken(known, whole))
        if broken is not None:
            raise ResumeError(
                f"{broken}: was changed since it was written, or is gone; {again_message(self.path)}"
            )

    def put_into_place(self, name: str, last: str) -> None:
        """Make a folder in here the output, in place of what is there, as the last step of a run.

        A run that is killed after that has finished, and leaves nothing to resume from; one that meets an
        error in it leaves what was there before, and so does the next one after one that is killed in it.
        Where a folder cannot be moved as a whole, its entries are moved one by one. This is called by the
        rank that writes.

        Parameters
        ----------
        name
            Of the folder.
        last
            The file that readers look for first, which comes after all others.
        """
        self.inputs.check()
        folder, aside = self.path / name, self.path / REPLACED
        entries = sorted(os.listdir(folder), key=lambda entry: (entry == last, entry))
        self._begin_last_step(name, *entries)
        try:
            with output_errors(self.out):
                if self.is_inside or not self._move_whole(folder, aside):
                    self._move_entries(folder, aside, entries)
                with suppress(OSError):  # some file systems cannot synchronize folders
                    synchronize(self.out.parent)
        except BaseException:
            self._put_back()
            raise
        remove_tree(aside)
        if aside.exists():
            warn(f"{aside}: what was replaced could not be removed")

    def put_file_into_place(self, name: str) -> None:
        """Make a file in here the output, in place of what is there, as the last step of a run; see
        `put_into_place`."""
        self.inputs.check()
        with output_errors(self.out):
            synchronize(self.path / name)
            self._begin_last_step(name)
            os.replace(self.path / name, self.out)
            with suppress(OSError):  # some file systems cannot synchronize folders
                synchronize(self.out.parent)

    def write_beside(self, name: str, place: Path) -> None:
        """Write a file in here to where it was asked for, before the output is put into its place.

        So a run that is killed between the two still has its last step to do, and one that has done it has
        written everything. What is in here stays: by it the file is known again, see `has_written`.
        """
        content = (self.path / name).read_bytes()
        with replaced(followed(place)) as partial:
            partial.write_bytes(content)

    def has_written(self, name: str, place: Path) -> bool:
        """Tell whether a file is what an interrupted run has written beside its output."""
        kept = self.path / name
        with suppress(OSError):
            return kept.is_file() and place.is_file() and kept.read_bytes() == place.read_bytes()
        return False

    def _move_whole(self, folder: Path, aside: Path) -> bool:
        """Move a folder into the place of the output; False, and nothing has changed, if what is there
        cannot be moved away as a whole."""
        try:
            if self.out.exists() and any(self.out.iterdir()):
                self.out.rename(aside)
            folder.rename(self.out)
        except OSError as error:
            self._put_back()
            if not self.out.is_dir() or error.errno not in UNMOVABLE:
                raise
            return False
        return True

    def _move_entries(self, folder: Path, aside: Path, entries: Sequence[str]) -> None:
        aside.mkdir(exist_ok=True)
        # The first of the old files to go is the last of the new ones to come: nobody takes what is there
        # meanwhile for whole.
        for old in sorted(content_of(self.out), key=lambda old: [old.name] != entries[-1:]):
            os.rename(old, aside / old.name)
        for entry in entries:
            if entry == entries[-1]:
                with suppress(OSError):  # some file systems cannot synchronize folders
                    synchronize(self.out)
            (folder / entry).rename(self.out / entry)
        with suppress(OSError):
            synchronize(self.out)
        folder.rmdir()

    def forget_finished(self) -> None:
        """Remove the folder if no run can resume from it: of a run that was killed at its very end."""
        with suppress(OSError):  # another run may have come first
            goes_on = not self._is_finished() and (self.path / STATE).is_file()
            if self._lock is None and self.path.is_dir() and not goes_on:
                self._enter()
                self._leave(remove=not self.keep)

    def take_back(self) -> None:
        """Take back the last step of a run that was killed in it: the output is as it was before."""
        with output_errors(self.out):
            name = self._last_step()[0]
            if self._lock is None and name and (self.path / name).exists():
                with suppress(OSError):  # another run may have come first
                    self._enter()
                    self._leave(remove=not self.keep)

    def clear(self) -> None:
        """Remove everything but the lock.

        Raises
        ------
        ResumeError
            If an interrupted run can be resumed from its content.
        """
        if self.keep:
            raise ResumeError(
                f"{self.path}: an interrupted run can resume from what it has left here. Give its command "
                f"again, or remove that"
            )
        self._ranks.on_first(self._clear)

    def _resume(self, identity: Mapping[str, object], resume: bool) -> dict[str, Any] | None:
        place = self.path / STATE
        if not resume or not place.is_file():
            self._clear()
            return None
        again = again_message(self.path)
        with malformed_as(ResumeError, f"{place}: is damaged", f"; {again}", CheckpointError):
            found = read_json_object(place)
            is_sealed = _is_sealed(found)
            state: dict[str, Any]
            known, state, inputs = found["identity"], found["state"], found[INPUTS]
            if not all(isinstance(part, dict) for part in (known, state, inputs)):
                raise ValueError("state")
            if not is_sealed:
                raise ValueError("its checksum is another")
        check_identity(self.path, known, identity)
        check_identity(self.path, *self.inputs.differences(inputs))
        self._committed = {"identity": dict(identity), "state": state}
        return state

    def _clear(self) -> None:
        with output_errors(self.path):
            # The state first: without it nothing is resumed from the rest.
            (self.path / STATE).unlink(missing_ok=True)
            for entry in list(self.path.iterdir()):
                if entry.is_dir() and not entry.is_symlink():
                    remove_tree(entry)
                elif entry.name not in (LOCK, LAST):
                    entry.unlink()
            (self.path / LAST).unlink(missing_ok=True)

    def _take(self) -> None:
        """Lock the folder, which is made if it is not there."""
        made = True
        try:
            self.path.mkdir()
        except FileExistsError:
            made = False
        place = self.path / LOCK
        is_ours = made or (self.path.is_dir() and (place.is_file() or not any(self.path.iterdir())))
        if not is_ours:
            raise OutputError(
                f"{self.path}: cannot be written: it is not what an interrupted run has left. Move it "
                f"away or write elsewhere"
            )
        lock = FileLock(place, LOCK_SECONDS, thread_local=False, on_acquired=_write_process)
        try:
            lock.acquire()
        except Timeout as error:
            process = ""
            with suppress(OSError), place.open("rb") as file:
                process = file.read(20).decode(errors="replace")
            raise OutputError(
                f"{self.out}: another run{f' (process {process})' if process else ''} is writing it. "
                f"Wait for its end or write elsewhere"
            ) from error
        except OSError:  # of a file system without locks
            if made:
                place.unlink(missing_ok=True)
            raise
        self._lock = lock

    def _put_back(self) -> None:
        """Take back the last step of a run that did not end it."""
        aside = self.path / REPLACED
        if not self.out.exists():
            if aside.is_dir():
                aside.rename(self.out)
            return
        name, *entries = self._last_step()
        folder = self.path / name
        if not name or not folder.exists():
            return
        for entry in entries:
            if not os.path.lexists(folder / entry) and os.path.lexists(self.out / entry):
                (self.out / entry).rename(folder / entry)
        if aside.is_dir():
            for old in sorted(aside.iterdir(), key=lambda old: [old.name] == entries[-1:]):
                old.rename(self.out / old.name)
            aside.rmdir()

    def _begin_last_step(self, *names: str) -> None:
        """Write down what is moved into place: a folder and its entries, or a file."""
        with output_errors(self.path):
            (self.path / LAST).write_bytes(os.fsencode("\0".join([*names, _checksum(names)])))
            synchronize(self.path / LAST)

    def _last_step(self) -> list[str]:
        """Return which folder is moved into place in the last step, and its entries."""
        last = self.path / LAST
        if not last.is_file() or not last.stat().st_size:
            return [""]
        *names, checksum = os.fsdecode(last.read_bytes()).split("\0")
        if not names or checksum != _checksum(names):
            raise OutputError(
                f"{last}: was changed since it was written, so nobody knows how far the run had come. Look "
                f"whether {self.out} holds what it should (what was there before may be in "
                f"{self.path / REPLACED}), then remove {self.path}"
            )
        return names

    def _is_finished(self) -> bool:
        name = self._last_step()[0]
        return bool(name) and not (self.path / name).exists()

    def _holds_anything(self) -> bool:
        return any(entry.name != LOCK for entry in self.path.iterdir())

    def _leave(self, remove: bool) -> None:
        if self._lock is None:
            return self._remove_parents()
        if remove:
            with suppress(OSError):  # OutputError is one
                self._put_back()
                self._clear()
                # The lock last: without it the next run would not know the folder.
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        self._lock.release()
        self._lock = None
        return self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in self._made_parents:
            with suppress(OSError):  # the output is there, or others have put something there
                parent.rmdir()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write what JSON holds, with a checksum of it."""
    write_json(path, {**content, CHECKSUM: content_checksum(content)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` has written; None if that is not there, or damaged."""
    with suppress(*MALFORMED):  # CheckpointError is one
        found = read_json_object(path) if path.is_file() else {}
        if _is_sealed(found):
            return found
    return None


def _is_sealed(found: dict[str, Any]) -> bool:
    """Take the checksum away from what was read, and tell whether it is that of the rest."""
    return bool(found.pop(CHECKSUM) == content_checksum(found))


def _write_process(descriptor: int) -> None:
    """Write into a lock which process holds it."""
    with suppress(OSError):  # of a full disk; the number is for messages only
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())


@contextmanager
def kept_until_written(work: WorkFolder) -> Iterator[WorkFolder]:
    """Hold a work folder of what an output is made from until that is written."""
    with work:
        try:
            yield work
        except OutputExistsError:
            work.keep = False  # of a run that was killed at its very end
            raise


def work_path(out: Path, part: str = "") -> Path:
    """Return the work folder of an output, or of a part of the run that writes it."""
    name = f".{out.name}.{part}.work" if part else f".{out.name}.work"
    return (out if _is_fixed(out) else out.parent) / name


def content_of(out: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, but for the work folders of what is written there."""
    own = {work_path(out, part).name for part in ("", SENSITIVITIES, GRADIENTS)}
    if is_mount_point(out):
        own.add(_OF_FILE_SYSTEMS)
    with os.scandir(out) as entries:
        return [entry for entry in entries if entry.name not in own]


def _is_fixed(out: Path) -> bool:
    """Tell whether an output is a folder that must stay, and be written into."""
    return out.is_dir() and (is_mount_point(out) or not os.access(out.parent, os.W_OK | os.X_OK))


def _checksum(names: Sequence[str]) -> str:
    return str(zlib.crc32(os.fsencode("\0".join(names))))


def again_message(path: Path) -> str:
    """Say how to start over in spite of an interrupted run."""
    return f"start over with --no-resume (resume=False), or remove {path}"


def as_identity(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Return what stands for arguments in an identity: a name in place of what JSON does not hold."""

    def named(value: Any) -> object:
        return (
            value.item()
            if isinstance(value, np.generic)
            else getattr(value, "__qualname__", str(value))
        )

    found: dict[str, Any] = json.loads(json.dumps(arguments, default=named))
    return found


def check_identity(
    place: Path, known: Mapping[str, object], identity: Mapping[str, object]
) -> None:
    """Raise ResumeError, saying what has changed, unless two identities are the same."""
    if changes := _changes(known, json.loads(json.dumps(identity))):
        raise ResumeError(
            f"{place}: an interrupted run had other options or inputs: {changes}. Give the same to go "
            f"on, or {again_message(place)}"
        )


def _changes(known: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Say in what two identities differ; nothing if they do not."""
    return ", ".join(
        f"{key} (was {shown(known.get(key))}, is {shown(wanted.get(key))})"
        for key in dict.fromkeys([*wanted, *known])
        if known.get(key) != wanted.get(key)
    )


def remove_tree(folder: Path) -> None:
    """Remove a folder with what is in it, as far as possible."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        # This is where most of the time goes, so this is where most interrupts arrive.
        shutil.rmtree(folder, ignore_errors=True)
        raise
