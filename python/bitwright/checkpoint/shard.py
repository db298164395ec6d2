"""One safetensors file: floats of 8 bits, which NumPy and so the library does not have, included, and of a
part of a tensor no more than that part is read; the library reads the whole tensor."""

import json
import math
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FLOATS_OF_8_BITS: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""Those that weights are stored in, by their safetensors names."""
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **FLOATS_OF_8_BITS,
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The tensor types that are read and written, by their safetensors names."""


def places_in(file: Path) -> dict[str, tuple[int, int]]:
    """Return where in a sound safetensors file each tensor begins, and how many bytes it has."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        found[name] = 8 + length + first, last - first
    return found


class Shard:
    """An open file, with the methods of the library's handle.

    Parameters
    ----------
    file : pathlib.Path
        Its path.
    opened : safetensors.safe_open
        The library's handle, which has validated the file.
    """

    def __init__(self, file: Path, opened: Any) -> None:
        self._file = file
        self._opened = opened
        self._places: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        names: list[str] = self._opened.keys()
        return names

    def metadata(self) -> dict[str, str] | None:
        """Return what the file's header says beside its tensors."""
        found: dict[str, str] | None = self._opened.metadata()
        return found

    def get_slice(self, name: str) -> Any:
        """Return a tensor whose parts can be read."""
        found = self._opened.get_slice(name)
        return _Slice(self, name, found) if found.get_dtype() in DTYPES else found

    def get_tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor."""
        own = self._opened.get_slice(name).get_dtype() in (*FLOATS_OF_8_BITS, "F8_E8M0")
        array: NDArray[Any] = self.get_slice(name)[()] if own else self._opened.get_tensor(name)
        return array

    def read(
        self, name: str, first: int, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> NDArray[Any]:
        """Read elements of a tensor, from the first one on, as an array of a shape."""
        if not self._places:
            self._places = places_in(self._file)
        count = math.prod(shape)
        start = self._places[name][0] + first * dtype.itemsize
        array = np.fromfile(self._file, dtype, count, offset=start)
        if len(array) != count:
            raise ValueError("the file ends early")
        return array.reshape(shape)


class _Slice:
    def __init__(self, shard: Shard, name: str, found: Any) -> None:
        self._shard = shard
        self._name = name
        self._dtype: str = found.get_dtype()
        self._shape = tuple(found.get_shape())

    def get_dtype(self) -> str:
        return self._dtype

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, part: Any) -> NDArray[Any]:
        """Return all, rows of the tensor, or rows of one matrix of a stack."""
        shape, first = list(self._shape), 0
        for axis, each in enumerate(part if isinstance(part, tuple) else (part,)):
            begin, end, _ = each.indices(shape[axis])
            first += begin * math.prod(shape[axis + 1 :])
            shape[axis] = max(end - begin, 0)
        return self._shard.read(self._name, first, DTYPES[self._dtype], tuple(shape))
