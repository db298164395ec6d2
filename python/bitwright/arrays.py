"""Checks of arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import NonFiniteError


def require_finite(array: NDArray[Any], name: str) -> None:
    """Raise NonFiniteError, naming `name` and the first bad position, unless all values are finite."""
    # A sum is NaN or infinite if a term is, and takes a fraction of the time; it may overflow, though.
    with np.errstate(all="ignore"):
        if array.dtype == np.float32 and np.isfinite(array.sum()):
            return
    finite = np.isfinite(array)
    if finite.all():
        return
    position = tuple(int(i) for i in np.argwhere(~finite)[0])
    raise NonFiniteError(
        f"{name}: value {float(array[position])} at {list(position)}, "
        f"{int(finite.size - finite.sum())} of {finite.size} values are NaN or infinite"
    )
