"""How people write a precision: ``BITS[:GROUP]``, ``GRID[:GROUP]``, ``fp8[:channel|:tensor|:128x128]``, or
a type of GGUF."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import get_args

from bitwright.errors import shown
from bitwright.formats.format import GroupSize
from bitwright.formats.gguf import BLOCK, GRIDS_OF_TYPES
from bitwright.grids.tables import SPELLED, TABLES
from bitwright.grids.tensor import BITS, K_GRIDS, Grid

KNOWN_GRIDS: dict[str, Grid] = {each: each for each in get_args(Grid)}
SCALED_BY: dict[str, Grid] = {"channel": "fp8", "tensor": "fp8_tensor", "128x128": "fp8_block"}
NEAR = 4  # names that are offered in place of an unknown one


@dataclass(frozen=True)
class Spelling:
    """A precision as it was written; what is not said is None, or ``"auto"`` of the group size.

    Examples
    --------
    >>> Spelling.parse("4:64")
    Spelling(bits=4, group_size=64, grid=None)
    >>> Spelling.parse("q4_k") == Spelling.parse("Q4_K")
    True
    """

    bits: int | None = None
    group_size: GroupSize = "auto"
    grid: Grid | None = None
    text: str = field(default="", compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> "Spelling":
        """Read a precision.

        Parameters
        ----------
        text
            Bits, a grid or a type of GGUF in any case; after a colon the group size, -1 for whole rows.

        Raises
        ------
        ValueError
            If it is none; the message tells the names that are near.
        """
        word, colon, size = str(text).partition(":")
        if word.lower() == "fp8" and colon:
            return cls._of_fp8(size.lower(), text)
        group_size: GroupSize = "auto"
        if colon:
            group_size = _group_size(text, size)
        if word in map(str, BITS):
            return cls(int(word), group_size, None, text)
        name = word.lower()
        if name in TABLES:
            return cls._of_table(KNOWN_GRIDS[name], group_size, text)
        if name in KNOWN_GRIDS:
            return cls(None, group_size, KNOWN_GRIDS[name], text)
        if word.upper() in GRIDS_OF_TYPES:
            if colon:
                raise ValueError(
                    f"{shown(text)}: {word.upper()} has groups of its own; leave {size} out"
                )
            grid, bits = GRIDS_OF_TYPES[word.upper()]
            own = K_GRIDS[bits].group_size if grid == "k" else BLOCK
            return cls(bits, own, grid, text)
        raise ValueError(f"{shown(text)} is no precision; {_known(word)}")

    @classmethod
    def of(cls, name: str, value: object) -> "Spelling":
        """Return what an argument ``bits``, ``group_size`` or ``grid`` says, in words or as a number.

        Raises
        ------
        ValueError
            If it says nothing of the kind.
        """
        if isinstance(value, str):
            return cls.parse(value)
        if name == "bits" and isinstance(value, int):
            return cls(value, text=str(value))  # what the format stores, it says itself
        if name == "group_size" and (value is None or isinstance(value, int)):
            return cls(group_size=-1 if value is None else value, text=str(value))
        raise ValueError(f"{name}: expected a precision, got {value!r}")

    @classmethod
    def _of_table(cls, grid: Grid, group_size: GroupSize, text: str) -> "Spelling":
        table = TABLES[grid]
        size = table.group_size or -1
        if group_size not in ("auto", size):
            words = "whole rows" if size == -1 else f"groups of {size}"
            raise ValueError(f"{shown(text)}: {grid} has {words}, no others")
        return cls(table.bits, size, grid, text)

    @classmethod
    def _of_fp8(cls, what: str, text: str) -> "Spelling":
        if what not in SCALED_BY:
            raise ValueError(
                f"{shown(text)}: fp8 has a scale for each {' or '.join(SCALED_BY)}, not {shown(what)}"
            )
        return cls._of_table(SCALED_BY[what], "auto", text)

    def changes(self) -> dict[str, int | str]:
        """Return what is said, as an override of `bitwright.quantize`."""
        said = {"bits": self.bits, "group_size": self.group_size, "grid": self.grid}
        return {name: each for name, each in said.items() if each not in (None, "auto")}


def combined(said: Mapping[str, Spelling]) -> Spelling:
    """Return what several options say together.

    Parameters
    ----------
    said
        By the name of each option.

    Raises
    ------
    ValueError
        If two of them contradict each other, which the message names.
    """
    found: dict[str, tuple[str, int | str]] = {}
    for option, spelling in said.items():
        for part, value in spelling.changes().items():
            other, known = found.setdefault(part, (option, value))
            if known != value:
                raise ValueError(
                    f"{option}: {spelling.text} contradicts {other} {said[other].text}, which says "
                    f"{part} {known}; give one of the two"
                )
    parts = {part: value for part, (_, value) in found.items()}
    return Spelling(**parts)  # type: ignore[arg-type]


def _group_size(text: str, size: str) -> int:
    try:
        number = int(size)
    except ValueError:
        number = 0
    if number > 0 or number == -1:
        return number
    raise ValueError(
        f"{shown(text)}: the group size is a number, or -1 for whole rows, not {shown(size)}"
    )


def _known(word: str) -> str:
    grids = [SPELLED.get(each, each) for each in KNOWN_GRIDS]
    names = {each.lower(): each for each in (*grids, *GRIDS_OF_TYPES)}
    near = [names[each] for each in get_close_matches(word.lower(), names, NEAR, 0.4)]
    bits = ", ".join(map(str, BITS))
    return (
        f"write bits ({bits}) and, after a colon, the group size, as in 4:64; or a grid or type"
        + (f", such as {', '.join(near)}" if near else f": {', '.join(names.values())}")
    )
