"""Checkpoint folders, read lazily: opening one reads headers, reading a tensor only that one."""

import copy
import difflib
import json
import math
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitwright.checkpoint.holes import hole_in_safetensors
from bitwright.checkpoint.shard import DTYPES, FLOATS_OF_8_BITS, Shard
from bitwright.errors import CheckpointError, CheckpointNotFoundError, UnsupportedModelError, shown
from bitwright.files.home import expands_home
from bitwright.files.links import check_no_links, check_own
from bitwright.files.text_file import read_bytes

_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)  # holds every number of 8 bits
_WRITTEN_AS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float64): np.dtype(np.float32),
    **dict.fromkeys(FLOATS_OF_8_BITS.values(), _BFLOAT16),
}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The files that are read beside a GGUF file; others there may belong to other models.
READ_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.json", "chat_template.jinja"),
)
# Bytes. Python's objects may take 24 times as many; the largest public tokenizers and indexes are below
# 40 MB.
JSON_LIMIT = 128 << 20
_MOST_NAMES = 4096  # of a folder, compared when a misspelled one is looked for
_NUMBERED_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class _Tensor:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    stored: str  # its name in the file


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that is computed from others when it is read.

    Parameters
    ----------
    parts
        Names of the tensors that it replaces.
    name, dtype, shape
        Of the new tensor; the dtype by its safetensors name.
    make
        Returns a part of it, given a checkpoint with the parts, and ranges along the first axes.
    """

    parts: Collection[str]
    name: str
    dtype: str
    shape: tuple[int, ...]
    make: "Callable[[Checkpoint, tuple[slice, ...]], NDArray[Any]]"

    @classmethod
    def whole(
        cls,
        parts: Collection[str],
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        make: "Callable[[Checkpoint], NDArray[Any]]",
    ) -> "Made":
        """Return a tensor that is computed as a whole, whatever part of it is read."""
        return cls(parts, name, dtype, shape, lambda source, ranges: make(source)[ranges])


class Checkpoint:
    """An open checkpoint folder: its configuration and its tensors.

    Parameters
    ----------
    folder : str or os.PathLike
        Folder with config.json and either model.safetensors.index.json and its shards, a
        model.safetensors, or any other ``*.safetensors`` files.

    Attributes
    ----------
    folder : pathlib.Path
        The folder as given.
    config : dict
        config.json; values that contradict the tensors are corrected when the folder is opened as a model.

    Raises
    ------
    CheckpointNotFoundError
        If the folder, config.json or a weight file does not exist.
    CheckpointError
        If a file is damaged, or the files contradict each other.
    UnsupportedModelError
        If the weights exist only in a format that is not read.

    Examples
    --------
    >>> with Checkpoint("models/small") as checkpoint:  # doctest: +SKIP
    ...     weight = checkpoint.read("model.norm.weight")
    """

    @expands_home
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = _existing_folder(Path(folder))
        check_no_links(self.folder)
        check_own(self.folder / "config.json", self.folder)
        self.config: dict[str, Any] = read_json_object(
            self.folder / "config.json", "; a checkpoint needs it"
        )
        weight_map = _weight_map(self.folder)
        if weight_map is None:
            files = _files_without_index(self.folder)
        else:
            _check_files(self.folder, weight_map)
            files = [self.folder / name for name in sorted(set(weight_map.values()))]
        self._shards: dict[Path, Any] = {}  # the library's handles have no types
        self._tensors: dict[str, _Tensor] = {}
        self._made: dict[str, Callable[[tuple[slice, ...]], NDArray[Any]]] = {}
        self._stored_bytes: int | None = None  # where they are not those of what is read
        with ExitStack() as stack:
            for file in files:
                self._shards[file] = stack.enter_context(_open_shard(file))
                self._add_tensors(file, weight_map or {})
            for name, file_name in (weight_map or {}).items():
                self._check_place(name, self.folder / file_name)
            self._names = sorted(self._tensors)
            self._stack = stack.pop_all()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the model beside its tensors: config.json."""
        return self.config

    @property
    def source(self) -> Path:
        """The folder, which no output may overlap."""
        return self.folder

    def weight_files(self) -> list[Path]:
        """Return the files with its tensors."""
        return list(self._shards)

    def input_files(self) -> list[Path]:
        """Return all files that it is read from: weights, config, tokenizer and templates."""
        names = ("config.json", INDEX_NAME, *READ_BESIDE) if self.owns_folder else ()
        return [*self.weight_files(), *(self.folder / name for name in names)]

    @property
    def owns_folder(self) -> bool:
        """Whether the other files in the folder belong to the model."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def close(self) -> None:
        """Close the weight files; names, shapes and dtypes stay available."""
        self._shards.clear()
        self._stack.close()

    def names(self) -> list[str]:
        """List the tensors.

        Returns
        -------
        list of str
            Names in sorted order.
        """
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Tell a tensor's shape without reading it.

        Parameters
        ----------
        name : str
            Tensor name.

        Returns
        -------
        tuple of int
            Its shape.

        Raises
        ------
        CheckpointError
            If there is no such tensor.
        """
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Tell the dtype that a tensor is stored in.

        Parameters
        ----------
        name : str
            Tensor name.

        Returns
        -------
        numpy.dtype
            Stored dtype; bfloat16 is ``ml_dtypes.bfloat16``.

        Raises
        ------
        CheckpointError
            If there is no such tensor, or its dtype is not supported.
        """
        tensor = self._tensor(name)
        if tensor.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {shown(name)} is stored as {tensor.dtype}, which is not "
                f"supported. Start from a checkpoint in BF16, F16 or F32"
            )
        return DTYPES[tensor.dtype]

    def stored_dtype(self, name: str) -> str:
        """Tell a tensor's dtype by its safetensors name, whether it is supported or not.

        Parameters
        ----------
        name : str
            Tensor name.

        Returns
        -------
        str
            Such as ``"BF16"``.

        Raises
        ------
        CheckpointError
            If there is no such tensor.
        """
        return self._tensor(name).dtype

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors; the files stay as they are.

        Parameters
        ----------
        names : mapping of str to str
            The new name of each tensor that gets one.

        Raises
        ------
        CheckpointError
            If two tensors would have one name.
        """
        renamed = {names.get(name, name): tensor for name, tensor in self._tensors.items()}
        if len(renamed) < len(self._tensors):
            twice = next(new for old, new in names.items() if new in self._tensors and old != new)
            raise CheckpointError(
                f"{self.folder}: tensor {shown(twice)} is stored under that name and under another, "
                f"{shown(next(old for old, new in names.items() if new == twice))}. Remove the one that "
                f"does not belong to the model"
            )
        self._tensors, self._names = renamed, sorted(renamed)
        self._made = {names.get(name, name): make for name, make in self._made.items()}

    def replace(
        self,
        parts: Collection[str],
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        make: "Callable[[Checkpoint], NDArray[Any]]",
    ) -> None:
        """Replace some tensors by one that is computed from them when it is read.

        Parameters
        ----------
        parts : collection of str
            Names of the tensors that it replaces.
        name, dtype, shape : str, str, tuple of int
            Of the new tensor; the dtype by its safetensors name.
        make : callable
            Returns the new tensor, given a checkpoint with the parts.
        """
        self.replace_all([Made.whole(parts, name, dtype, shape, make)])

    def replace_all(self, made: Collection[Made]) -> None:
        """Replace tensors by some of which parts are computed from them when they are read.

        Parameters
        ----------
        made : collection of Made
            The new tensors, and which ones each replaces; several may be made of one.
        """
        if not made:
            return
        whole = copy.copy(self)
        self._stored_bytes = whole.stored_bytes()
        gone = {part for each in made for part in each.parts}
        self._tensors = {name: each for name, each in whole._tensors.items() if name not in gone}
        self._made = dict(whole._made)
        for each in made:
            first = whole._tensors[next(iter(each.parts))]
            self._tensors[each.name] = _Tensor(first.file, each.dtype, each.shape, each.name)
            self._made[each.name] = partial(each.make, whole)
        self._names = sorted(self._tensors)

    def file(self, name: str) -> Path:
        """Tell which file holds a tensor.

        Parameters
        ----------
        name : str
            Tensor name.

        Returns
        -------
        pathlib.Path
            The safetensors file.

        Raises
        ------
        CheckpointError
            If there is no such tensor.
        """
        return self._tensor(name).file

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor, and nothing else, from its file.

        Parameters
        ----------
        name : str
            Tensor name.

        Returns
        -------
        numpy.ndarray
            A private C-contiguous copy in the stored dtype.

        Raises
        ------
        CheckpointError
            If there is no such tensor, its dtype is not supported, the checkpoint is closed, or
            the file changed underneath.
        """
        if name in self._made:
            return self._made[name](())
        stored = self._tensor(name).stored
        return self._read(name, lambda shard: shard.get_tensor(stored))

    def read_rows(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Read some rows of a tensor, and nothing else.

        Parameters
        ----------
        name : str
            Name of a tensor with one axis or more.
        first, last : int
            Along its first axis; the last is not read.

        Returns
        -------
        numpy.ndarray
            A private C-contiguous copy in the stored dtype.

        Raises
        ------
        CheckpointError
            As `read`.
        """
        return self.read_ranges(name, (slice(first, last),))

    def read_part(self, name: str, index: int, rows: slice | None = None) -> NDArray[Any]:
        """Read one matrix of a stack, or some of its rows, and nothing else.

        Parameters
        ----------
        name : str
            Name of a tensor with three axes.
        index : int
            Along its first axis.
        rows : slice
            Along its second axis; all by default.

        Returns
        -------
        numpy.ndarray
            A private C-contiguous copy in the stored dtype, with two axes.

        Raises
        ------
        CheckpointError
            As `read`, or if the tensor has no such part.
        """
        shape = self.shape(name)
        if len(shape) != 3 or not 0 <= index < shape[0]:
            raise CheckpointError(
                f"{self.file(name)}: tensor {shown(name)} has shape {list(shape)}; expected three "
                f"axes, the first longer than {index}"
            )
        part = self.read_ranges(name, (slice(index, index + 1), rows or slice(None)))
        matrix: NDArray[Any] = part[0]
        return matrix

    def read_ranges(self, name: str, ranges: tuple[slice, ...]) -> NDArray[Any]:
        """Read a part of a tensor, and nothing else.

        Parameters
        ----------
        name : str
            Tensor name.
        ranges : tuple of slice
            Along its first axes, without steps; of the others all is read.

        Returns
        -------
        numpy.ndarray
            A private C-contiguous copy in the stored dtype.

        Raises
        ------
        CheckpointError
            As `read`.
        """
        if name in self._made:
            return self._made[name](ranges)
        stored, part = self._tensor(name).stored, ranges[0] if len(ranges) == 1 else ranges
        return self._read(name, lambda shard: shard.get_slice(stored)[part])

    def _read(self, name: str, get: Callable[[Any], NDArray[Any]]) -> NDArray[Any]:
        tensor = self._tensor(name)
        self.dtype(name)
        if tensor.file not in self._shards:
            raise CheckpointError(
                f"{self.folder}: the checkpoint is closed; read {shown(name)} before closing it"
            )
        try:
            return get(self._shards[tensor.file])
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{tensor.file}: tensor {shown(name)} cannot be read: {shown(str(error))}. "
                f"Was the file changed or removed meanwhile?"
            ) from error

    def nbytes(self) -> int:
        """Add up the sizes of all tensors.

        Returns
        -------
        int
            Bytes.

        Raises
        ------
        CheckpointError
            If a tensor's dtype is not supported.
        """
        return sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self._names)

    def stored_bytes(self) -> int:
        """Add up the sizes of all tensors in the files, which may be smaller than when they are read."""
        return self.nbytes() if self._stored_bytes is None else self._stored_bytes

    def decoded_type(self) -> str | None:
        """Return a type of quantized tensors that are read as floats, None if there are none."""
        return None

    def _tensor(self, name: str) -> _Tensor:
        if name in self._tensors:
            return self._tensors[name]
        # Comparing with all of a mixture-of-experts' 50,000 names would take minutes.
        place = bisect_left(self._names, name)
        near = [other[:200] for other in self._names[max(place - 200, 0) : place + 200]]
        closest = difflib.get_close_matches(name[:200], near, n=3)
        hint = f"; the closest are {', '.join(map(shown, closest))}" if closest else ""
        raise CheckpointError(f"{self.folder}: there is no tensor {shown(name)}{hint}")

    def _add_tensors(self, file: Path, weight_map: Mapping[str, str]) -> None:
        shard = self._shards[file]
        names: list[str] = shard.keys()
        for name in names:
            if weight_map.get(name, file.name) != file.name:
                continue  # the index alone decides where a tensor is
            if name in self._tensors:
                raise CheckpointError(
                    f"tensor {shown(name)} is both in {self._tensors[name].file} and in {file}. "
                    f"Remove the file that does not belong to the checkpoint"
                )
            header = shard.get_slice(name)
            shape = tuple(header.get_shape())
            self._tensors[name] = _Tensor(file, header.get_dtype(), shape, name)

    def _check_place(self, name: str, file: Path) -> None:
        if name not in self._tensors or self._tensors[name].file != file:
            raise CheckpointError(
                f"{self.folder / INDEX_NAME}: tensor {shown(name)} should be in {file.name}, but "
                f"is not. Download both files again"
            )


class CheckpointSlice:
    """A checkpoint whose tensors are stacks, seen at one index of their first axis.

    Parameters
    ----------
    checkpoint : Checkpoint
        The whole.
    index : int
        Along the first axis.
    """

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self._checkpoint = checkpoint
        self._index = index

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint

    def file(self, name: str) -> Path:
        """As `Checkpoint.file`."""
        return self._checkpoint.file(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """As `Checkpoint.dtype`."""
        return self._checkpoint.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """As `Checkpoint.read_part`."""
        return self._checkpoint.read_part(name, self._index)


def written_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Tell the dtype that a tensor is written in where it stays as it is: engines load floats of 16 and 32
    bits, and some take others for integers.

    Parameters
    ----------
    dtype : numpy.dtype
        What it is stored in.

    Returns
    -------
    numpy.dtype
        float32 for float64, bfloat16 for floats of 8 bits, otherwise `dtype`.

    Examples
    --------
    >>> written_dtype(np.dtype(np.float64)), written_dtype(np.dtype(np.int32))
    (dtype('float32'), dtype('int32'))
    """
    return _WRITTEN_AS.get(dtype, dtype)


def read_json_object(path: Path, reason: str = "") -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Parameters
    ----------
    path : pathlib.Path
        File to read.
    reason : str
        Why it must be there, for the message if it is not.

    Returns
    -------
    dict
        Its content.

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    CheckpointError
        If the file is too large, not UTF-8, not JSON, or not an object.
    """
    if not os.path.isfile(path):
        raise CheckpointNotFoundError(f"{path}: there is no such file{reason}")
    content = read_bytes(path, JSON_LIMIT, CheckpointError)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"{path}: is not valid JSON: {error.msg} at {where}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text, see byte {error.start}") from error
    except RecursionError:
        raise CheckpointError(f"{path}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: the JSON holds a number with too many digits") from error
    if not isinstance(value, dict):
        # The content is not quoted, since an index may be a link to any private file.
        kind = {list: "a list", str: "a string", NoneType: "null"}.get(
            type(value), "a number or truth"
        )
        raise CheckpointError(f"{path}: must hold a JSON object, but holds {kind}")
    return value


def is_plain_file_name(name: str) -> bool:
    """Tell whether a name stays inside the folder that it is joined to.

    Parameters
    ----------
    name : str
        A file name from a file.

    Returns
    -------
    bool
        False for anything that leads to another folder or is no valid file name.

    Examples
    --------
    >>> is_plain_file_name("model.safetensors"), is_plain_file_name("../model.safetensors")
    (True, False)
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= 255 and name not in (".", "..") and not set(name) & set("/\\\0")


def missing_model(path: Path) -> str:
    """Return what may be meant by the path of a model that is not there, as a sentence with a space before
    it, or nothing."""
    near = difflib.get_close_matches(path.name[:200], _models_in(path.parent), n=3)
    return f" Is {' or '.join(str(path.parent / each) for each in near)} meant?" if near else ""


def pickles_refused(place: str, revision: str | None = None) -> str:
    """Return what to say of a model, in a folder or at the hub, that has its weights only as pickles."""
    new = f"{Path(place).name}-safetensors"
    source = repr(place) + (f", revision={revision!r}" if revision else "")
    return (
        f"{place}: holds weights only as PyTorch pickles, which can run code when they are opened and are "
        f"therefore not read. Where they come from someone you trust, store them as safetensors and give "
        f'{new}: pip install "bitwright[transformers]" && python -c "from transformers import '
        f"AutoModelForCausalLM as M, AutoTokenizer as T; [each.from_pretrained({source}, **more)"
        f".save_pretrained({new!r}) for each, more in ((M, {{'dtype': 'auto'}}), (T, {{}}))]\""
    )


def _models_in(folder: Path) -> list[str]:
    """Return names in a folder that may be models', among its first few thousand entries."""
    try:
        with os.scandir(folder) as entries:
            some = list(islice(entries, _MOST_NAMES))
    except (OSError, ValueError):
        return []
    return [each.name for each in some if each.is_dir() or each.name.endswith(".gguf")]


def _existing_folder(folder: Path) -> Path:
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        if folder.suffix == ".gguf":
            raise CheckpointError(f"{folder}: is a GGUF file; open it by bitwright.load_model")
        raise CheckpointError(
            f"{folder}: this is a file; give the folder that holds config.json and the safetensors files"
        )
    if not os.path.exists(folder):
        raise CheckpointNotFoundError(f"{folder}: there is no such folder.{missing_model(folder)}")
    raise CheckpointError(f"{folder}: is neither a folder nor a file")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index of the folder, if there is one: the file of each tensor."""
    path = folder / INDEX_NAME
    if not os.path.lexists(path):
        return None
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f'{path}: "weight_map" must map tensor names to files, but is {shown(weight_map)}'
        )
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not is_plain_file_name(file_name):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} should be in {shown(file_name)}, which is not the "
                f"name of a file in this folder"
            )
        if not file_name.endswith(".safetensors"):
            raise UnsupportedModelError(
                f"{path}: tensor {shown(name)} should be in {shown(file_name)}; only safetensors "
                f"files are read"
            )
    return weight_map


def _check_files(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Raise unless the files that an index names exist; the message tells if others may hold the model."""
    absent = sorted({each for each in weight_map.values() if not os.path.isfile(folder / each)})
    whole = folder / SINGLE_NAME
    if not absent or SINGLE_NAME in weight_map.values() or not os.path.isfile(whole):
        return  # a file that is absent is named when it is opened
    with _open_shard(whole) as shard:
        stored = set(shard.keys())
    held = sum(name in stored for name in weight_map)
    raise CheckpointNotFoundError(
        f"{folder / absent[0]}: the weight file is missing, but {INDEX_NAME} names it. {SINGLE_NAME} "
        f"beside it holds {held} of the {len(weight_map)} tensors: if that is the model, remove the index; "
        f"otherwise remove {SINGLE_NAME} and fetch the missing files"
    )


def _files_without_index(folder: Path) -> list[Path]:
    if os.path.lexists(folder / SINGLE_NAME):
        return [folder / SINGLE_NAME]
    try:
        present = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error
    files = [file for file in present if file.suffix == ".safetensors"]
    names, series = {file.name for file in files}, dict[tuple[str, str], str]()
    for name in names:
        if numbered := _NUMBERED_SHARD.fullmatch(name):
            series[numbered[1], numbered[3]] = name
    for (prefix, total), name in series.items():
        for number in range(1, int(total) + 1):
            other = f"{prefix}{number:05d}-of-{total}.safetensors"
            if other not in names:
                raise CheckpointNotFoundError(
                    f"{folder / other}: is missing, though {name} belongs with it. Download it"
                )
    if not files:
        if any(file.suffix in (".bin", ".pt", ".pth") for file in present):
            raise UnsupportedModelError(pickles_refused(str(folder)))
        if any(file.suffix == ".gguf" for file in present):
            raise UnsupportedModelError(
                f"{folder}: holds weights only as GGUF; open it by bitwright.load_model"
            )
        raise CheckpointNotFoundError(f"{folder}: there are no *.safetensors files in this folder")
    return files


def _open_shard(file: Path) -> Any:
    if not os.path.isfile(file):
        raise CheckpointNotFoundError(
            f"{file}: the weight file is missing. The download is incomplete: fetch this file too"
        )
    try:
        # pread, because mapped pages would count as memory in use and a file cut short while it
        # is mapped would kill the process.
        shard = Shard(file, safe_open(file, framework="numpy", backend="pread"))
        problem = hole_in_safetensors(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: is not a sound safetensors file: {shown(str(error))}. Download it again"
        ) from error
    if problem is not None:
        raise CheckpointError(f"{file}: {problem}. Download it again")
    return shard
