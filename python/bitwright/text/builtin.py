"""The calibration text that the package carries, for who has none."""

from pathlib import Path

from bitwright.text.samples import BUILTIN, TokenSource
from bitwright.warned import warn


def calibration_text() -> Path:
    """Return the calibration text that the package carries: JSON lines, of about 280 kB.

    It holds prose in eighteen languages, documentation, code and chats; where each part comes from, and
    under which licence, is told in SOURCES.md beside it. It is used where no other is given. A text of
    the kind that the model will see serves better.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.calibration_text().name
    'calibration.jsonl'
    """
    return BUILTIN


def given_or_builtin(calibration: TokenSource | None) -> TokenSource:
    """Return what is calibrated on: what was given, or else the built-in text, with a warning."""
    if calibration is not None:
        return calibration
    warn(
        "no calibration text was given, so the built-in one is used (280 kB of prose, documentation, code "
        "and chats). A text of the kind that the model will see serves better: --calibration FILE"
    )
    return BUILTIN
