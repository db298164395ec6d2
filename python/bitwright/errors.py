"""The errors that bitwright raises for bad input, each worded for the person who has to fix it."""

import reprlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager


class BitwrightError(Exception):
    """Base of every error that bitwright raises on purpose.

    Parameters
    ----------
    message : str
        What is wrong, where, and what to do about it; one line, in which `printable` escapes what is none.
    """

    # One argument only: OSError's two-argument form would turn the message into "[Errno ...]".
    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckpointError(BitwrightError, ValueError):
    """A checkpoint's files contradict each other or their format."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint folder, or a file that it needs, does not exist."""


class UnsupportedModelError(CheckpointError):
    """A sound checkpoint asks for something that bitwright cannot compute."""


class CalibrationError(BitwrightError, ValueError):
    """Calibration data cannot be read, or there is too little of it."""


class TargetsError(BitwrightError, ValueError):
    """A teacher's targets are incomplete or damaged, or of something else."""


class StatisticsError(BitwrightError, ValueError):
    """Files of statistics are incomplete or damaged, or do not belong together or to a model."""


class SensitivityError(BitwrightError, ValueError):
    """A file of sensitivities is damaged, or of another model."""


class RecipeError(BitwrightError, ValueError):
    """A file with the precision of every layer is damaged, or of another model."""


class ResumeError(BitwrightError, ValueError):
    """An interrupted run cannot be resumed from what it has left."""


class ConfigError(BitwrightError, ValueError):
    """A file of settings holds something that a command does not take."""


class HubError(BitwrightError, OSError):
    """The hub does not take a model."""


class RankError(BitwrightError, ValueError):
    """The ranks of one MPI run hold different things where they must not."""


class MemoryBudgetError(BitwrightError, MemoryError):
    """A run would take more memory than it may.

    Parameters
    ----------
    message
        What is wrong.
    least
        Bytes that would be enough, where that is known.
    """

    def __init__(self, message: str, least: int = 0) -> None:
        super().__init__(message)
        self.least = least


class NonFiniteError(BitwrightError, ValueError):
    """NaN or infinity where a finite number is needed."""


class MissingExtraError(BitwrightError, ImportError):
    """Something needs packages that are only installed on request."""


class OutputError(BitwrightError, OSError):
    """Results cannot be written."""


class OutputExistsError(OutputError, FileExistsError):
    """The place for the results is taken, and overwriting was not asked for."""


MALFORMED = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)


@contextmanager
def malformed_as(
    kind: type[BitwrightError], what: str, remedy: str, *also: type[Exception]
) -> Iterator[None]:
    """Turn what goes wrong while a file is taken apart into one error; what is of its kind passes.

    Parameters
    ----------
    kind : type
        Of the error.
    what : str
        The file, and what is the matter with it; the reason follows in brackets.
    remedy : str
        What to do about it.
    also : type
        Errors besides `MALFORMED` that are meant.
    """
    meant: tuple[type[Exception], ...] = (*MALFORMED, *also)
    try:
        yield
    except kind:
        raise
    except meant as error:
        raise kind(f"{what} ({shown(str(error))}){remedy}") from error


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raise ValueError unless an argument is one of the words that it may be."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlevel = 2


def shown(value: object) -> str:
    """Write a value that came out of a file, so that it is safe and short enough for a message.

    Parameters
    ----------
    value : object
        Anything; strings are quoted, control characters escaped.

    Returns
    -------
    str
        At most a few hundred printable characters.

    Examples
    --------
    >>> shown("a\\n")
    "'a\\\\n'"
    """
    return _REPR.repr(value)


def printable(text: str) -> str:
    """Escape what a terminal would act on, or not show: names of files and tensors may hold anything.

    Parameters
    ----------
    text : str
        For people, of one line: a message, a warning, a cell of a table.

    Returns
    -------
    str
        The same, with line ends, control characters, invisible ones and bytes that are no text as Python
        escapes them. Doing it twice changes nothing more.

    Examples
    --------
    >>> printable("a\\nb.safetensors")
    'a\\\\nb.safetensors'
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
