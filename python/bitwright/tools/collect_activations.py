"""Files of layer inputs: an .npz with one array ``[samples, length, in]`` per layer."""

import os
import time
import zipfile
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arrays import require_finite
from bitwright.blocks.hidden_states import opened_states
from bitwright.blocks.loop import through_blocks
from bitwright.checkpoint.fingerprint import file_stamp, model_fingerprint
from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.work_folder import STATE, WorkFolder
from bitwright.errors import OutputExistsError
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.files.replacing import check_new_file, output_errors, synchronize, taken
from bitwright.loading.model import Model, load_model
from bitwright.models.block import Rotation
from bitwright.runs.budget import Budget
from bitwright.runs.forecast import inner_width, passing_bytes
from bitwright.runs.journal import Journal, kept_when_interrupted
from bitwright.runs.progress import Progressing
from bitwright.runs.states import ChunkPlan, States
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import Samples, TokenSource, tokens_fingerprint

DEFAULT_SAMPLES = 8
WHOLE = "activations.npz"  # in the work folder: what is moved into place


@expands_home
@finds_models
@same_inputs()
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
    progress: Progressing = True,
) -> int:
    """Run a model on calibration text and write the inputs of its layers.

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
    progress
        As for `quantize`.

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
    loaded = planned_samples(
        source, CalibrationOptions(calibration, samples, length, seed, bos), memory
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
        with closing(archive):
            collecting = _Collecting(source, loaded.tokens, archive)
            count = source.config.num_hidden_layers
            through_blocks(collecting, journal, state, count, "collecting", progress)
        _check_new(work.out, overwrite)  # hours may have passed
        archive.put_into_place()
    return archive.count


def planned_samples(
    source: Model, calibration: CalibrationOptions, memory: float | None
) -> Samples:
    """Return the samples that `collect_activations` runs a model on, if there is memory for it."""
    loaded = calibration.load(source, DEFAULT_SAMPLES)
    budget = Budget.of(memory)
    budget.require(
        budget.base + _needed_bytes(source, *loaded.tokens.shape), source.checkpoint.folder
    )
    return loaded


def _check_new(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise taken(path)


def _needed_bytes(source: Model, samples: int, length: int) -> int:
    """Return what collecting takes: a stage's inputs of all samples, and the states beside them."""
    tokens, hidden = samples * length, source.config.hidden_size
    chunk = min(tokens, Rotation(length, {}).chunk_rows)
    name = source.embedding_name
    peaks = [source.codes_bytes(name) + source.piece_bytes(name) + 2 * 4 * tokens * hidden]
    for layout in source.layouts:
        left = inner_width(layout)
        most = max((layout.channels(stage) for stage in layout.stages if stage.linears), default=0)
        # The array before, or inputs that are computed; those of a down projection are states themselves.
        others = most if layout.experts else hidden
        floats = tokens * (hidden + left + most + others)
        peaks.append(4 * floats + passing_bytes(layout, chunk))
    return max(peaks)


class _Collecting:
    """One pass over a model of which the inputs of layers are written."""

    output = None

    def __init__(self, model: Model, tokens: NDArray[np.int32], writer: "_GrowingArchive") -> None:
        self.writer = writer
        self._model = model
        self._tokens = tokens
        self._rope = model.rotation(tokens.shape[1])
        self._states: States | None = None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the archive back to a state of the journal."""
        self.writer.restore(state["writer"])

    def begin(self, journal: Journal, state: Mapping[str, Any] | None) -> None:
        """Look up the tokens, or read the states that an interrupted run has left."""
        plan = ChunkPlan.shared(self._tokens.size, self._rope.chunk_rows, 0)
        self._states = opened_states(self._model, self._tokens, plan, journal, state)

    def run_block(self, index: int) -> str:
        """Write the inputs of the layers of block `index`."""
        model, states, rope = self._model, self._states, self._rope
        assert states is not None
        block = model.block(index)
        chunks = list(states.chunks())
        for stage in block.stages:
            inputs = [block.stage_input(stage, chunk) for chunk in chunks]
            if stage.linears:
                name = model.block_prefix(index) + stage.linears[0]
                array = np.concatenate(inputs)
                if len(array) == 0:  # an expert that no token was routed to
                    array = np.concatenate([block.as_if_routed(stage, chunk) for chunk in chunks])
                if stage.expert is None:
                    array = array.reshape(*self._tokens.shape, -1)
                require_finite(array, f"{model.checkpoint.folder}: the inputs of {name}")
                self.writer.add(name, array)
            for seen, chunk in zip(inputs, chunks, strict=True):
                block.advance(stage, seen, chunk, rope)
            block.release(stage)
        states.forget_inner()
        return ""

    def kept(self, index: int) -> Mapping[str, States | None]:
        """Return the states where another block reads them."""
        return {"hidden": self._states} if index + 1 < self._model.config.num_hidden_layers else {}


class _GrowingArchive:
    """An .npz in a work folder, which grows, and is resumed from where it was committed.

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
        """Do nothing: states before the last one leave no files."""

    def is_in_place(self, state: Mapping[str, Any]) -> bool:
        """Tell whether the file lies where it belongs, as it was in this state."""
        try:
            return bool(file_stamp(self._work.out) == state["file"])
        except OSError:
            return False

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a state.

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
