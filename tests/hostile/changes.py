"""Changes of files, as data, so that what was found can be written down."""

import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bitwright.checkpoint.reader import DTYPES
from hostile.files import gguf_file, read_gguf, read_safetensors, safetensors_file


@dataclass(frozen=True)
class Put:
    """Other bytes in place of `cut` ones, from `start` on (modulo the file's size)."""

    file: str
    start: int
    cut: int
    content: bytes


@dataclass(frozen=True)
class Say:
    """Another value in a JSON file, or in the header of a file of tensors; `text` need not be JSON."""

    file: str
    path: tuple[str | int, ...]
    text: str


@dataclass(frozen=True)
class Store:
    """A tensor with another dtype and shape; its bytes are cut or repeated, so that the file is sound."""

    file: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Fill:
    """One element of a tensor with another value (of all that fits into its dtype), or all of them."""

    file: str
    tensor: str
    value: float
    element: int | None = None


@dataclass(frozen=True)
class Place:
    """Something other than a file at its name; "elsewhere" is a link to the file, out of the folder."""

    file: str
    kind: Literal["nothing", "folder", "fifo", "itself", "zeros", "nowhere", "elsewhere", "endless"]


PLACES = get_args(Place.__annotations__["kind"])


Edit = Put | Say | Store | Fill | Place


@dataclass(frozen=True)
class Case:
    """Which of a target's sound files, what is changed in them, and what reads them."""

    variant: str
    task: str
    edits: tuple[Edit, ...]


def changed(content: bytes, edit: Edit) -> bytes:
    """Return a file's content after an edit, or as it is if earlier ones have left no place for it."""
    suffix = Path(edit.file).suffix
    with suppress(Exception):
        match edit:
            case Put(_, start, cut, piece):
                start %= len(content) + 1
                return content[:start] + piece + content[start + cut :]
            case Say(_, path, text):
                said = {".safetensors": _say_header, ".gguf": _say_metadata, ".npz": _say_array}
                return said.get(suffix, _say_json)(content, path, text)
            case Store() | Fill() if suffix == ".npz":
                return _arrays_file({**_arrays_in(content), edit.tensor: _array(content, edit)})
            case Store() | Fill():
                return _tensors_file(content, edit)
    return content


def _say_json(content: bytes, path: tuple[str | int, ...], text: str) -> bytes:
    document = place = {"": json.loads(content)}
    path, mark = ("", *path), "\0mark"
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = mark
    spoken = json.dumps(document[""]).replace(json.dumps(mark), text)
    return spoken.encode(errors="surrogatepass")


def _say_header(content: bytes, path: tuple[str | int, ...], text: str) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = _say_json(content[8 : 8 + size], path, text)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _say_metadata(content: bytes, path: tuple[str | int, ...], text: str) -> bytes:
    """Set a value of a GGUF file's metadata, or of a list there; null leaves it out."""
    values, tensors = read_gguf(content)
    key, value = str(path[0]), json.loads(text)
    if len(path) == 2:
        listed = list(values[key])
        listed[int(path[1])] = value
        value = listed
    values[key] = value
    return gguf_file({key: each for key, each in values.items() if each is not None}, tensors)


def _say_array(content: bytes, path: tuple[str | int, ...], text: str) -> bytes:
    """Let the header of one array of an .npz say something else; the text is Python."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as known, zipfile.ZipFile(out, "w") as archive:
        for info in known.infolist():
            entry = known.read(info)
            if info.filename == f"{path[0]}.npy":
                size = 10 + int.from_bytes(entry[8:10], "little")
                said = {"descr": "'<f4'", "fortran_order": "False", "shape": "(2, 4, 64)"}
                said[str(path[-1])] = text
                words = ", ".join(f"'{key}': {value}" for key, value in said.items())
                header = f"{{{words}, }}\n".encode(errors="surrogatepass")[: (1 << 16) - 1]
                entry = entry[:8] + len(header).to_bytes(2, "little") + header + entry[size:]
            archive.writestr(info.filename, entry, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _tensors_file(content: bytes, edit: Store | Fill) -> bytes:
    tensors = read_safetensors(content)
    dtype, shape, data = tensors[edit.tensor]
    if isinstance(edit, Store):
        dtype, shape = edit.dtype, edit.shape
        data = _resized(data, math.prod(shape) * DTYPES[dtype].itemsize)
    else:
        data = _filled(np.frombuffer(data, DTYPES[dtype]), edit).tobytes()
    return safetensors_file({**tensors, edit.tensor: (dtype, shape, data)})


def _resized(data: bytes, size: int) -> bytes:
    return (data * (size // max(len(data), 1) + 1))[:size]


def _filled(array: Any, edit: Fill) -> Any:
    array = array.copy()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = np.asarray(edit.value).astype(array.dtype)
    array.reshape(-1)[slice(None) if edit.element is None else edit.element % array.size] = value
    return array


def _arrays_in(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content)) as arrays:
        return dict(arrays)


def _array(content: bytes, edit: Store | Fill) -> Any:
    array = _arrays_in(content)[edit.tensor]
    if isinstance(edit, Fill):
        return _filled(array, edit)
    dtype = DTYPES[edit.dtype]
    return np.frombuffer(
        _resized(array.tobytes(), math.prod(edit.shape) * dtype.itemsize), dtype
    ).reshape(edit.shape)


def _arrays_file(arrays: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    np.savez(out, allow_pickle=True, **arrays)
    return out.getvalue()


def put_in_place(folder: Path, edit: Place) -> None:
    """Put what is not the file in its place."""
    path, beside = folder / edit.file, folder.parent / Path(edit.file).name
    if path.is_file() and edit.kind == "elsewhere":
        path.replace(beside)
    elif path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    links = {
        "itself": path,
        "zeros": "/dev/zero",
        "nowhere": folder / "absent",
        "elsewhere": beside,
    }
    if edit.kind == "folder":
        path.mkdir()
    elif edit.kind == "endless":
        path.touch()
        os.truncate(path, 1 << 40)
    elif edit.kind == "fifo":
        os.mkfifo(path)
    elif edit.kind in links:
        path.symlink_to(links[edit.kind])
