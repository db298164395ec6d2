"""Statistics of a float model's layers, gathered block by block and written into a folder."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import numpy as np

from bitwright.blocks.gathering import advance, head_moments, require_finite_inputs
from bitwright.blocks.hidden_states import opened_states
from bitwright.blocks.loop import through_blocks
from bitwright.checkpoint.fingerprint import digest, model_checksum, model_fingerprint
from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.checkpoint.writer import check_apart
from bitwright.errors import CheckpointError
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.loading.model import Model, load_model
from bitwright.methods.method import MethodOptions
from bitwright.methods.moments import LayerStatistics, Moments
from bitwright.methods.registry import METHODS
from bitwright.models.block import Rotation
from bitwright.models.layout import Stage
from bitwright.quantization.plan import RunPlan, Work, plan_run, tell
from bitwright.ranks import current
from bitwright.runs.journal import Journal, kept_when_interrupted
from bitwright.runs.limits import RunLimits
from bitwright.runs.progress import Progressing
from bitwright.runs.states import ChunkPlan, States
from bitwright.statistics.folder import HEAD_FILE, Statistics, StatisticsWriter, check_place
from bitwright.statistics.imatrix import stages_of_tensors
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import Samples, TokenSource, tokens_fingerprint


@expands_home
@finds_models
@same_inputs()
def collect_statistics(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: TokenSource | None = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    memory: float | None = None,
    resume: bool = True,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progressing = True,
) -> Statistics:
    """Run a model on calibration text and write the statistics that `quantize(statistics=…)` reads.

    The model is streamed, block by block. Parts of a text can be collected on several machines and added
    up by `merge_statistics`. Under MPI the samples are shared by all ranks.

    Parameters
    ----------
    model
        Checkpoint folder or GGUF file.
    out
        Folder to write; it appears when everything is done, or not at all. It takes 4 · in² bytes for each
        group of layers with one input, experts one by one.
    calibration, samples, length, seed, bos, memory, threads, progress
        As for `quantize`.
    resume
        Go on where an interrupted run with the same arguments has stopped, after its last complete block,
        with the bytes that an undisturbed run gives. False starts over.
    overwrite
        Replace other statistics.

    Returns
    -------
    Statistics

    Raises
    ------
    MemoryBudgetError
        If the run would take more memory than it may; the message tells how much it needs.
    ResumeError
        If an interrupted run had other arguments or inputs; the message tells which.
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError
        If anything is wrong with what was given; the message says what and where.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> text = demo / "calibration.txt"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     known = bitwright.collect_statistics(
    ...         demo, f"{folder}/s", text, samples=8, length=128, progress=False
    ...     )
    ...     report = bitwright.quantize(
    ...         demo, f"{folder}/q", bits=3, statistics=known.folder, progress=False
    ...     )
    >>> report.calibration_tokens
    1024
    """
    start = time.perf_counter()
    limits = RunLimits(memory, resume, overwrite, threads, progress)
    limits.set_threads()
    source = load_model(model)
    loaded = CalibrationOptions(calibration, samples, length, seed, bos).load(source)
    work = WorkFolder(out)
    work.inputs.watch_model(source.checkpoint)
    collecting = _Collecting(source, loaded, work, limits)
    collecting.run(start)
    return Statistics(out)


class _Collecting:
    """One pass over a model whose statistics are written."""

    output = None

    def __init__(self, model: Model, samples: Samples, work: WorkFolder, limits: RunLimits) -> None:
        self.writer: StatisticsWriter | None = None
        self._model = model
        self._samples = samples
        self._work = work
        self._limits = limits
        self._ranks = current()
        self._rope = model.rotation(samples.tokens.shape[1])
        self._resident: int | None = None
        self._states: States | None = None

    def run(self, start: float) -> None:
        """Collect and write all statistics."""
        work, model, limits = self._work, self._model, self._limits
        self._ranks.on_first(self._check)
        self._resident = self._planned().resident
        fingerprint = model_fingerprint(model.checkpoint)
        tokens = self._samples.tokens
        identity = {
            "version of bitwright": version("bitwright"),
            "model": fingerprint,
            "calibration": tokens_fingerprint(tokens),
            "bos": self._samples.bos,
            "fixed_order": self._ranks.fixed_order,
        }
        with work, kept_when_interrupted(work):
            journal = Journal(work, identity, start)
            state = journal.begin(limits.resume)
            if self._ranks.is_first:
                self.writer = StatisticsWriter(work, limits.overwrite)
                if state is None:
                    self.writer.restore(None)
            blocks = model.config.num_hidden_layers
            through_blocks(self, journal, state, blocks, "collecting", limits.progress)
            moments = head_moments(model, self._hidden, magnitudes=True)
            if self.writer is not None:
                self.writer.add(model.names.head, len(moments.gram), moments)
                self.writer.end_file(HEAD_FILE)
                digests = [digest(np.ascontiguousarray(sample).data) for sample in tokens]
                checksum = model_checksum(model.checkpoint)
                tensors: dict[str, list[str]] = {}
                with suppress(CheckpointError):  # of families that llama.cpp has not
                    tensors = stages_of_tensors(model)
                self.writer.finish(
                    fingerprint, tokens.size, digests, self._samples.first, checksum, tensors
                )
            self._ranks.barrier()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the writer back to a state of the journal."""
        if self.writer is not None:
            self.writer.restore(state["writer"])

    def begin(self, journal: Journal, state: Mapping[str, Any] | None) -> None:
        """Look up the tokens, or read the states that an interrupted run has left."""
        tokens = self._samples.tokens
        plan = ChunkPlan.shared(
            tokens.size, self._rope.chunk_rows, 0, self._resident, journal.scratch
        )
        self._states = opened_states(self._model, tokens, plan, journal, state)

    def run_block(self, index: int) -> str:
        """Collect the statistics of block `index`."""
        for stage, moments in _stages(self._model, index, self._hidden, self._rope):
            if self.writer is not None:
                name = self._model.block_prefix(index) + stage.name
                self.writer.add(name, len(moments.gram), moments)
            del moments
        if self.writer is not None:
            self.writer.end_file(f"block-{index:05d}.safetensors")
        return ""

    def kept(self, index: int) -> Mapping[str, States | None]:
        """Return the states, which the next block reads, or the head."""
        return {"hidden": self._states}

    @property
    def _hidden(self) -> States:
        assert self._states is not None
        return self._states

    def _check(self) -> None:
        check_apart(self._work.out, self._model.checkpoint.source, "checkpoint that is read")
        check_place(self._work, self._limits.overwrite)

    def _planned(self) -> RunPlan:
        model, limits = self._model, self._limits
        rows, width = self._samples.tokens.shape
        nothing = MethodOptions(METHODS["rtn"])
        work = Work(model, {}, nothing, False, rows * width, width, model.dtype)
        return tell(
            plan_run(work, limits.memory, self._work.out, timed=bool(limits.progress)), limits
        )


def _stages(
    model: Model, index: int, states: States, rope: Rotation
) -> Iterator[tuple[Stage, Moments]]:
    """Move the states past a block and yield what its stages see, one at a time."""
    block = model.block(index)

    def gatherer(stage: Stage | None) -> LayerStatistics | None:
        if stage is None or not stage.has_own_input:
            return None
        return LayerStatistics(block.layout.channels(stage), magnitudes=True)

    statistics = gatherer(block.stages[0])
    advance(block, None, block.stages[0], states, rope, statistics)
    for stage, following in zip(block.stages, (*block.stages[1:], None), strict=True):
        if statistics is not None:
            moments = statistics.gather()
            require_finite_inputs(moments.is_finite(), model, stage, index)
            yield stage, moments
            del moments
        statistics = gatherer(following)
        advance(block, stage, following, states, rope, statistics)
        block.release(stage)
    states.forget_inner()
