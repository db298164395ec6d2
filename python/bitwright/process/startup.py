"""Runs first when the command starts, before slow imports; does nothing in other programs.

The package imports it first. With ``python -m bitwright`` nothing of ours runs earlier."""

import os
import sys

from bitwright.process.interruption import while_starting


def is_command(arguments: list[str], words: list[str]) -> bool:
    """Tell whether this program is the bitwright command.

    Parameters
    ----------
    arguments
        ``sys.argv``.
    words
        ``sys.orig_argv``, which ends with the same but for the first: there it has the module that ``-m``
        names.
    """
    if arguments[:1] == ["-m"]:
        return words[-len(arguments) :][:1] in (["bitwright"], ["-mbitwright"])
    return bool(arguments) and os.path.basename(arguments[0]) == "bitwright"


def keep_standard_streams() -> None:
    """Open those that are closed: the next file would get their number, and with it what is said there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


if is_command(getattr(sys, "argv", []), sys.orig_argv):
    while_starting()
    keep_standard_streams()
