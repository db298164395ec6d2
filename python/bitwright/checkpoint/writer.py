"""Checkpoint folders, written beside their place and renamed into it: whole, or not at all."""

import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.reader import (
    INDEX_NAME,
    Checkpoint,
    is_plain_file_name,
)
from bitwright.checkpoint.shard import DTYPES
from bitwright.checkpoint.side_files import SideFiles, side_files
from bitwright.checkpoint.work_folder import WorkFolder, content_of, remove_tree
from bitwright.errors import (
    CheckpointError,
    OutputError,
    shown,
)
from bitwright.files.inputs import InputFiles
from bitwright.files.replacing import output_errors, synchronize, taken

SHARD_BYTES = 5_000_000_000  # as model hubs have them
ENTRY_BYTES = 96  # of a tensor in a header at most, beside its name
COPY_BYTES = 8 << 20
DATA_NAME = "data.{}"  # in the work folder: of weight file number …, until that is written
STACK_NAME = "stack.{}"  # in the work folder: of a tensor whose parts are not all there
UNFINISHED = "checkpoint"  # in the work folder: what is moved into place
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".gguf")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Called with an output before it appears; see `completed`.
_completing: ContextVar[tuple[tuple[Path, Callable[[Path], object]], ...]] = ContextVar(
    "completing", default=()
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file, and where its data lie until the file is written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def copy(self, data: BinaryIO, file: BinaryIO) -> None:
        """Append its data to a file."""
        data.seek(self.offset)
        left = self.nbytes
        while left:
            piece = data.read(min(left, COPY_BYTES))
            if not piece:
                raise OSError("data that were written are no longer there")
            file.write(piece)
            left -= len(piece)


@dataclass
class _Stack:
    """A tensor whose parts come one by one."""

    tensor: StoredTensor
    path: Path
    missing: set[int]


@dataclass(frozen=True)
class FileOptions:
    """What weight files are called and say of themselves, where their format has more than one way.

    Parameters
    ----------
    stem
        Their name without number and ending.
    type
        The name of the mixture of types that they hold.
    part_bytes
        They are split so that none is larger, unless one tensor alone is; None for one file.
    keys
        More metadata.
    """

    stem: str = "model"
    type: str | None = None
    part_bytes: int | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)


class WeightFiles(Protocol):
    """The format of the weight files of a checkpoint."""

    stem: str  # of their names
    suffix: str
    part_bytes: int | None  # that are the most in a file, unless the writer's say; 0 for no limit
    dtypes: Mapping[np.dtype[Any], str]  # to their names

    def stored(self, name: str, array: NDArray[Any]) -> tuple[str, NDArray[Any]] | None:
        """Return the stored name and values of a tensor; None if it is not stored."""
        ...

    def more(self) -> Iterable[tuple[str, NDArray[Any]]]:
        """Return further tensors to store."""
        ...

    def write(
        self,
        file: BinaryIO,
        number: int,
        tensors: Sequence[StoredTensor],
        data: BinaryIO,
        metadata: dict[str, str],
    ) -> None:
        """Write a file of tensors whose data lie in another file; the `number` of the first is 0."""
        ...

    def overhead(self, names: Iterable[str]) -> int:
        """Return how many bytes the files take at most beside the data of tensors of such names."""
        ...

    def complete(self, files: Sequence[Path], tensors: Mapping[str, int], size: int) -> None:
        """Finish the files under their last names, once it is known how many there are: `tensors` has the
        number of the file of each, `size` are the bytes of all."""
        ...

    def reopen(self, file: Path, number: int) -> None:
        """Take back what `complete` has changed in a file, if it has: more files may come."""
        ...


class SafetensorsFiles:
    """Tensors as they are, in safetensors files."""

    stem = "model"
    suffix = ".safetensors"
    part_bytes: int | None = None
    dtypes: Mapping[np.dtype[Any], str] = _DTYPE_NAMES

    def stored(self, name: str, array: NDArray[Any]) -> tuple[str, NDArray[Any]] | None:
        """As `WeightFiles.stored`."""
        return name, array

    def more(self) -> Iterable[tuple[str, NDArray[Any]]]:
        """As `WeightFiles.more`: nothing."""
        return ()

    def write(
        self,
        file: BinaryIO,
        number: int,
        tensors: Sequence[StoredTensor],
        data: BinaryIO,
        metadata: dict[str, str],
    ) -> None:
        """As `WeightFiles.write`."""
        ordered = _in_order(tensors)
        file.write(_safetensors_header(ordered, metadata))
        for tensor in ordered:
            tensor.copy(data, file)

    def overhead(self, names: Iterable[str]) -> int:
        """As `WeightFiles.overhead`."""
        return ENTRY_BYTES + sum(len(name.encode()) + ENTRY_BYTES for name in names)

    def complete(self, files: Sequence[Path], tensors: Mapping[str, int], size: int) -> None:
        """As `WeightFiles.complete`: of several files there is an index."""
        if len(files) == 1:
            return
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: files[i].name for name, i in sorted(tensors.items())},
        }
        path = files[0].with_name(INDEX_NAME)
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def reopen(self, file: Path, number: int) -> None:
        """As `WeightFiles.reopen`: files stay as they were written."""


@contextmanager
def completed(out: str | os.PathLike[str], complete: Callable[[Path], object]) -> Iterator[None]:
    """Have a checkpoint folder completed before it appears, whoever writes it in this context.

    Parameters
    ----------
    out
        The folder.
    complete
        Is called with the place where all that belongs to it lies, on the rank that writes; of several
        around each other the innermost comes first. What it adds
        there, or writes elsewhere, is there when ``out`` is. An error in it leaves ``out`` as it was.
    """
    place = Path(os.path.realpath(out))
    token = _completing.set(((place, complete), *_completing.get()))
    try:
        yield
    finally:
        _completing.reset(token)


class CheckpointWriter:
    """Writes a checkpoint folder that appears, complete, when the ``with`` block ends well.

    Until then everything lies in the work folder of ``out``. If the block is left by an exception,
    KeyboardInterrupt included, that is removed; with a work folder of their own, callers decide.

    Parameters
    ----------
    out : str or os.PathLike
        The folder to make; an existing empty one counts as absent. Parents are created.
    overwrite : bool
        Replace an existing checkpoint folder. Anything else there is never replaced.
    shard_bytes : int
        Weight files are split so that none is larger, unless one tensor alone is.
    metadata : dict of str to str, optional
        Goes into the header of every weight file; also an attribute, to be changed before the last tensor.
    container : WeightFiles, optional
        What weight files are, safetensors by default; also an attribute, as `metadata`.
    source : pathlib.Path, optional
        Folder of the checkpoint that is being read; ``out`` may not touch it.
    work : WorkFolder, optional
        That of ``out``, entered already; by default one without a state to resume from.

    Raises
    ------
    OutputExistsError
        On entering, if ``out`` exists and may not be overwritten.
    OutputError
        On entering or later, if ``out`` is a wrong place, is being written or cannot be written.

    Examples
    --------
    >>> with CheckpointWriter("small-4bit") as writer:  # doctest: +SKIP
    ...     writer.add("model.norm.weight", np.ones(256, np.float16))
    ...     writer.write_json("config.json", {"model_type": "llama"})
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        metadata: dict[str, str] | None = None,
        source: Path | None = None,
        container: "WeightFiles | None" = None,
        work: WorkFolder | None = None,
    ) -> None:
        self._work = WorkFolder(out) if work is None else work
        self._owns_work = work is None
        self._out = self._work.out
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes
        self.metadata = dict(metadata or {})
        self._source = source
        self._folder: Path | None = None
        self.container: WeightFiles = SafetensorsFiles() if container is None else container
        self._shard_of: dict[str, int] = {}
        self._shard_sizes: list[int] = []  # of the weight files that are written
        self._total_bytes = 0
        # Headers come first in weight files, so data wait for theirs on disk, not in memory.
        self._waiting: list[StoredTensor] = []
        self._waiting_bytes = 0
        self._stacks: dict[str, _Stack] = {}
        self._numbers = count()

    @property
    def inputs(self) -> InputFiles:
        """The files that may not change until the folder is there."""
        return self._work.inputs

    @property
    def out(self) -> Path:
        """Where the folder will be."""
        return self._out

    def __enter__(self) -> Self:
        self.check_place()
        if self._owns_work:
            self._work.__enter__()
        try:
            if self._owns_work:
                self._work.clear()
            folder = self._work.path / UNFINISHED
            with output_errors(self._out):
                folder.mkdir(exist_ok=True)
        except BaseException as error:
            self._leave(error)
            raise
        self._folder = folder
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as raised:
            self._leave(raised)
            raise
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self._folder = None
        if self._owns_work:
            self._work.__exit__(None if error is None else type(error), error, None)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to resume from here, once all that was added is on the disk.

        Returns
        -------
        dict
            For JSON.

        Raises
        ------
        OutputError
            If the disk is full or the like.
        """
        folder, data = self._open_folder(), self._data()
        with output_errors(self._out):
            for path in (*folder.iterdir(), *([data] if self._waiting else []), folder):
                synchronize(path)
        return {
            "shard_sizes": self._shard_sizes,
            "shard_of": self._shard_of,
            "total_bytes": self._total_bytes,
            "waiting": [
                [each.name, self.container.dtypes[each.dtype], list(each.shape), each.offset]
                for each in self._waiting
            ],
        }

    def files(self) -> dict[Path, int]:
        """Return the files that a state counts on, and how many bytes of each."""
        folder, suffix = self._open_folder(), self.container.suffix
        found = {folder / f"{i}{suffix}": size for i, size in enumerate(self._shard_sizes)}
        return found | ({self._data(): self._waiting_bytes} if self._waiting else {})

    def committed(self) -> None:
        """Remove what only a state before the last one needs."""
        used = {self._data(), *(stack.path for stack in self._stacks.values())}
        for name in (DATA_NAME, STACK_NAME):
            for path in self._work.path.glob(name.format("*")):
                if path not in used:
                    path.unlink(missing_ok=True)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state; what was added later is discarded.

        Parameters
        ----------
        state : dict
            From `state`, of a writer with the same work folder.

        Raises
        ------
        ResumeError
            If the files are not as they were then.
        OutputError
            If the operating system refuses.
        """
        folder, suffix = self._open_folder(), self.container.suffix
        self._shard_sizes = list(state["shard_sizes"])
        self._shard_of = dict(state["shard_of"])
        self._total_bytes = state["total_bytes"]
        dtypes = {name: dtype for dtype, name in self.container.dtypes.items()}
        self._waiting = [
            StoredTensor(name, dtypes[dtype], tuple(shape), offset)
            for name, dtype, shape, offset in state["waiting"]
        ]
        self._waiting_bytes = sum(each.nbytes for each in self._waiting)
        data = self._data()
        with output_errors(self._out):
            stem = self.container.stem  # they were named by a run that was killed after that
            for path in folder.glob(f"{glob.escape(stem)}*{suffix}"):
                number = 0 if path.stem == stem else int(path.stem.split("-")[-3]) - 1
                path.rename(folder / f"{number}{suffix}")
            sizes = {folder / f"{i}{suffix}": size for i, size in enumerate(self._shard_sizes)}
            for path in folder.iterdir():
                if path.is_dir():
                    remove_tree(path)
                elif path not in sizes:
                    path.unlink()
            self.committed()
            for number, (path, size) in enumerate(sizes.items()):
                self._work.require(path, size)
                self.container.reopen(path, number)
            if self._waiting:
                self._work.require(data, self._waiting_bytes, or_more=True)
                os.truncate(data, self._waiting_bytes)
            else:
                data.unlink(missing_ok=True)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Add a tensor.

        Parameters
        ----------
        name : str
            Tensor name, not used before.
        array : numpy.ndarray
            Any shape, any of the dtypes in `DTYPES`. Copied, so it may be changed afterwards.

        Raises
        ------
        CheckpointError
            If the name is taken or not a name, or the dtype is not supported.
        OutputError
            If the disk is full or the like.
        """
        found = self._stored(name, array)
        if found is None:
            return
        tensor, data = found
        with self._appended(name, tensor) as file:
            file.write(data)

    def add_part(self, name: str, array: NDArray[Any], index: int, of: int) -> None:
        """Add a part of a tensor, which lies on the disk until all of them are there.

        Parameters
        ----------
        name : str
            That of the tensor, not used before.
        array : numpy.ndarray
            One of the arrays, all of one shape and dtype, that the tensor is a stack of.
        index, of : int
            Which of how many.

        Raises
        ------
        CheckpointError, OutputError
            As `add`.
        """
        found = self._stored(name, array)
        if found is None:
            return
        part, data = found
        tensor = StoredTensor(part.name, part.dtype, (of, *part.shape))
        begun = name in self._stacks
        if not begun:
            path = self._work.path / STACK_NAME.format(next(self._numbers))
            self._stacks[name] = _Stack(tensor, path, set(range(of)))
        stack = self._stacks[name]
        if stack.tensor != tensor or index not in stack.missing:
            raise CheckpointError(
                f"{self._out}: part {index} of tensor {shown(name)} was added before, or is not like "
                f"the others: {list(part.shape)} of {part.dtype}"
            )
        with output_errors(self._out), open(stack.path, "r+b" if begun else "wb") as file:
            file.seek(index * part.nbytes)
            file.write(data)
        stack.missing.remove(index)
        if stack.missing:
            return
        with self._appended(name, tensor) as waiting, open(stack.path, "rb") as parts:
            tensor.copy(parts, waiting)
        del self._stacks[name]
        with output_errors(self._out):
            stack.path.unlink()

    def _stored(self, name: str, array: NDArray[Any]) -> tuple["StoredTensor", memoryview] | None:
        """Return a tensor as it is stored, with its bytes; None if it is not."""
        self._open_folder()
        if name in self._shard_of:
            raise CheckpointError(f"{self._out}: tensor {shown(name)} was added before")
        if name == "__metadata__" or not _is_unicode(name):
            raise CheckpointError(f"{self._out}: {shown(name)} cannot be the name of a tensor")
        stored = self.container.stored(name, array)
        if stored is None:
            return None
        stored_name, array = stored
        dtype = array.dtype.newbyteorder("=")
        if dtype not in self.container.dtypes:
            raise CheckpointError(
                f"{self._out}: tensor {shown(name)} has dtype {array.dtype}; supported are: "
                f"{', '.join(map(str, self.container.dtypes))}"
            )
        data = np.ascontiguousarray(array, dtype)
        return StoredTensor(stored_name, dtype, array.shape), data.reshape(-1).view(np.uint8).data

    @contextmanager
    def _appended(self, name: str, tensor: "StoredTensor") -> Iterator[BinaryIO]:
        """Yield the file that a tensor's data are to be written to; it is added when that went well."""
        most = self.container.part_bytes
        most = self._shard_bytes if most is None else most
        if self._waiting and 0 < most < self._waiting_bytes + tensor.nbytes:
            self._flush(self._open_folder())
        # What a killed run has left there without a state is written over.
        mode = "ab" if self._waiting else "wb"
        with output_errors(self._out), open(self._data(), mode) as file:
            yield cast(BinaryIO, file)
        self._waiting.append(replace(tensor, offset=self._waiting_bytes))
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._shard_of[name] = len(self._shard_sizes)

    def add_file(self, path: Path, name: str | None = None) -> None:
        """Copy a file into the folder.

        Parameters
        ----------
        path : pathlib.Path
            A regular file.
        name : str, optional
            Where to, with slashes between folders; by default its own name.

        Raises
        ------
        CheckpointError
            If the name is taken or reserved for weights, or there is no such regular file.
        OutputError
            If the copy fails.
        """
        if not os.path.isfile(path):
            raise CheckpointError(f"{path}: is not a regular file, so it is not copied")
        target = self._side_file(Path(path).name if name is None else name)
        with output_errors(self._out / target.relative_to(self._open_folder())):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the folder.

        Parameters
        ----------
        name : str
            Plain file name.
        text : str
            Its content, written as UTF-8.

        Raises
        ------
        CheckpointError
            If the name is taken, reserved for weights or not plain, or the text is not Unicode.
        OutputError
            If the file cannot be written.
        """
        if not _is_unicode(text):
            raise CheckpointError(f"{self._out / name}: the text holds lone surrogates")
        target = self._side_file(name)
        with output_errors(self._out / name):
            target.write_bytes(text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the folder, indented, in the order of the given keys.

        Parameters
        ----------
        name : str
            Plain file name.
        value : object
            What the json module accepts.

        Raises
        ------
        CheckpointError
            As `write_text`, or if the value cannot be expressed in JSON.
        OutputError
            If the file cannot be written.
        """
        try:
            text = json.dumps(value, indent=2)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self._out / name}: cannot be written as JSON: {error}"
            ) from error
        self.write_text(name, text + "\n")

    def _open_folder(self) -> Path:
        if self._folder is None:
            raise OutputError(f"{self._out}: the writer is not open; use it in a with statement")
        return self._folder

    def _data(self) -> Path:
        """Return the file for the data of the weight file that is next."""
        return self._work.path / DATA_NAME.format(len(self._shard_sizes))

    def check_place(self) -> None:
        """Refuse a place that is taken, or that holds files which are not ours to replace."""
        out = self._out
        if self._source is not None:
            check_apart(out, self._source, "checkpoint that is read")
        self._work.take_back()
        if not os.path.lexists(out):
            self._work.check_place()
            return
        with output_errors(out):
            content = content_of(out) if out.is_dir() else None
        if content is not None and not content:
            self._work.check_place()
            return
        if not self._overwrite:
            self._work.forget_finished()
            raise taken(out)
        if content is None:
            raise OutputError(f"{out}: is a file; only a checkpoint folder is overwritten")
        names = {entry.name for entry in content}
        if "config.json" not in names or not any(name.endswith(WEIGHT_SUFFIXES) for name in names):
            raise OutputError(
                f"{out}: is not a checkpoint folder (no config.json with *.safetensors or *.gguf), "
                f"so it is not overwritten. Remove it yourself or write elsewhere"
            )
        folders = [entry for entry in content if entry.is_dir(follow_symlinks=False)]
        known = self._names_beside() if folders else set()
        for entry in folders:
            for path in (Path(entry.path), *Path(entry.path).rglob("*")):
                name = path.relative_to(out).as_posix()
                if name not in known:
                    raise OutputError(
                        f"{out}: holds a folder, {entry.name}, and the model that is read has no "
                        f"{name}, so it is not overwritten. Remove it yourself or write elsewhere"
                    )
        self._work.check_place()

    def _names_beside(self) -> set[str]:
        """Return the names of the files, and of the folders with them, that the model brings along."""
        if self._source is None:
            return set()
        folder = self._source if self._source.is_dir() else self._source.parent
        names = SideFiles(folder, self._out).names
        return {*names, *(str(parent) for name in names for parent in PurePosixPath(name).parents)}

    def _side_file(self, name: str) -> Path:
        folder = self._open_folder()
        if not all(map(is_plain_file_name, name.split("/"))):
            raise CheckpointError(f"{self._out}: {shown(name)} is not a plain file name")
        if name.endswith(WEIGHT_SUFFIXES) and "/" not in name:
            raise CheckpointError(f"{self._out}: {name} is a name for weights; use add()")
        if os.path.lexists(folder / name):
            raise CheckpointError(f"{self._out}: {name} was written before")
        return folder / name

    def _flush(self, folder: Path) -> None:
        """Write a weight file. Its data stay until the next state is committed, which may never be."""
        path = folder / f"{len(self._shard_sizes)}{self.container.suffix}"
        waiting = self._data()
        with output_errors(self._out):
            waiting.touch()
            with open(waiting, "rb") as data, open(path, "wb") as file:
                self.container.write(
                    file,
                    len(self._shard_sizes),
                    self._waiting,
                    data,
                    dict(sorted(self.metadata.items())),
                )
            self._shard_sizes.append(path.stat().st_size)
            if self._owns_work:
                waiting.unlink()
        self._waiting, self._waiting_bytes = [], 0

    def _finish(self) -> None:
        folder = self._open_folder()
        for name, stack in self._stacks.items():
            raise CheckpointError(
                f"{self._out}: tensor {shown(name)} lacks parts {sorted(stack.missing)}"
            )
        for name, array in self.container.more():
            self.add(name, array)
        if self._waiting or not self._shard_sizes:
            self._flush(folder)
        with output_errors(self._out):
            self._name_shards(folder)
        for out, complete in _completing.get():
            if out == self._out:
                complete(folder)
        with output_errors(self._out):
            for path in (*folder.rglob("*"), folder):
                synchronize(path)
        # Hours may have passed since the place was looked at.
        self.check_place()
        self._work.put_into_place(UNFINISHED, last="config.json")

    def _name_shards(self, folder: Path) -> None:
        total, suffix, stem = len(self._shard_sizes), self.container.suffix, self.container.stem
        files = [folder / f"{stem}-{i + 1:05d}-of-{total:05d}{suffix}" for i in range(total)]
        if total == 1:
            files = [folder / f"{stem}{suffix}"]
        for i, file in enumerate(files):
            (folder / f"{i}{suffix}").rename(file)
        self.container.complete(files, self._shard_of, self._total_bytes)


def copy_side_files(checkpoint: Checkpoint, writer: CheckpointWriter) -> list[str]:
    """Copy what a checkpoint holds beside weights and config.json: tokenizer, code, licence, …

    Parameters
    ----------
    checkpoint : Checkpoint
        Where the files are; see `bitwright.checkpoint.side_files` for what is left out.
    writer : CheckpointWriter
        Where they go.

    Returns
    -------
    list of str
        The names of the copied files, with slashes, sorted.

    Raises
    ------
    CheckpointError
        If a file was written before.
    OutputError
        If a copy fails.
    """
    names = sorted(side_files(checkpoint, writer.out))
    for name in names:
        writer.add_file(checkpoint.folder / name, name)
    return names


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_apart(out: Path, other: Path, what: str) -> None:
    """Raise OutputError if a folder that is written would be in the way of another one."""
    folder = Path(os.path.realpath(other))
    if out == folder or out in folder.parents or folder in out.parents:
        raise OutputError(f"{out}: overlaps the {what}, {folder}. Write elsewhere")


def write_safetensors(
    path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]
) -> None:
    """Write one safetensors file.

    The library's own writer orders metadata at random, which makes equal inputs give different
    bytes, makes files that only their owner may read, and wants all of a file in memory.
    """
    ordered = _in_order(
        StoredTensor(name, each.dtype, each.shape) for name, each in tensors.items()
    )
    with open(path, "xb") as file:
        file.write(_safetensors_header(ordered, metadata))
        for tensor in ordered:
            file.write(tensors[tensor.name].reshape(-1).view(np.uint8).data)


def _in_order(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Sort by element size, largest first, so that every tensor is aligned to its elements."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def _safetensors_header(ordered: Sequence[StoredTensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
