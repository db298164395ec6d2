"""Warnings: what a run can live with, but whoever reads its result should know.

Each is one line on standard error, and in the report of the call that it was given in."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

from bitwright.errors import printable
from bitwright.ranks import current

P = ParamSpec("P")
PACKAGE = str(Path(__file__).parent)
_collectors: ContextVar[tuple[list[str], ...]] = ContextVar("collectors", default=())


class BitwrightWarning(UserWarning):
    """A result that is not quite what was asked for, or an input that is not quite what it says."""


class _Report(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def warnings(self) -> tuple[str, ...]: ...


R = TypeVar("R", bound=_Report)


def warn(message: str) -> None:
    """Give a warning: once to each call that is running, and once to whoever called bitwright.

    Parameters
    ----------
    message : str
        One line: what is wrong, where, and what to do about it.
    """
    message = printable(message)
    collectors = _collectors.get()
    is_new = not collectors or message not in collectors[0]
    for messages in collectors:
        if message not in messages:
            messages.append(message)
    if is_new and current().is_first:
        warnings.warn(message, BitwrightWarning, stacklevel=_outside())


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collect the warnings that are given inside, in the order in which they came."""
    messages: list[str] = []
    token = _collectors.set((*_collectors.get(), messages))
    try:
        yield messages
    finally:
        _collectors.reset(token)


def reports_warnings(function: Callable[P, R]) -> Callable[P, R]:
    """Put the warnings that a function gives into the report that it returns."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with collected() as messages:
            report = function(*args, **kwargs)
            return replace(report, warnings=tuple(messages))

    return call


def _outside() -> int:
    """Return the stack level of the first caller that is not bitwright itself."""
    level, frame = 2, sys._getframe(2)
    own = (PACKAGE, contextlib.__file__)  # which calls what a context manager decorates
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        level, frame = level + 1, frame.f_back
    return level
