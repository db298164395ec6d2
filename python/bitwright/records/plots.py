"""Plots of runs, by matplotlib, which is not needed for anything else."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.errors import MissingExtraError, OutputError
from bitwright.files.home import expands_home
from bitwright.files.replacing import check_new_file, followed, replaced
from bitwright.files.text_file import read_bytes
from bitwright.records.reports import DwqReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARK = "bitwright.plots"  # identifies our plots, in the file types that have room for it
MOST_BYTES = 64 << 20  # of a plot
_METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": MARK},
    "svg": {"Creator": MARK, "Date": None},  # the same plot has the same bytes
    "pdf": {"Creator": MARK, "CreationDate": None},
    "eps": {"Creator": MARK},
    "ps": {"Creator": MARK},
}


@expands_home
def plot_dwq(report: DwqReport, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Plot the loss of every step and the KL of every validation, the first and the best marked.

    Parameters
    ----------
    report
        What `bitwright.dwq_quantize` returned.
    path
        File to write; its ending says how (.png, .svg, .pdf). None writes none.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    OutputError, ValueError
        If the file cannot be written, or its ending is unknown.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> from pathlib import Path
    >>> report = bitwright.DwqReport(
    ...     Path("out"), "kl", 2, 64, (0.4, 0.3), ((0, 0.4), (2, 0.3)), 2, None, 1.0, 64.0, 0
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bitwright.plot_dwq(report, f"{folder}/curves.svg").axes[0].get_xlabel()
    'step'
    """
    figure, axes = new_figure()
    axes.plot(
        range(1, report.steps + 1), report.losses, alpha=0.5, label=f"{report.loss}, training"
    )
    steps, values = zip(*report.validations, strict=True)
    axes.plot(steps, values, marker="o", label="KL, validation")
    axes.axhline(report.kl_before, linestyle=":", color="gray")
    axes.axhline(report.kl_after, linestyle=":", color="gray")
    axes.set(
        xlabel="step",
        ylabel="nats per token",
        title=f"validation KL {report.kl_before:.4f} before, {report.kl_after:.4f} after",
        ylim=(0, None),
    )
    axes.legend()
    save_figure(figure, path)
    return figure


class PlotBeside:
    """A plot beside an output, written just before the output appears.

    Parameters
    ----------
    path
        Where it is asked for; None for no plot.
    work
        The work folder of the output.
    overwrite
        Whether the plot may take the place of any file.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, work: WorkFolder, overwrite: bool
    ) -> None:
        self._path = None if path is None else Path(path)
        self._name = f"plot{'' if self._path is None else self._path.suffix}"
        self._work = work
        self._may_replace = overwrite

    def check(self) -> None:
        """Raise what `check_plot` raises; a plot left by an interrupted run may be replaced."""
        if self._path is not None:
            self._may_replace |= self._work.has_written(self._name, self._path)
            check_plot(self._path, self._may_replace)

    def write(self, plot: Callable[[Path], object]) -> None:
        """Let `plot` write it, if one was asked for."""
        if self._path is not None:
            self.check()  # hours may have passed
            plot(self._work.path / self._name)
            self._work.write_beside(self._name, self._path)


def require_matplotlib() -> None:
    """Raise MissingExtraError unless plots can be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib, which is not installed: pip install bitwright[plot]"
        ) from error


def check_plot(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an error unless a plot can be made and written there, in place of nothing or of another plot.

    Parameters
    ----------
    path
        The file.
    overwrite
        Whether it may take the place of any file.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    OutputExistsError, OutputError, ValueError
        If the file cannot be written, or its ending is unknown.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    place, known = Path(path), Figure().canvas.get_supported_filetypes()
    if place.suffix[1:].lower() not in known:
        raise ValueError(
            f"{place}: plots are written as {', '.join(sorted(known))}; choose an ending"
        )
    check_new_file(place, _read_mark, overwrite)


def _read_mark(path: Path) -> None:
    if MARK.encode() not in read_bytes(path, MOST_BYTES, OutputError):
        raise OutputError(f"{path}: is not a plot of bitwright's")


def new_figure(height: float = 4.0) -> tuple["Figure", "Axes"]:
    """Return a figure with its axes; it needs no screen, and notebooks show it."""
    require_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: "Figure", path: str | os.PathLike[str] | None) -> None:
    """Write a figure, if there is a path, as its ending says."""
    if path is None:
        return
    from matplotlib import rc_context

    kind = Path(path).suffix[1:].lower()
    with (
        replaced(followed(path)) as partial,
        rc_context({"svg.hashsalt": MARK}),
    ):  # or names are random
        figure.savefig(partial, format=kind, metadata=_METADATA.get(kind))
