"""The state that a quantizing run commits after every block, and resumes from."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bitwright.checkpoint.work_folder import STATE, WorkFolder, again_message, remove_tree
from bitwright.errors import (
    BitwrightError,
    CheckpointError,
    MemoryBudgetError,
    ResumeError,
    malformed_as,
)
from bitwright.files.replacing import output_errors
from bitwright.ranks import current
from bitwright.runs.states import States

SCRATCH = "scratch"


class Recorded(Protocol):
    """An object with a state to commit."""

    def state(self) -> dict[str, Any]:
        """Return what it needs to resume from here, for JSON."""
        ...


class RecordedFiles(Recorded, Protocol):
    """A writer of files; those of a state are on the disk when `state` returns."""

    def files(self) -> dict[Path, int]:
        """Return the files that its state counts on, and how many bytes of each."""
        ...

    def committed(self) -> None:
        """Remove files that only a state before the last one needs."""
        ...


class Journal:
    """The states of a run, one after each block; the last complete one counts.

    Parameters
    ----------
    work
        Where it is kept; entered.
    identity
        What the result depends on, see `WorkFolder.resume`.
    start
        When this process began, as ``time.perf_counter`` has it.
    """

    def __init__(self, work: WorkFolder, identity: Mapping[str, object], start: float) -> None:
        self._work = work
        self._identity = dict(identity)
        self._start = start
        self._before = 0.0  # seconds of the interrupted runs
        self._ranks = current()
        self.scratch = work.path / SCRATCH

    def begin(self, resume: bool) -> dict[str, Any] | None:
        """Return the state to resume from, None for none, and make room for scratch files."""
        state = self._work.resume(self._identity, resume)
        if state is not None:
            with self.going_on():
                self._before = float(state["seconds"])
        self._ranks.on_first(self._make_scratch)
        return state

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Raise ResumeError where a state is not what `commit` has written."""
        damaged = f"{self._work.path / STATE}: is damaged"
        with malformed_as(ResumeError, damaged, f"; {again_message(self._work.path)}"):
            yield

    def check_files(self, state: Mapping[str, Any]) -> None:
        """Raise ResumeError if a file that a state counts on has changed; what writes them is restored."""
        self._work.require_seals(state["seals"])

    def states_file(self, name: str, size: int) -> Path:
        """Return the file of hidden states that a state names, which holds so many bytes."""
        path = self._work.path / name
        self._work.require(path, size)
        return path

    def commit(
        self,
        blocks: int,
        output: Recorded | None,
        writer: RecordedFiles | None,
        states: Mapping[str, States | None],
    ) -> None:
        """Commit the state after so many blocks; all ranks call this together."""
        names = {key: f"{key}-{blocks}" for key, value in states.items() if value is not None}
        for key, name in names.items():
            kept = states[key]
            if kept is not None:
                path = self._work.path / name
                self._work.seals.note(path, *kept.save(path))
        self._ranks.barrier()

        def sealed() -> dict[str, tuple[int, int]]:
            paths = [self._work.path / name for name in names.values()]
            files = {path: path.stat().st_size for path in paths}
            return self._work.seals.of(files | ({} if writer is None else writer.files()))

        state = {
            "blocks": blocks,
            "seconds": self.seconds(),
            "states": names,
            "output": None if output is None else output.state(),
            "writer": None if writer is None else writer.state(),
            "seals": self._ranks.on_first(sealed),
        }
        self._work.commit(self._identity, state)
        if writer is not None:
            writer.committed()
            for old in self._work.path.glob("*-*"):
                if old.name not in names.values():
                    old.unlink(missing_ok=True)

    def seconds(self) -> float:
        """Return the wall time of this run, with that of the interrupted ones until their last commits."""
        return self._before + time.perf_counter() - self._start

    def _make_scratch(self) -> None:
        with output_errors(self.scratch):
            remove_tree(self.scratch)
            self.scratch.mkdir()


@contextmanager
def kept_when_interrupted(work: WorkFolder) -> Iterator[None]:
    """Add to an interruption, or an error that a user can mend, that the same call resumes what is done;
    after any other error nothing is kept."""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, BitwrightError)
        if isinstance(error, KeyboardInterrupt | ResumeError):
            raise
        resumes = f". Once that is mended, the same call resumes from what is done, in {work.path}"
        work.keep = work.keep and work.path.is_dir()
        if isinstance(error, MemoryError) and not known:
            what = f"{work.out}: memory is used up ({error or 'no reason given'})"
            remedy = "; give the run less of it (memory, --memory), or stop what else needs it"
            raise MemoryBudgetError(f"{what}{remedy}{resumes if work.keep else ''}") from error
        if work.keep and known and isinstance(error, OSError | CheckpointError):
            raise type(error)(f"{error}{resumes}") from error
        # A wrong value would be wrong again.
        work.keep = work.keep and (
            isinstance(error, CheckpointError) or not isinstance(error, ValueError | TypeError)
        )
        raise
