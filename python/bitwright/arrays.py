"""Checks of arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import NonFiniteError

HALVES = ("float16", "bfloat16")


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


def floats(array: Any, *, halves: bool = False, rows: bool = False) -> Any:
    """Return an array of floats as the kernels take it, as it is wherever it can be.

    Tensors of other libraries on the processor, such as PyTorch's, are views by DLPack; on another device,
    or in bfloat16, which NumPy does not take by it, they are copied. Copied, too, are float64 and other
    byte orders, to float32, and what is not C-contiguous.

    Parameters
    ----------
    array
        NumPy's, or one with ``__dlpack__``. Whatever else it is, is returned for the kernel to refuse.
    halves
        Whether float16 and bfloat16 stay what they are; otherwise they become float32.
    rows
        Whether ``[batch, length, channels]`` becomes ``[tokens, channels]``.

    Returns
    -------
    numpy.ndarray
        float32, or a half where these stay; C-contiguous.

    Examples
    --------
    >>> floats(np.ones((2, 3, 4)), rows=True).shape
    (6, 4)
    """
    if not isinstance(array, np.ndarray):
        if not hasattr(array, "__dlpack__"):
            return array
        array = _by_dlpack(array)
    name = array.dtype.name
    if array.dtype.kind == "f" or name in HALVES:
        kept = halves and name in HALVES
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("=") if kept else np.float32)
    return array.reshape(-1, array.shape[-1]) if rows and array.ndim == 3 else array


def _by_dlpack(tensor: Any) -> NDArray[Any]:
    """Return a view of a tensor of another library, or a copy where there can be none."""
    for change in ("detach", "cpu"):  # PyTorch's, which do nothing where nothing is to be done
        if hasattr(tensor, change):
            tensor = getattr(tensor, change)()
    if "bfloat16" in str(getattr(tensor, "dtype", "")) and hasattr(tensor, "float"):
        tensor = tensor.float()
    return np.from_dlpack(tensor)
