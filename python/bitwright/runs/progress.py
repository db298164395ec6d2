"""Progress bars, on standard error."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def progress_bar(title: str, shown: bool = True, counted: str | None = None) -> Progress:
    """Return a bar with the time left.

    Parameters
    ----------
    title
        The work that is shown.
    shown
        Whether anything is printed.
    counted
        What the steps are; where it is given they are counted, otherwise it is per cent.

    Returns
    -------
    Progress
        Its tasks have a field ``figures``, printed at the end.
    """
    done: tuple[ProgressColumn, ...] = (TaskProgressColumn(), TextColumn("time left"))
    if counted is not None:
        done = (MofNCompleteColumn(), TextColumn(f"{counted}, time left"))
    return Progress(
        TextColumn(title),
        BarColumn(),
        *done,
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
        disable=not shown,
    )
