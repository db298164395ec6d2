"""Statistics of a float model's layers, gathered block by block and written into a folder."""

import os
import time
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
from rich.console import Console

from bitwright.build import set_num_threads
from bitwright.calibration import TokenSource, load_samples
from bitwright.checkpoint.fingerprint import digest, model_fingerprint
from bitwright.checkpoint.inputs import same_inputs
from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.checkpoint.writer import check_apart
from bitwright.distributed import current
from bitwright.gathering import advance, head_moments, require_finite_inputs
from bitwright.home import expands_home
from bitwright.journal import Journal, kept_when_interrupted
from bitwright.methods.solver import MethodOptions
from bitwright.models.block import Rotation
from bitwright.models.layout import Stage
from bitwright.models.model import Model, load_model
from bitwright.models.operations import Float32
from bitwright.pipeline import DEFAULT_SAMPLES
from bitwright.planner import Work, describe, plan_run
from bitwright.progress import progress_bar
from bitwright.states import ChunkPlan, States, read_states
from bitwright.statistics import LayerStatistics, Moments
from bitwright.statistics_files import (
    HEAD_FILE,
    Statistics,
    StatisticsWriter,
    check_place,
)
from bitwright.targets import tokens_fingerprint


@expands_home
@same_inputs()
def collect_statistics(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: TokenSource,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    memory: float | None = None,
    resume: bool = True,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Statistics:
    """Run a model on calibration text and write what its layers see, for `quantize(statistics=…)`.

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
    if threads is not None:
        set_num_threads(threads)
    source = load_model(model)
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
    tokens = loaded.tokens
    ranks, work = current(), WorkFolder(out)
    work.inputs.watch_model(source.checkpoint)

    def check() -> None:
        check_apart(work.out, source.checkpoint.source, "checkpoint that is read")
        check_place(work, overwrite)

    ranks.on_first(check)
    rows, width = tokens.shape
    nothing = MethodOptions("rtn")
    asked = Work(source, {}, nothing, False, rows * width, width, source.dtype, collects=True)
    planned = plan_run(asked, memory, work.out, timed=progress)
    if progress and ranks.is_first:
        Console(stderr=True).print(describe(planned), highlight=False, soft_wrap=True)
    fingerprint = model_fingerprint(source.checkpoint)
    identity = {
        "version of bitwright": version("bitwright"),
        "model": fingerprint,
        "calibration": tokens_fingerprint(tokens),
        "bos": loaded.bos,
        "fixed_order": ranks.fixed_order,
    }
    with work, kept_when_interrupted(work):
        journal = Journal(work, identity, start)
        state = journal.begin(resume)
        writer = StatisticsWriter(work, overwrite) if ranks.is_first else None
        with journal.going_on():
            first = 0 if state is None else int(state["blocks"])
            if writer is not None:
                writer.restore(state and state["writer"])
            if state is not None:
                journal.check_files(state)
        rope = source.rotation(width)
        plan = ChunkPlan.shared(tokens.size, rope.chunk_rows, 0, planned.resident, journal.scratch)
        hidden: Iterator[Float32]
        if state is None:
            table, flat = source.embedding_table(), tokens.reshape(-1)
            hidden = (source.embed(flat[plan.place(i)], table) for i in plan.numbers)
        else:
            with journal.going_on():
                size = 4 * tokens.size * source.config.hidden_size
                place = journal.states_file(state["states"]["hidden"], size)
            hidden = read_states(place, plan, source.config.hidden_size)
        states = States(plan, hidden)
        count = source.config.num_hidden_layers
        with progress_bar("collecting", progress and ranks.is_first, "blocks") as bar:
            task = bar.add_task("", total=count, completed=first, figures="")
            for index in range(first, count):
                for stage, moments in _stages(source, index, states, rope):
                    if writer is not None:
                        name = source.block_prefix(index) + stage.name
                        writer.add(name, len(moments.gram), moments)
                    del moments
                if writer is not None:
                    writer.end_file(f"block-{index:05d}.safetensors")
                bar.update(task, advance=1)
                journal.commit(index + 1, None, writer, {"hidden": states})
        moments = head_moments(source, states, magnitudes=True)
        if writer is not None:
            writer.add(source.names.head, len(moments.gram), moments)
            writer.end_file(HEAD_FILE)
            digests = [digest(np.ascontiguousarray(sample).data) for sample in tokens]
            writer.finish(fingerprint, tokens.size, digests, loaded.first)
        ranks.barrier()
    return Statistics(out)


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
