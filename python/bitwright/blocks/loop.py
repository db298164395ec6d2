"""The loop over the blocks of a model, which is resumed after the last complete one."""

from collections.abc import Mapping
from typing import Any, Protocol

from bitwright.runs.journal import Journal, Recorded, RecordedFiles
from bitwright.runs.progress import Progressing, phase
from bitwright.runs.states import States


class BlockPass(Protocol):
    """What is done with each block, and what is kept of it."""

    @property
    def output(self) -> Recorded | None:
        """What is reported."""
        ...

    @property
    def writer(self) -> RecordedFiles | None:
        """What is written."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `output` and `writer` back to a state of the journal."""
        ...

    def begin(self, journal: Journal, state: Mapping[str, Any] | None) -> None:
        """Prepare for the first block that is left."""
        ...

    def run_block(self, index: int) -> str:
        """Do what is to do with block `index`; return figures to show."""
        ...

    def kept(self, index: int) -> Mapping[str, States | None]:
        """Return the states that a run needs to resume after block `index`."""
        ...


def through_blocks(
    work: BlockPass,
    journal: Journal,
    state: Mapping[str, Any] | None,
    count: int,
    label: str,
    progress: Progressing,
) -> None:
    """Go through the blocks that are left and commit each.

    Parameters
    ----------
    work
        What is done.
    journal, state
        Of the run, as ``journal.begin`` has returned it.
    count
        How many blocks there are.
    label, progress
        The title of this phase, and whether it is shown.
    """
    first = 0
    if state is not None:
        with journal.going_on():
            first = int(state["blocks"])
            work.restore(state)
            journal.check_files(state)
    work.begin(journal, state)
    with phase(label, progress, count, done=first, unit="blocks") as shown:
        for index in range(first, count):
            figures = work.run_block(index)
            journal.commit(index + 1, work.output, work.writer, work.kept(index))
            shown.step(figures)
