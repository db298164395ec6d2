"""Several files of texts with shares, and the key that their records have their text under."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import CalibrationError, shown
from bitwright.files.home import expanded

LARGEST_SHARE = 1e9  # of sums that are exact


@dataclass(frozen=True)
class TextFiles:
    """Files to take samples of, in place of one.

    Parameters
    ----------
    files
        Each file and its share of the samples; shares are compared with each other.
    text_key
        The key of each record's text, or of its list of messages; by default the first shape that is known
        counts. Dots lead into nested objects.

    Examples
    --------
    >>> TextFiles.of("a.jsonl:3,b.txt").files
    ((PosixPath('a.jsonl'), 3.0), (PosixPath('b.txt'), 1.0))
    """

    files: tuple[tuple[Path, float], ...]
    text_key: str | None = None

    @classmethod
    def of(
        cls,
        source: "str | os.PathLike[str] | Mapping[str, float] | TextFiles",
        text_key: str | None = None,
    ) -> "TextFiles":
        """Return what a path, ``PATH:SHARE,PATH:SHARE,…`` or a mapping of paths to shares means.

        What exists under the whole name is that file.

        Raises
        ------
        CalibrationError
            If a share is no number above 0, or there is no name before it.
        """
        if isinstance(source, TextFiles):
            return source if text_key is None else cls(source.files, text_key)
        if isinstance(source, Mapping):
            named = [(Path(expanded(path)), share) for path, share in source.items()]
        elif isinstance(source, os.PathLike) and "," not in os.fspath(source):
            named = [(Path(expanded(source)), 1.0)]
        else:
            named = _spelled(os.fspath(source))
        for path, share in named:
            if not isinstance(share, int | float) or not 0 < share < LARGEST_SHARE:
                raise CalibrationError(
                    f"{path}: its share is {shown(share)}, but must be above 0, and below "
                    f"{LARGEST_SHARE:g}"
                )
        return cls(tuple((path, float(share)) for path, share in named), text_key)

    def shared(self, most: Sequence[int], samples: int | None) -> list[int]:
        """Tell how many samples each file gives.

        Parameters
        ----------
        most
            How many each has.
        samples
            How many there are to be; by default as many as the shares allow.

        Examples
        --------
        >>> TextFiles.of("a.jsonl:3,b.txt").shared([30, 30], None)
        [30, 10]
        """
        whole = sum(share for _, share in self.files)
        if samples is None:
            samples = int(
                min(each * whole / share for (_, share), each in zip(self.files, most, strict=True))
            )
        exact = [samples * share / whole for _, share in self.files]
        counts = [int(each) for each in exact]
        rest = sorted(range(len(exact)), key=lambda each: counts[each] - exact[each])
        for each in rest[: samples - sum(counts)]:
            counts[each] += 1
        return counts


def _spelled(text: str) -> list[tuple[Path, float]]:
    if os.path.exists(expanded(text)):
        return [(Path(expanded(text)), 1.0)]
    found = []
    for part in text.split(","):
        if not part:
            raise CalibrationError(f"{shown(text)}: names no file before or after a comma")
        name, colon, share = part.rpartition(":")
        try:
            found.append(
                (Path(expanded(name)), float(share)) if colon else (Path(expanded(part)), 1.0)
            )
        except ValueError:
            found.append((Path(expanded(part)), 1.0))
    return found
