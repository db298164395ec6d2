"""Old spellings of options and arguments, which keep working: they are read as the present ones."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Old:
    """An option that has another name now.

    Parameters
    ----------
    name
        As it was, such as ``"--text"``, or ``"text"`` in Python.
    new
        As it is, such as ``"--evaluation"``; without dashes the argument of the command.
    beside
        Another option, as it was given: this holds only where that is given as well.
    """

    name: str
    new: str
    beside: str | None = None


def respelled(*old: Old) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keywords by their old names, with a DeprecationWarning that tells the new.

    Parameters
    ----------
    *old
        The old names; of several with one name the first that holds counts.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            known = dict[str, object](kwargs)
            for name in kwargs:
                found = next(
                    (o for o in old if o.name == name and o.beside in (None, *kwargs)), None
                )
                if found and found.new not in kwargs:
                    note = f"{function.__name__}: {name} is spelled {found.new} now"
                    warnings.warn(note, DeprecationWarning, stacklevel=2)
                    known[found.new] = known.pop(name)
            return function(*args, **known)  # type: ignore[arg-type]

        return call

    return decorate
