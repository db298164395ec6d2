"""Short names for many layers."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def as_globs(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return shell globs that match some layers and no other: one for those that differ in numbers only,
    such as ``model.layers.*.mlp.down_proj``, and names where that would match more.

    Parameters
    ----------
    names
        The layers.
    known
        All layers that there are.
    """
    others = set(known) - set(names)
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(name)
    found: list[str] = []
    for pattern, members in alike.items():
        found += members if any(fnmatchcase(each, pattern) for each in others) else [pattern]
    return found
