"""Limits of a run, and what it does with an existing output or an interrupted run."""

from dataclasses import dataclass

from bitwright.build import set_num_threads
from bitwright.runs.progress import Progressing


@dataclass(frozen=True)
class RunLimits:
    """Limits of a run; they change no bytes.

    Parameters
    ----------
    memory
        Gigabytes (10⁹ bytes) that the process may take; by default three quarters of what is free.
    resume
        Whether to resume an interrupted run of the same identity.
    overwrite
        Whether to replace an existing output.
    threads
        Number of threads from now on, in the whole process; None leaves it.
    progress
        Whether progress is shown, or what gets each record of it.
    """

    memory: float | None = None
    resume: bool = True
    overwrite: bool = False
    threads: int | None = None
    progress: Progressing = True

    def set_threads(self) -> None:
        """Set the number of threads, if one is given."""
        if self.threads is not None:
            set_num_threads(self.threads)
