"""What made an output: the command, or the call in Python, as it was given."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from bitwright.formats.loading_code import shell_word


@dataclass(frozen=True)
class Made:
    """What made an output: the command or call as it was given, and of a command its name and settings."""

    command: str | None = None
    name: str = ""
    settings: Mapping[str, object] | None = None


_made_by: ContextVar[Made | None] = ContextVar("made_by", default=None)


@contextmanager
def made_by(
    command: str, name: str = "", settings: Mapping[str, object] | None = None
) -> Iterator[None]:
    """Set the command, or the call in Python, that cards written in this context name.

    Of several around each other the outermost counts: that is what a user gave.

    Parameters
    ----------
    command
        As it was given.
    name, settings
        Of a command, its name and its settings, as `--config` takes them.

    Examples
    --------
    >>> with made_by(command_line(["quantize", "my model", "--out", "q"])):
    ...     print(made_with().command)
    bitwright quantize 'my model' --out q
    """
    token = _made_by.set(_made_by.get() or Made(command, name, settings))
    try:
        yield
    finally:
        _made_by.reset(token)


def made_with() -> Made:
    """Return what `made_by` has set."""
    return _made_by.get() or Made()


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that runs bitwright with these arguments, quoted for a shell; absolute paths are
    told by their names alone.

    Examples
    --------
    >>> command_line(["quantize", "/home/me/models/story", "--out=/tmp/my q", "--bits", "3"])
    "bitwright quantize story '--out=my q' --bits 3"
    """
    told = []
    for each in arguments:
        option, equals, value = each.partition("=")
        is_option = equals and option.startswith("--")
        told.append(f"{option}={without_place(value)}" if is_option else without_place(each))
    return " ".join(["bitwright", *map(shell_word, told)])


def without_place(path: str) -> str:
    """Return a path without private parts: of one that is absolute, or in a home folder, only the name."""
    if not path.startswith(("/", "~")):
        return path
    return os.path.basename(os.path.normpath(path)) or path
