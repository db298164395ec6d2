"""Expansion of ~ and ~user in paths, as in a shell."""

import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

P = ParamSpec("P")
R = TypeVar("R")


def expanded(place: Any) -> Any:
    """Return a path with ~ expanded; values that are no paths, and unknown users, stay as they are.

    Examples
    --------
    >>> expanded("model")
    'model'
    """
    if not isinstance(place, str | os.PathLike) or not os.fspath(place).startswith("~"):
        return place
    name = os.path.expanduser(os.fspath(place))
    return name if isinstance(place, str) else Path(name)


def expands_home(function: Callable[P, R]) -> Callable[P, R]:
    """Expand ~ in those arguments of a function that may be paths, as its annotations tell."""
    signature = inspect.signature(function)
    known = {name: each.annotation for name, each in signature.parameters.items()}
    single = {name for name, annotation in known.items() if _is_path(annotation)}
    several = {
        name
        for name, annotation in known.items()
        if get_origin(annotation) is Sequence and any(map(_is_path, get_args(annotation)))
    }

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in single:
                bound.arguments[name] = expanded(value)
            elif name in several:
                bound.arguments[name] = [expanded(each) for each in value]
        return function(*bound.args, **bound.kwargs)

    return call


def _is_path(annotation: object) -> bool:
    """Tell whether a parameter may be a path."""
    if annotation is Path or get_origin(annotation) is os.PathLike:
        return True
    return get_origin(annotation) is not Sequence and any(map(_is_path, get_args(annotation)))
