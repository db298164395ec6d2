"""The header of a GGUF file, llama.cpp's format: metadata, and the place of each tensor."""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.errors import CheckpointError, UnsupportedModelError, shown

ALIGNMENT = 32
BLOCKS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "Q4_0": np.dtype([("d", "<f2"), ("qs", "u1", (16,))]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", (16,))]),
    "Q5_0": np.dtype([("d", "<f2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))]),
    "Q8_0": np.dtype([("d", "<f2"), ("qs", "i1", (32,))]),
    "Q2_K": np.dtype([("scales", "u1", (16,)), ("qs", "u1", (64,)), ("d", "<f2"), ("dmin", "<f2")]),
    "Q3_K": np.dtype(
        [("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), ("d", "<f2")]
    ),
    "Q4_K": np.dtype(
        [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (12,)), ("qs", "u1", (128,))]
    ),
    "Q5_K": np.dtype(
        [
            ("d", "<f2"),
            ("dmin", "<f2"),
            ("scales", "u1", (12,)),
            ("qh", "u1", (32,)),
            ("qs", "u1", (128,)),
        ]
    ),
    "Q6_K": np.dtype(
        [("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<f2")]
    ),
    "IQ4_NL": np.dtype([("d", "<f2"), ("points", "u1", (16,))]),  # types are told by their fields
    "IQ4_XS": np.dtype(
        [("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", (4,)), ("qs", "u1", (128,))]
    ),
    "MXFP4": np.dtype([("e", "u1"), ("qs", "u1", (16,))]),
    "NVFP4": np.dtype([("e", "u1", (4,)), ("qs", "u1", (32,))]),
}
"""The tensor types, as ggml's structs: one element is one block of weights."""

_VECTORS = {  # number, weights and bytes of a block
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ1_M": (29, 256, 56),
}
DECODED = {  # which no grid here holds
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}
# The field has the type's name, so that each type has a dtype of its own.
_OPAQUE = _VECTORS | DECODED
BLOCKS |= {name: np.dtype([(name, "u1", (size,))]) for name, (_, _, size) in _OPAQUE.items()}

TYPE_IDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "F64": 28,
    "BF16": 30,
    "MXFP4": 39,
    "NVFP4": 40,
    **{name: number for name, (number, _, _) in _OPAQUE.items()},
}

FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10},
    **{"Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16},
    **{"Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22},
    **{"IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28},
    **{"IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37},
    **{"MXFP4_MOE": 38, "Q1_0": 40, "Q2_0": 41},
}
"""llama.cpp's number of each mixture of types (llama_ftype)."""

FILE_TYPE_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

_MAGIC = b"GGUF"
_VERSION = 3
_HEADER_LIMIT = 256 << 20  # bytes; the headers of the largest public models are below 20 MB
_FIRST_VALUES = 1024  # bytes with the values that may be written again
_MOST_AXES = 4
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_SCALAR_IDS = {dtype: number for number, dtype in _SCALARS.items()}
_NAMES_OF_IDS = {number: name for name, number in TYPE_IDS.items()}
TYPE_NAMES = {dtype: name for name, dtype in BLOCKS.items()}
# Q8_1 and Q8_K are those of activations; llama.cpp decodes neither.
_UNREAD_TYPES = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_INCOMPLETE = "The download is incomplete or damaged: fetch the file again"


def weights_per_block(dtype: np.dtype[Any]) -> int:
    """Tell how many weights one element of an array holds.

    Parameters
    ----------
    dtype : numpy.dtype
        One of `BLOCKS`.

    Returns
    -------
    int
        1, 32, 64, 128 or 256.

    Examples
    --------
    >>> weights_per_block(BLOCKS["Q4_K"])
    256
    """
    name = TYPE_NAMES[dtype]
    if name in _OPAQUE:
        return _OPAQUE[name][1]
    if dtype.names is None:
        return 1
    return 256 if name.endswith(("_K", "IQ4_XS")) else 64 if name == "NVFP4" else 32


def decoded(blocks: NDArray[Any]) -> NDArray[Any]:
    """Return the weights of blocks of a type that no grid here holds.

    Parameters
    ----------
    blocks : numpy.ndarray
        Of one of `BLOCKS`, with one axis or more.

    Returns
    -------
    numpy.ndarray
        Float32, its last axis weights instead of blocks; arrays of other types come back as they are.
    """
    name = TYPE_NAMES[blocks.dtype]
    if name not in DECODED:
        return blocks
    rows = np.ascontiguousarray(blocks).view(np.uint8).reshape(math.prod(blocks.shape[:-1]), -1)
    return _kernels.decode_blocks(rows, name).reshape(*blocks.shape[:-1], -1)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file: its name there, and its elements, which are blocks if it is quantized."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def read_as(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype and shape of the array that it is read as, see `decoded`."""
        if TYPE_NAMES[self.dtype] not in DECODED:
            return self.dtype, self.shape
        *outer, last = self.shape
        return np.dtype(np.float32), (*outer, last * weights_per_block(self.dtype))


def tensor_offsets(tensors: Sequence[TensorInfo]) -> list[int]:
    """Tell where the data of each tensor belongs.

    Parameters
    ----------
    tensors : sequence of TensorInfo
        In the order of their data.

    Returns
    -------
    list of int
        Bytes from the start of the data to each tensor and, at last, to the end of the file. What is
        between two tensors is padding, whose bytes are zero.
    """
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + _aligned(tensor.nbytes, ALIGNMENT))
    return offsets


def write_header(file: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> int:
    """Write the header: everything before the data of the tensors.

    Parameters
    ----------
    file : binary file
        At its start.
    metadata : mapping
        What the file says of itself: strings, booleans, integers (uint32, or int64 or uint64 where they
        do not fit), floats (float32, or float64 where they do not), NumPy scalars where the type is to be
        another, and lists (int32, float32) or one-dimensional arrays of them.
    tensors : sequence of TensorInfo
        In the order of their data.

    Returns
    -------
    int
        Where the data begins; see `tensor_offsets`.
    """
    header = BytesIO()
    header.write(struct.pack("<4sIQQ", _MAGIC, _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        number, content = _encoded(value)
        header.write(_string(key) + struct.pack("<I", number) + content)
    for tensor, offset in zip(tensors, tensor_offsets(tensors), strict=False):
        *outer, last = tensor.shape
        axes = (last * weights_per_block(tensor.dtype), *reversed(outer))
        header.write(_string(tensor.name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes))
        header.write(struct.pack("<IQ", TYPE_IDS[TYPE_NAMES[tensor.dtype]], offset))
    start = _aligned(header.tell(), ALIGNMENT)
    file.write(header.getvalue().ljust(start, b"\0"))
    return start


def overwrite_values(file: BinaryIO, values: Mapping[str, Any]) -> None:
    """Write other numbers of the same types in place of some that a header holds.

    Parameters
    ----------
    file : binary file
        Open to be read and written.
    values : mapping
        As for `write_header`; those that are not among the first of the header are passed over.
    """
    file.seek(0)
    known = file.read(_FIRST_VALUES)
    for key, value in values.items():
        number, content = _encoded(value)
        start = _string(key) + struct.pack("<I", number)
        if (place := known.find(start)) >= 0:
            file.seek(place + len(start))
            file.write(content)


def _aligned(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _encoded(value: Any) -> tuple[int, bytes]:
    """Return the number of a value's type, and its bytes."""
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, list) and (not value or isinstance(value[0], str)):
        # Of lists that may be empty, those of merges, llama.cpp asks for strings.
        content = b"".join(map(_string, value))
        return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + content
    if isinstance(value, list):
        array = np.asarray(value)
        array = array.astype({"i": np.int32, "f": np.float32}.get(array.dtype.kind, array.dtype))
    else:
        array = np.asarray(value, _scalar_type(value))
    number = _SCALAR_IDS[array.dtype]
    if array.ndim == 0:
        return number, array.tobytes()
    return _ARRAY, struct.pack("<IQ", number, len(array)) + array.tobytes()


def _scalar_type(value: Any) -> Any:
    """Return the smallest of the usual types that holds an integer or float, None for other values."""
    if type(value) is int:
        return np.uint32 if 0 <= value < 1 << 32 else np.int64 if value < 1 << 63 else np.uint64
    if type(value) is float:
        fits = not math.isfinite(value) or abs(value) <= float(np.finfo(np.float32).max)
        return np.float32 if fits else np.float64
    return None


class Header:
    """The header of a GGUF file, checked against the file's size as it is read.

    Parameters
    ----------
    file : binary file
        Open for reading.
    path : pathlib.Path
        Its name, for messages.

    Attributes
    ----------
    metadata : dict
        What the file says of itself: NumPy arrays and lists of strings where there are several values.
    tensors : dict
        The tensors by name, and where in the file the data of each begins.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    UnsupportedModelError
        If it is of a kind that is not read.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.size = file.seek(0, os.SEEK_END)
        self.end = min(self.size, _HEADER_LIMIT)
        self.position = file.seek(0)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, tuple[TensorInfo, int]] = {}
        tensors, values = self._counts()
        for _ in range(values):
            self._add_value()
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise self.damaged(f'"general.alignment" is {shown(alignment)}, not a multiple of 8')
        offsets = [self._add_tensor() for _ in range(tensors)]
        start = _aligned(self.position, alignment)
        self._place_tensors(start, alignment, offsets)

    def split(self) -> tuple[int, int]:
        """Return which of how many files that hold the model together this is; the first is 0."""
        counts = [self.metadata.get("split.no", 0), self.metadata.get("split.count", 1)]
        number, count = (each if type(each) is int else -1 for each in counts)
        count = count or 1  # which llama.cpp writes to say that there are no others
        if not 0 <= number < count:
            raise self.damaged(
                f'"split.no" and "split.count" are {shown(counts[0])} and {shown(counts[1])}'
            )
        return number, count

    def places(self) -> dict[str, tuple[int, int]]:
        """Return where in the file each tensor begins, and how many bytes it has."""
        return {name: (place, info.nbytes) for name, (info, place) in self.tensors.items()}

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}. {_INCOMPLETE}")

    def _counts(self) -> tuple[int, int]:
        if self._bytes(4) != _MAGIC:
            raise CheckpointError(f"{self.path}: is not a GGUF file; those begin with GGUF")
        version = self._integer("I")
        if version and not version & 0xFFFF:
            raise UnsupportedModelError(
                f"{self.path}: is a big-endian GGUF file, which is not read. Convert the model again "
                f"for a little-endian machine"
            )
        if version not in (2, _VERSION):
            raise UnsupportedModelError(
                f"{self.path}: is of version {version} of GGUF; versions 2 and 3 are read. Convert "
                f"the model again with a recent llama.cpp"
            )
        return self._integer("Q"), self._integer("Q")

    def _add_value(self) -> None:
        key = self._text()
        if key in self.metadata:
            raise self.damaged(f"the key {shown(key)} is there twice")
        number = self._integer("I")
        if number == _STRING:
            self.metadata[key] = self._text(errors="replace")
        elif number == _ARRAY:
            self.metadata[key] = self._array(key)
        else:
            value = self._numbers(key, number, 1)[0]
            # The shortest decimal, so that 1e-5 does not come back as 9.99999974e-06.
            self.metadata[key] = float(str(value)) if value.dtype == np.float32 else value.item()

    def _array(self, key: str) -> Any:
        number, count = self._integer("I"), self._integer("Q")
        if number == _ARRAY:
            raise UnsupportedModelError(f"{self.path}: the key {shown(key)} holds arrays of arrays")
        if number == _STRING:
            self._check_room(8 * count)
            return [self._text(errors="replace") for _ in range(count)]
        return self._numbers(key, number, count)

    def _numbers(self, key: str, number: int, count: int) -> NDArray[Any]:
        if number not in _SCALARS:
            raise self.damaged(f"the key {shown(key)} is of type {number}, which does not exist")
        dtype = _SCALARS[number]
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)

    def _add_tensor(self) -> int:
        name, axes = self._text(), self._integer("I")
        if name in self.tensors:
            raise self.damaged(f"tensor {shown(name)} is there twice")
        if not 1 <= axes <= _MOST_AXES:
            raise self.damaged(f"tensor {shown(name)} has {axes} axes, not 1 to {_MOST_AXES}")
        *outer, last = reversed([self._integer("Q") for _ in range(axes)])
        number, offset = self._integer("I"), self._integer("Q")
        if number not in _NAMES_OF_IDS:
            known = _UNREAD_TYPES.get(number, f"number {number}")
            raise UnsupportedModelError(
                f"{self.path}: tensor {shown(name)} is of type {known}, which is not read; these are: "
                f"{', '.join(BLOCKS)}. Take the file in another quantization"
            )
        dtype = BLOCKS[_NAMES_OF_IDS[number]]
        weights = weights_per_block(dtype)
        if not all((*outer, last)) or last % weights:
            raise self.damaged(
                f"tensor {shown(name)} has shape {[*outer, last]}, in blocks of {weights} weights"
            )
        self.tensors[name] = (TensorInfo(name, dtype, (*outer, last // weights)), offset)
        return offset

    def _place_tensors(self, start: int, alignment: int, offsets: list[int]) -> None:
        """Turn offsets into positions in the file, and check that every tensor has its own place."""
        before, free = "", 0
        for info, offset in sorted(self.tensors.values(), key=lambda each: each[1]):
            if offset % alignment or start + offset + info.nbytes > self.size:
                raise self.damaged(
                    f"tensor {shown(info.name)}, {info.nbytes} bytes, should begin at byte "
                    f"{start + offset}, but the file has {self.size} bytes in steps of {alignment}"
                )
            if offset < free:
                raise self.damaged(f"tensors {shown(before)} and {shown(info.name)} overlap")
            before, free = info.name, offset + info.nbytes
            self.tensors[info.name] = (info, start + offset)

    def _text(self, errors: str = "strict") -> str:
        try:
            return self._bytes(self._integer("Q")).decode(errors=errors)
        except UnicodeDecodeError as error:
            raise self.damaged(f"there is no valid name at byte {self.position}") from error

    def _integer(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]
        return value

    def _bytes(self, count: int) -> bytes:
        self._check_room(count)
        content = self.file.read(count)
        if len(content) != count:
            raise self.damaged("the file ends early")
        self.position += count
        return content

    def _check_room(self, count: int) -> None:
        if count > self.end - self.position:
            where = "the file" if self.end == self.size else f"{_HEADER_LIMIT >> 20} MiB of header"
            raise self.damaged(
                f"{count} bytes should follow at byte {self.position}, but {where} ends at {self.end}"
            )
