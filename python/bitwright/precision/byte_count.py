"""Numbers of bytes, as people write them."""

import re
from fractions import Fraction

from bitwright.errors import shown


def size_in_bytes(size: int | str) -> int:
    """Return a number of bytes from how people write it.

    Parameters
    ----------
    size
        A number, or one with a unit: ``"3.2GB"``, ``"3GiB"``, ``"500M"``; without an i they are powers of
        1000.

    Raises
    ------
    ValueError
        If it is no such number, or not positive.

    Examples
    --------
    >>> size_in_bytes("3.2GB"), size_in_bytes("1 MiB"), size_in_bytes("500M")
    (3200000000, 1048576, 500000000)
    """
    match = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?)(I?)B?\s*", str(size), re.IGNORECASE | re.ASCII
    )
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{shown(str(size))} is not a number of bytes such as 3.2GB, 500M or 2GiB")
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    count = int(Fraction(match[1]) * unit)
    if count == 0:
        raise ValueError(f"{shown(str(size))} is not a number of bytes above 0")
    return count
