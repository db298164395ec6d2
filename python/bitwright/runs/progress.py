"""Progress of long calls: bars in terminals and notebooks, lines elsewhere, records for callbacks."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from bitwright.ranks import current

LOGGER = logging.getLogger("bitwright")
TENTHS = 10  # lines of a phase that has no blocks


@dataclass(frozen=True)
class Progress:
    """How far a long call is: what a function that is given as `progress` gets at every step.

    An error that it raises ends the call, as an interruption would: what can be resumed can be resumed.

    Parameters
    ----------
    phase
        What is done now, such as ``"quantizing"``.
    number, phases
        Which phase of how many it is, from 1.
    done, total
        Of this phase, in `unit`.
    unit
        What is counted, such as ``"blocks"``; ``""`` where only the ratio means something.
    figures
        What is known of the result so far, such as a block's error.
    share
        Of the whole call that is done, from 0 to 1, by what the phases usually take.
    seconds
        Since the call has begun.
    seconds_left
        Of the whole call, as far as can be told; None as long as it cannot.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo, seen = bitwright.demo_folder(), []
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.quantize(demo, f"{folder}/q", "rtn", 4, progress=seen.append)
    >>> seen[-1].phase, seen[-1].done, seen[-1].total, seen[-1].unit, seen[-1].share
    ('quantizing', 3, 3, 'blocks', 1.0)
    """

    phase: str
    number: int
    phases: int
    done: float
    total: float
    unit: str
    figures: str
    share: float
    seconds: float
    seconds_left: float | None

    def __str__(self) -> str:
        several = self.phases > 1
        ratio = self.done / self.total if self.total else 1.0
        how_far = (
            f"{self.done:g} of {self.total:g} {self.unit}" if self.unit else f"{100 * ratio:.0f} %"
        )
        whole = f"{100 * self.share:.0f} % of all" if several else ""
        left = "" if self.seconds_left is None else f"{duration(self.seconds_left)} left"
        told = ", ".join(filter(None, (how_far, self.figures, whole, left)))
        place = f"phase {self.number} of {self.phases}, " if several else ""
        return f"{place}{self.phase}: {told}"


Progressing = bool | Callable[[Progress], object]
"""Whether progress is shown, or what is called with each record of it."""


class _Display(Protocol):
    def __call__(self, record: Progress) -> object: ...

    def close(self) -> None: ...


class Phase:
    """One phase of a call.

    Parameters
    ----------
    whole
        The call.
    title, total, done, unit
        As in `Progress`, at its beginning.
    place
        Among the phases of the call; None for one that the call has not known of.
    shown
        Whether anybody wants to know.
    """

    def __init__(
        self,
        whole: "_Whole",
        title: str,
        total: float,
        done: float,
        unit: str,
        place: int | None,
        shown: bool,
    ) -> None:
        self._whole, self._title, self._unit = whole, title, unit
        self._total, self._done, self._figures = total, done, ""
        self._place = place
        self._shown = shown
        self._tell()

    def step(self, figures: str | None = None) -> None:
        """Tell that one more is done."""
        self.update(self._done + 1, figures)

    def update(self, done: float, figures: str | None = None) -> None:
        """Tell how much is done, and what is known of the result."""
        self._done = done
        self._figures = self._figures if figures is None else figures
        self._tell()

    def _tell(self) -> None:
        if self._shown:
            ratio = self._done / self._total if self._total else 1.0
            told = self._title, self._done, self._total, self._unit, self._figures
            self._whole.tell(self._place, ratio, *told)


class _Whole:
    """A call with all its phases, by titles and what they usually take."""

    def __init__(self, progress: Progressing, phases: Sequence[tuple[str, float]]) -> None:
        self.shown = progress is not False
        self._phases = phases
        self._reached = -1
        self._started = time.perf_counter()
        self._share_at_first: float | None = None
        self.displays: list[_Display] = []
        logged = LOGGER.isEnabledFor(logging.INFO)
        if not current().is_first:
            return
        if logged:
            self.displays.append(_Lines(LOGGER.info))
        if callable(progress):
            self.displays.append(_Callback(progress))
        elif progress and (display := _display(logged and LOGGER.hasHandlers())):
            self.displays.append(display)

    def place(self, title: str) -> int | None:
        """Return the next place of a phase with this title, which begins."""
        for place in range(self._reached + 1, len(self._phases)):
            if self._phases[place][0] == title:
                self._reached = place
                return place
        return None

    def tell(
        self,
        place: int | None,
        ratio: float,
        title: str,
        done: float,
        total: float,
        unit: str,
        figures: str,
    ) -> None:
        """Tell all displays how far a phase is."""
        weights = [weight for _, weight in self._phases]
        at, own = (self._reached, 0.0) if place is None else (place, ratio * weights[place])
        share = (sum(weights[: max(at, 0)]) + own) / sum(weights)
        seconds = time.perf_counter() - self._started
        if self._share_at_first is None:
            self._share_at_first = share
        gained = share - self._share_at_first
        left = seconds * (1 - share) / gained if gained > 0 else None
        record = Progress(
            *(title, max(at, 0) + 1, len(weights), done, total, unit, figures),
            *(min(share, 1.0), seconds, left),
        )
        for display in self.displays:
            display(record)

    def close(self) -> None:
        """End all displays."""
        for display in self.displays:
            display.close()


_whole: ContextVar[_Whole | None] = ContextVar("whole", default=None)


@contextmanager
def in_phases(progress: Progressing, *phases: tuple[str, float]) -> Iterator[None]:
    """Show the phases that begin in this context as those of one call, with a total over all.

    Of several such contexts around each other the outermost counts.

    Parameters
    ----------
    progress
        Whether they are shown, or what is called with each record.
    *phases
        Titles in their order, each with what it usually takes, in any unit.
    """
    if _whole.get() is not None:
        yield
        return
    whole = _Whole(progress, phases)
    token = _whole.set(whole)
    try:
        yield
    finally:
        _whole.reset(token)
        whole.close()


@contextmanager
def phase(
    title: str, progress: Progressing, total: float = 1.0, *, done: float = 0, unit: str = ""
) -> Iterator[Phase]:
    """Show one phase: that of a call with several where one is running, or else a call by itself.

    Parameters
    ----------
    title
        What is done.
    progress
        Whether it is shown, or what is called with each record; in a call with several phases only
        whether.
    total, done, unit
        As in `Progress`.
    """
    is_part = _whole.get() is not None
    with in_phases(progress, (title, 1.0)):
        whole = _whole.get()
        assert whole is not None
        hidden = is_part and progress is False and whole.shown
        told = bool(whole.displays) and not hidden
        yield Phase(whole, title, total, done, unit, whole.place(title), told)


def say(line: str, progress: Progressing) -> None:
    """Say a line to whoever is shown progress, and to the log."""
    if not current().is_first:
        return
    LOGGER.info(line)
    if progress is True and not (LOGGER.isEnabledFor(logging.INFO) and LOGGER.hasHandlers()):
        _print(line)


def duration(seconds: float) -> str:
    """Write a time in hours and minutes, or minutes and seconds.

    Examples
    --------
    >>> duration(71.2), duration(4000)
    ('1 min 11 s', '1 h 6 min')
    """
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _print(line: str) -> None:
    with suppress(OSError, ValueError):  # where standard error is full, or closed
        print(line, file=sys.stderr, flush=True)


def _display(logged: bool) -> _Display | None:
    """Return what shows progress here: bars, or lines unless these go to a log that is kept already."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        with suppress(ImportError):
            return _NotebookBars()
    elif sys.stderr is not None and sys.stderr.isatty():
        return _Bars()
    return None if logged else _Lines(_print)


class _Callback:
    def __init__(self, function: Callable[[Progress], object]) -> None:
        self._function = function

    def __call__(self, record: Progress) -> None:
        self._function(record)

    def close(self) -> None: ...


class _Lines:
    """A line for every block, and for every tenth of what has none."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._last: tuple[object, ...] = ()

    def __call__(self, record: Progress) -> None:
        ratio = record.done / record.total if record.total else 1.0
        step = record.done if record.unit == "blocks" else int(TENTHS * ratio + 1e-9)
        this = record.number, record.phase, step
        if this != self._last and (self._last[:2] == this[:2] or record.total == record.done):
            self._write(str(record))
        self._last = this

    def close(self) -> None: ...


class _Bars:
    """Bars on standard error: one for each phase, and above them one for all if there are several."""

    def __init__(self) -> None:
        # Takes a fifth of a second, which a run without bars can do without.
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Column
        from rich.text import Text

        class Left(ProgressColumn):
            """The time left, which goes down between two steps, too."""

            def render(self, task: Any) -> Text:
                until = task.fields["until"]
                if until is None:
                    return Text("-:--:-- left")
                minutes, seconds = divmod(max(0, round(until - time.perf_counter())), 60)
                return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")

        class Figures(ProgressColumn):
            """What is known, as much of it as there is room for."""

            def render(self, task: Any) -> Text:
                return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")

        def whole() -> Column:
            return Column(no_wrap=True)

        self._bars = Bars(
            TextColumn("{task.description}", table_column=whole()),
            BarColumn(bar_width=12, table_column=whole()),
            TextColumn("{task.fields[how_far]}", table_column=whole()),
            Left(table_column=whole()),
            Figures(),
            console=Console(stderr=True),
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._all: Any = None
        self._phase: tuple[object, ...] = ()
        self._task: Any = None
        self._begun = 0.0, 0.0  # when the phase began, and what was done then

    def __call__(self, record: Progress) -> None:
        now = time.perf_counter()
        if not self._phase:
            self._bars.start()
            if record.phases > 1:
                self._all = self._bars.add_task("in all", total=1.0, **_fields("", "", None))
        if self._phase != (record.number, record.phase):
            self._phase, self._begun = (record.number, record.phase), (now, record.done)
            place = f"{record.number}/{record.phases} " if record.phases > 1 else ""
            self._task = self._bars.add_task(f"{place}{record.phase}", **_fields("", "", None))
        begun, done = self._begun
        gained, left = record.done - done, record.total - record.done
        until = now + (now - begun) * left / gained if gained > 0 else None
        if record.phases == 1:
            until = None if record.seconds_left is None else now + record.seconds_left
        how_far = f"{record.done:g}/{record.total:g} {record.unit}"
        if not record.unit:
            how_far = f"{100 * record.done / record.total if record.total else 100:.0f} %"
        self._bars.update(
            self._task,
            total=record.total,
            completed=record.done,
            **_fields(how_far, record.figures, until),
        )
        if self._all is not None:
            whole = None if record.seconds_left is None else now + record.seconds_left
            told = _fields(f"{100 * record.share:.0f} %", "", whole)
            self._bars.update(self._all, completed=record.share, **told)

    def close(self) -> None:
        self._bars.stop()


def _fields(how_far: str, figures: str, until: float | None) -> dict[str, Any]:
    return {"how_far": how_far, "figures": figures, "until": until}


class _NotebookBars:
    """The bars of Jupyter; ImportError without ipywidgets (the extra notebook)."""

    def __init__(self) -> None:
        self._widgets: Any = import_module("ipywidgets")
        self._show: Any = import_module("IPython.display").display
        self._box: Any = None
        self._all: Any = None
        self._bar: Any = None
        self._label: Any = None
        self._phase: tuple[object, ...] = ()

    def __call__(self, record: Progress) -> None:
        if self._box is None:
            self._box = self._widgets.VBox([])
            self._show(self._box)
            if record.phases > 1:
                self._all, _ = self._add("in all", 1.0)
        if self._phase != (record.number, record.phase):
            self._phase = record.number, record.phase
            self._bar, self._label = self._add(record.phase, record.total)
        self._bar.value = record.done
        self._label.value = str(record)
        if record.done >= record.total:
            self._bar.bar_style = "success"
        if self._all is not None:
            self._all.value = record.share

    def _add(self, title: str, most: float) -> tuple[Any, Any]:
        bar = self._widgets.FloatProgress(min=0.0, max=most, description=title)
        label = self._widgets.Label("")
        self._box.children = (*self._box.children, self._widgets.HBox([bar, label]))
        return bar, label

    def close(self) -> None: ...
