"""Files of layer inputs: an .npz with one array ``[samples, length, in]`` per layer."""

import math
import os
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import (
    MAGIC_PREFIX,
    read_array,
    read_array_header_1_0,
    read_array_header_2_0,
    read_magic,
)
from numpy.typing import NDArray

from bitwright.budget import Budget
from bitwright.calibration import TokenSource, load_samples
from bitwright.checkpoint.fingerprint import file_fingerprint, file_stamp, model_fingerprint
from bitwright.checkpoint.replacing import check_new_file, output_errors, synchronize, taken
from bitwright.checkpoint.work_folder import STATE, WorkFolder
from bitwright.errors import CalibrationError, OutputExistsError, shown
from bitwright.home import expands_home
from bitwright.journal import Journal, kept_when_interrupted
from bitwright.models.block import Rotation
from bitwright.models.model import Model, load_model
from bitwright.models.operations import Float32
from bitwright.planner import inner_width, passing_bytes
from bitwright.states import ChunkPlan, States, read_states
from bitwright.statistics import require_finite
from bitwright.targets import tokens_fingerprint

DEFAULT_SAMPLES = 8
SHOWN_NAMES = 5
WHOLE = "activations.npz"  # in the work folder: what is moved into place
MOST_EXPANSION = 16  # of a compressed array when it is read; activations shrink by less than half
_HEADERS = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}


class ActivationFile:
    """An .npz of activations, read layer by layer.

    Parameters
    ----------
    path
        Arrays ``[tokens, in]`` or ``[batch, length, in]`` by full layer name, with or without ``.weight``.
        Layers that share their input may share the array of one of them.

    Raises
    ------
    CalibrationError
        If there is no such file, or it is not an .npz.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.path.isfile(self.path):  # opening a pipe would wait for someone to write to it
            raise CalibrationError(f"{self.path}: cannot be read (there is no such file)")
        try:
            with self.path.open("rb") as file:
                alone = file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX
            if alone:
                raise CalibrationError(
                    f"{self.path}: is a single array; expected an .npz, one per layer"
                )
            self._archive = zipfile.ZipFile(self.path)
        except OSError as error:
            raise CalibrationError(f"{self.path}: cannot be read ({error.strerror})") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise CalibrationError(
                f"{self.path}: is not an .npz of numeric arrays ({error})"
            ) from error
        self._entries = {
            each.filename.removesuffix(".npy"): each for each in self._archive.infolist()
        }

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def __enter__(self) -> "ActivationFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fingerprint(self) -> str:
        """Return what the file is known by again."""
        return file_fingerprint(self.path)

    def token_count(self) -> int:
        """Return how many tokens the file was made of: those of its longest array, as experts see few."""
        counts = [0]
        for entry in self._entries.values():
            with suppress(Exception):  # as in `tokens`; what cannot be read is refused there
                shape, dtype, start = self._header(entry)
                if math.prod(shape) * dtype.itemsize == entry.file_size - start:
                    counts.append(math.prod(shape[:-1]))
        return max(counts)

    def largest_bytes(self) -> int:
        """Return what the largest array takes in float32, with itself where it is stored otherwise."""
        sizes = [0]
        for entry in self._entries.values():
            with suppress(Exception):  # as in `tokens`
                shape, dtype, _ = self._header(entry)
                other = 0 if dtype == np.float32 else dtype.itemsize
                sizes.append(math.prod(shape) * (4 + other))
        return max(sizes)

    def _header(self, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Return an array's shape and dtype, and where its values begin."""
        with self._archive.open(entry) as file:
            version = read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"version {version}")
            shape, _, dtype = _HEADERS[version](file)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
            return shape, dtype, file.tell()

    def tokens(self, layers: Iterable[str], channels: int) -> Float32:
        """Return the inputs ``[tokens, channels]`` of the first of `layers` that the file has.

        Raises
        ------
        CalibrationError
            If none is there, or the array is pickled, damaged, or of the wrong width.
        NonFiniteError
            If a value is NaN or infinite.
        """
        layers = tuple(layers)
        name = self._name(layers)
        try:
            array = self._read(self._entries[name])
        except Exception as error:  # as in `load_tokens`: headers are parsed as Python
            raise self._damaged(name, error) from error
        self._check(name, array.dtype, array.shape, layers[0], channels)
        with np.errstate(all="ignore"):  # of NaN and what overflows, which are refused below
            tokens = np.ascontiguousarray(array.reshape(-1, channels), np.float32)
            some = tokens.any()
        if not some:
            raise CalibrationError(f"{self.path}: array {name} is empty or all zero")
        require_finite(tokens, f"{self.path}: array {name}")
        return tokens

    def require(self, layers: Sequence[str], channels: int) -> None:
        """Raise CalibrationError unless the file has the inputs of one of `layers`, as its header tells."""
        name = self._name(layers)
        try:
            shape, dtype, _ = self._header(self._entries[name])
        except Exception as error:
            raise self._damaged(name, error) from error
        self._check(name, dtype, shape, layers[0], channels)

    def _name(self, layers: Sequence[str]) -> str:
        """Return the array that has the inputs of the first of `layers` that the file has."""
        known = self._entries
        name = next(
            (f"{n}{end}" for n in layers for end in ("", ".weight") if f"{n}{end}" in known), ""
        )
        if not name:
            present = ", ".join(map(shown, [*known][:SHOWN_NAMES]))
            more = f" and {len(known) - SHOWN_NAMES} more" if len(known) > SHOWN_NAMES else ""
            raise CalibrationError(
                f"{self.path}: has no activations of layer {layers[0]}; it has {present or 'none'}{more}"
            )
        return name

    def _damaged(self, name: str, error: Exception) -> CalibrationError:
        return CalibrationError(
            f"{self.path}: array {name} is pickled or damaged, and is not read ({shown(str(error))})"
        )

    def _check(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], layer: str, channels: int
    ) -> None:
        if dtype.kind != "f" or len(shape) not in (2, 3) or shape[-1] != channels:
            raise CalibrationError(
                f"{self.path}: array {name} is {dtype} of shape {list(shape)}; layer {layer} needs "
                f"floats [batch, length, {channels}]"
            )

    def _read(self, entry: zipfile.ZipInfo) -> NDArray[Any]:
        most = MOST_EXPANSION * min(entry.compress_size, self.path.stat().st_size)
        shape, dtype, start = self._header(entry)
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != entry.file_size - start:
            raise ValueError(f"{size} bytes of {entry.file_size}")
        if size > most:
            raise ValueError(f"{size} bytes, packed into {entry.compress_size}")
        with self._archive.open(entry) as file:
            array: NDArray[Any] = read_array(file, allow_pickle=False)
        return array


@expands_home
def collect_activations(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | WorkFolder,
    calibration: TokenSource,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    memory: float | None = None,
    overwrite: bool = False,
    resume: bool = True,
) -> int:
    """Run a model on calibration text and write what its layers see.

    Parameters
    ----------
    model
        Checkpoint folder.
    out
        The .npz to write, whole or not at all: arrays ``[samples, length, in]`` float32, one for each group
        of layers with one input, by the full name of the first of them; of an expert ``[tokens, in]``, the
        tokens that it received, or all where it received none. Until it is there what is done lies beside
        it, in ``.NAME.work``. Or the work folder of such a file, entered: then a file that an interrupted
        call with the same arguments has put into its place is taken as it is.
    calibration, samples, length, seed, bos
        As for `quantize`; by default 8 samples. Every token takes ``4 * in`` bytes per group.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    overwrite
        Replace an existing file.
    resume
        Go on where an interrupted call with the same `out` and arguments stopped.

    Returns
    -------
    int
        The number of arrays.

    Raises
    ------
    ResumeError
        If the interrupted call had other arguments; the message says which.
    MemoryBudgetError
        If the budget is too small, with the smallest that would work.
    CheckpointError, CalibrationError, OutputError
        If anything is wrong with what was given.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bitwright.collect_activations(demo, f"{folder}/a.npz", demo / "calibration.txt", length=64)
    12
    """
    start = time.perf_counter()
    source = load_model(model)
    work = out if isinstance(out, WorkFolder) else WorkFolder(out)
    if not (resume and (work.path / STATE).is_file()):
        try:
            _check_new(work.out, overwrite)
        except OutputExistsError:
            work.forget_finished()
            raise
    check_new_file(work.out, lambda _: None)
    loaded = load_samples(
        calibration,
        tokenizer=source.checkpoint.folder,
        length=length,
        samples=samples,
        seed=seed,
        vocab_size=source.config.vocab_size,
        positions=source.positions,
        bos=bos,
        most=DEFAULT_SAMPLES,
    )
    budget = Budget.of(memory)
    budget.require(
        budget.base + _needed_bytes(source, *loaded.tokens.shape), source.checkpoint.folder
    )
    identity = {
        "version of bitwright": version("bitwright"),
        "model": model_fingerprint(source.checkpoint),
        "calibration": tokens_fingerprint(loaded.tokens),
        "bos": loaded.bos,
    }
    with work if work is not out else nullcontext(), kept_when_interrupted(work):
        work.inputs.watch_model(source.checkpoint)
        journal = Journal(work, identity, start)
        state = journal.begin(resume)
        archive = _GrowingArchive(work)
        if state is not None:
            with journal.going_on():
                blocks, written = int(state["blocks"]), state["writer"]
            if blocks == source.config.num_hidden_layers:
                if archive.is_in_place(written):
                    return int(written["count"])
                if not (work.path / WHOLE).exists():  # nor is it where it was put
                    state = journal.begin(resume=False)
        _check_new(work.out, overwrite)
        if state is not None:
            with journal.going_on():
                archive.restore(state["writer"])
                journal.check_files(state)
        with closing(archive):
            _collect(source, loaded.tokens, journal, state, archive)
        _check_new(work.out, overwrite)  # hours may have passed
        archive.put_into_place()
    return archive.count


def _check_new(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise taken(path)


def _needed_bytes(source: Model, samples: int, length: int) -> int:
    """Return what collecting takes: a stage's inputs of all samples, twice, and the states beside them."""
    tokens, hidden = samples * length, source.config.hidden_size
    chunk = min(tokens, Rotation(length, {}).chunk_rows)
    name = source.embedding_name
    peaks = [source.codes_bytes(name) + source.piece_bytes(name) + 2 * 4 * tokens * hidden]
    for layout in source.layouts:
        left = inner_width(layout)
        most = max((layout.channels(stage) for stage in layout.stages if stage.linears), default=0)
        floats = tokens * (hidden + left + 2 * most)
        peaks.append(4 * floats + passing_bytes(layout, chunk))
    return max(peaks)


def _collect(
    source: Model,
    tokens: NDArray[np.int32],
    journal: Journal,
    state: Mapping[str, Any] | None,
    archive: "_GrowingArchive",
) -> None:
    """Run the blocks that are left, and write what their layers see."""
    rope = source.rotation(tokens.shape[1])
    plan = ChunkPlan.shared(tokens.size, rope.chunk_rows, 0)
    count = source.config.num_hidden_layers
    first = 0
    hidden: Iterable[Float32] = ()
    if state is None:
        hidden = rope.chunks(source.embed(tokens))
    else:
        with journal.going_on():
            first = int(state["blocks"])
            if first == count:
                return
            size = 4 * tokens.size * source.config.hidden_size
            place = journal.states_file(state["states"]["hidden"], size)
        hidden = read_states(place, plan, source.config.hidden_size)
    states = States(plan, hidden)
    for index in range(first, count):
        block = source.block(index)
        chunks = list(states.chunks())
        for stage in block.stages:
            inputs = [block.stage_input(stage, chunk) for chunk in chunks]
            if stage.linears:
                name = source.block_prefix(index) + stage.linears[0]
                array = np.concatenate(inputs)
                if len(array) == 0:  # an expert that no token was routed to
                    array = np.concatenate([block.as_if_routed(stage, chunk) for chunk in chunks])
                if stage.expert is None:
                    array = array.reshape(*tokens.shape, -1)
                require_finite(array, f"{source.checkpoint.folder}: the inputs of {name}")
                archive.add(name, array)
            for seen, chunk in zip(inputs, chunks, strict=True):
                block.advance(stage, seen, chunk, rope)
            block.release(stage)
        states.forget_inner()
        kept = {"hidden": states} if index + 1 < count else {}
        journal.commit(index + 1, None, archive, kept)


class _GrowingArchive:
    """An .npz in a work folder, which grows, and is gone on with from where it was committed.

    A zip file ends with the list of what is in it, which gives way to what is added; so it is a part of the
    state.
    """

    def __init__(self, work: WorkFolder) -> None:
        self.count = 0
        self._work = work
        self._path = work.path / WHOLE
        self._end = 0  # of the arrays that are committed
        self._archive: zipfile.ZipFile | None = None

    def close(self) -> None:
        """Close the file; what is not committed is lost."""
        with suppress(OSError):  # of a full disk, which has been told already
            if self._archive is not None:
                self._archive.close()

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Write an array."""
        with output_errors(self._work.out):
            if self._archive is None:
                self._archive = zipfile.ZipFile(self._path, "a" if self._end else "w")
            with self._archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
        self.count += 1

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, with all that was added on the disk."""
        with output_errors(self._work.out):
            if self._archive is not None:
                self._archive.close()
                self._archive = None
            synchronize(self._path)
            with zipfile.ZipFile(self._path) as archive:
                self._end = archive.start_dir
            with open(self._path, "rb") as file:
                file.seek(self._end)
                directory = file.read().hex()
        return {
            "count": self.count,
            "end": self._end,
            "directory": directory,
            "file": file_stamp(self._path),
        }

    def files(self) -> dict[Path, int]:
        """Return the file, up to where the arrays end that a state counts on."""
        return {self._path: self._end}

    def committed(self) -> None:
        """Nothing is left of states before the last one."""

    def is_in_place(self, state: Mapping[str, Any]) -> bool:
        """Tell whether the file lies where it belongs, as it was in this state."""
        try:
            return bool(file_stamp(self._work.out) == state["file"])
        except OSError:
            return False

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises
        ------
        ResumeError
            If what was written is not there any more.
        """
        self.count = int(state["count"])
        self._end = int(state["end"])
        directory = bytes.fromhex(state["directory"])
        self._work.require(self._path, self._end, or_more=True)
        with output_errors(self._path), open(self._path, "r+b") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(directory)
        modified = int(state["file"][-1])
        os.utime(self._path, ns=(modified, modified))  # by which it is known

    def put_into_place(self) -> None:
        """Move the file to where it belongs; by its state it is known there."""
        with output_errors(self._work.out):
            os.replace(self._path, self._work.out)
            with suppress(OSError):  # some file systems cannot synchronize folders
                synchronize(self._work.out.parent)
