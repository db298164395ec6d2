"""What a run will take, known before it begins: memory, disk, time; and how many states fit in memory."""

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright import _kernels
from bitwright.blocks.drift import drift_rows
from bitwright.blocks.output_metrics import gradient_operations
from bitwright.blocks.scaling import CLIPPED_CHANNELS
from bitwright.checkpoint.work_folder import work_path
from bitwright.checkpoint.writer import SHARD_BYTES
from bitwright.errors import OutputError
from bitwright.formats import Format, Precision
from bitwright.loading.model import Model
from bitwright.methods.method import MethodOptions
from bitwright.methods.refine import ROUNDS
from bitwright.methods.two_sided import METRIC_ROWS, two_sided_operations
from bitwright.models.block import Rotation
from bitwright.models.layout import BlockLayout, Stage
from bitwright.models.matrix_rows import solved_rows
from bitwright.precision.size import weights_bytes
from bitwright.ranks import current
from bitwright.runs.budget import Budget, gigabytes, told_apart
from bitwright.runs.forecast import (
    INNER_COPIES,
    inner_width,
    passing_bytes,
    stage_shapes,
    weight_count,
)
from bitwright.runs.limits import RunLimits
from bitwright.runs.progress import duration, say
from bitwright.statistics.folder import expected_stages

REFINED_ROWS = 1024  # whose work arrays exist at one time, see cpp/quant/refine.cpp
ROUNDED_BYTES = 14  # of a weight of a piece that is rounded, with what is left of the one before
MEASURED_SIZE = 1024  # of the products that the machine's speed is measured on
MEASURED_SECONDS = 0.1  # the first of them are slow
SUSTAINED_SPEED = 0.88  # of the fastest of them, by the products of a long run
READ_BYTES_PER_SECOND = 2.5e8  # of weights, converted to float32 and checked
WRITTEN_BYTES_PER_SECOND = 2e8
# How fast each kind of work is next to a large product of matrices (bench/RESULTS.md).
GRAM_SPEED, FACTOR_SPEED, REFINING_SPEED = 0.66, 0.8, 0.8


@dataclass(frozen=True)
class RunPlan:
    """What a run takes.

    Parameters
    ----------
    memory_bytes
        Expected peak of the process, with as many states in memory as the budget allows.
    least_bytes
        The smallest budget that would work: all states but those at work are in files.
    budget_bytes
        What was allowed.
    written_bytes
        Of the tensors that are written.
    disk_bytes
        Expected peak beside the output, it included.
    seconds
        Expected wall time; NaN where it was not asked for.
    resident
        How many chunks of states are in memory; None for all.
    """

    memory_bytes: int
    least_bytes: int
    budget_bytes: int
    written_bytes: int
    disk_bytes: int
    seconds: float
    resident: int | None


@dataclass(frozen=True)
class Work:
    """A run to plan.

    Parameters
    ----------
    model
        What is quantized.
    plan
        The precision of every layer.
    options
        What is done to each.
    propagate
        Whether layers see what the quantized ones before them compute.
    tokens, length
        Of calibration, and of a sample; 0 for none.
    scale_dtype
        Of scales.
    known
        Whether what layers see is read from files of statistics or activations.
    format
        What is written; None for such files.
    seen_bytes
        The largest array of a file of activations.
    two_sided
        Whether layers are refined in the metrics of their outputs, too.
    """

    model: Model
    plan: Mapping[str, Precision | None]
    options: MethodOptions
    propagate: bool
    tokens: int
    length: int
    scale_dtype: np.dtype[np.generic]
    known: bool = False
    format: type[Format] | None = None
    seen_bytes: int = 0
    two_sided: bool = False

    @property
    def has_grams(self) -> bool:
        """Whether layers are quantized by what they see."""
        return self.tokens > 0 or self.known

    @property
    def scaled(self) -> bool:
        """Whether AWQ's scales are searched."""
        return self.options.method.scales_first and self.has_grams

    @property
    def regathers(self) -> bool:
        """Whether AWQ's passes ask for statistics of their own."""
        gathered = self.propagate and (self.options.method.needs_gram or self.options.drift)
        return self.known or gathered

    @property
    def rope(self) -> Rotation:
        """The chunks' sizes."""
        return Rotation(max(1, self.length), {})

    @property
    def drift_tokens(self) -> int:
        """Tokens that go through the original, too."""
        return drift_rows(self.tokens, self.rope) if self.options.drift and self.tokens else 0


def plan_run(
    work: Work, memory: float | None, out: Path | None = None, timed: bool = True
) -> RunPlan:
    """Plan a run.

    Parameters
    ----------
    work
        What it does.
    memory
        Budget in gigabytes (10⁹ bytes) for each process; by default three quarters of what is free, shared
        by the MPI ranks of this machine.
    out
        Where the output will be, if there shall be room for it.
    timed
        Whether to measure the machine's speed and estimate the time.

    Returns
    -------
    RunPlan

    Raises
    ------
    MemoryBudgetError
        If the budget is too small; the message tells the smallest that would work.
    OutputError
        If the disk is.
    ValueError
        If the budget is not a positive number.
    """
    ranks, budget = current(), Budget.of(memory)
    chunk = work.rope.chunk_rows
    chunks = math.ceil(math.ceil(work.tokens / chunk) / ranks.size)
    per_chunk = int(4 * min(chunk, work.tokens) * _states_per_token(work))
    # Activations, and a copy that scales or squares them.
    fixed = budget.base + _fixed_bytes(work) + 2 * work.seen_bytes
    least = fixed + (per_chunk if work.tokens else 0)
    instead = ", or take preset fast" if work.options.refine or work.options.drift else ""
    budget.require(least, work.model.checkpoint.folder, instead)
    room = (budget.bytes - fixed) / max(per_chunk, 1)
    resident = None if room >= chunks else max(0, int(room) - 1)  # besides the one at work
    in_memory = chunks if resident is None else resident + 1
    spilled = (chunks - in_memory) * per_chunk
    written = _written_bytes(work)
    disk = _disk_bytes(work, written) + spilled
    if out is not None and ranks.is_first:
        room_there = _free_disk(out)
        if room_there is not None and written > room_there:
            taken, free = told_apart(written, room_there)
            raise OutputError(
                f"{out}: the result takes {taken}, but only {free} of the disk are free. Write elsewhere "
                f"or make room"
            )
    return RunPlan(
        fixed + in_memory * per_chunk if work.tokens else fixed,
        least,
        int(min(budget.bytes, sys.maxsize)),
        written,
        disk,
        _seconds(work, spilled, written) if timed else math.nan,
        resident,
    )


def describe(plan: RunPlan) -> str:
    """Say in a line what a run takes."""
    spilled = "" if plan.resident is None else "; hidden states that do not fit go to disk"
    return (
        f"plan: about {gigabytes(plan.memory_bytes)} of memory (budget {gigabytes(plan.budget_bytes)}), "
        f"{gigabytes(plan.disk_bytes)} of disk, {duration(plan.seconds)}; "
        f"writes {gigabytes(plan.written_bytes)}{spilled}"
    )


def tell(plan: RunPlan, limits: RunLimits) -> RunPlan:
    """Say a plan where progress is shown, and return it."""
    if limits.progress:
        say(describe(plan), limits.progress)
    return plan


def _states_per_token(work: Work) -> float:
    """Return how many floats per token hidden states, and what stages leave, are together at most."""
    if not work.tokens:
        return 0.0
    share = work.drift_tokens / work.tokens
    streams = 1 + share
    if work.scaled:
        streams += 2 + (1 if work.regathers else 0) + share  # float, scaled, plain
    inner = (1 + share) * max(map(inner_width, work.model.layouts))
    return streams * work.model.config.hidden_size + inner


def _fixed_bytes(work: Work) -> int:
    """Return the most that weights, statistics and what solving takes, whatever the tokens."""
    model, config = work.model, work.model.config
    table = config.vocab_size * config.hidden_size
    names, rows = model.names, min(config.vocab_size, solved_rows(config.hidden_size))
    codes = table + table // 16  # with their grids; of pieces, and put together
    matrices = {names.embedding: model.embedding_name}
    if not model.tied:
        matrices[names.head] = model.head_name
    sizes = {
        target: table * _float_dtype(model, name).itemsize for target, name in matrices.items()
    }
    # To be looked up in, or written with a mask.
    peaks = [sizes[names.embedding]]
    if work.format is not None:
        peaks = [size + table for target, size in sizes.items() if not work.plan.get(target)]
    if work.plan.get(names.embedding):
        peaks.append(codes + max(codes, ROUNDED_BYTES * rows * config.hidden_size))
        if work.drift_tokens:  # which look tokens up in the original
            dequantized = 2 * 4 * rows * config.hidden_size  # and the room of the piece before
            peaks.append(codes + dequantized + sizes[names.embedding])
    if work.plan.get(names.head):
        if work.options.method.whole_layers:
            rows = config.vocab_size
        solving = _solve_bytes(work, [(rows, config.hidden_size)], 0)
        peaks.append(codes + max(codes, solving))
    seen = set()
    for index, layout in enumerate(model.layouts):
        key = tuple(layout.linears.values())
        if key not in seen:
            seen.add(key)
            peaks.append(_block_bytes(work, layout, model.block_prefix(index)))
    return max(peaks)


def _float_dtype(model: Model, name: str) -> np.dtype[Any]:
    """Return what a matrix is stored in, or will be."""
    return model.dtype if model.is_quantized(name) else model.checkpoint.dtype(f"{name}.weight")


def _block_bytes(work: Work, layout: BlockLayout, prefix: str) -> int:
    block = weight_count(layout.linears.values())
    grams = {
        stage: layout.channels(stage) ** 2 for stage in layout.stages if not stage.reads_routed
    }
    held = 0  # by AWQ, while passes go on: codes of both forms, and of the grams what is asked for
    peaks = [0]
    chunk = work.rope.chunk_rows
    summands = current().most_summands(math.ceil(work.tokens / chunk))
    if work.scaled:
        peaks.append(passing_bytes(layout, chunk) + 4 * summands * sum(grams.values()))
        largest = max(out * channels for out, channels in layout.linears.values())
        kept = sum(grams.values())
        if work.regathers:
            widths = map(layout.channels, grams if work.options.method.clips else ())
            kept = sum(width * min(width, CLIPPED_CHANNELS) for width in widths)
        held = 2 * block + 4 * kept
        peaks.append(4 * sum(grams.values()) + 14 * largest)
    floats = 4 * weight_count(layout.floats.values())
    before: list[tuple[int, int]] = []
    for stage in layout.stages:
        shapes = stage_shapes(layout, stage)
        if shapes:
            width = 4 * chunk * INNER_COPIES * max(max(shape) for shape in shapes)
            gathered = growing = 0
            if work.regathers or not work.scaled:
                gathered = _gathered(work, shapes, stage)
                growing = _gathered(work, shapes, stage, summands)
            previous, own = weight_count(before), weight_count(shapes)
            drifts = work.drift_tokens > 0 and stage.expert is None
            # While it is gathered, the stage before is computed, in the original, too.
            now = 4 * (previous * (2 if drifts else 1) + (own if drifts else 0)) + growing
            planned = any(work.plan.get(prefix + name) for name in stage.linears)
            solving = 4 * own
            if planned:
                adds, own_gram = stage.adds_to_states, gathered > 0
                solving = _solve_bytes(work, shapes, gathered, drifts, adds, own_gram)
            peaks.append(held + floats + max(now + width, solving))
        before = shapes
    return max(peaks)


def _gathered(work: Work, shapes: list[tuple[int, int]], stage: Stage, summands: int = 1) -> int:
    """Return the bytes of a stage's statistics, each in so many arrays while it grows."""
    if not work.has_grams:
        return 0
    out, channels = shapes[0]
    drifts = work.drift_tokens > 0 and stage.expert is None
    grams = summands + (drifts and work.drift_tokens < work.tokens)
    if work.scaled and not work.regathers and stage.expert is None:
        grams = 0
    cross = (out if stage.adds_to_states else channels) * channels if drifts else 0
    return 4 * (grams * channels**2 + summands * cross)


def _solve_bytes(
    work: Work,
    shapes: list[tuple[int, int]],
    gathered: int,
    drifts: bool = False,
    adds: bool = False,
    own_gram: bool = True,
) -> int:
    """Return the most that correcting and then solving a stage takes, with its statistics unless others
    hold its gram."""
    weights = weight_count(shapes)
    largest = max(out * channels for out, channels in shapes)
    channels = shapes[0][1]
    square = channels**2 if work.has_grams else 0
    correcting = 0
    if drifts:  # what is corrected takes the place of the cross-gram where outputs are added
        correcting = gathered + 4 * (square + weights + (0 if adds else largest))
    factor = square if work.options.method.factors_gram else 0
    square = square if own_gram else 0
    refining = 12 * REFINED_ROWS * channels if work.options.refine else 0
    if work.two_sided:  # a block of rows on each thread; the metric, and a part of its sum
        out = max(out for out, _ in shapes)
        at_once = min(out, METRIC_ROWS * _kernels.num_threads())
        sums = 2 * out * min(METRIC_ROWS, out)
        refining = max(refining, 4 * at_once * (2 * channels + 3 * METRIC_ROWS)) + 4 * sums
    # What solving works on and then the errors are computed from; clipping reads the weights as they are.
    copies = max(work.options.method.copies, 2 if work.options.refine else 1)
    solving = 4 * (square + factor + weights + copies * largest) + largest + refining
    reading = gathered + 4 * weights + (4 + 2) * largest
    return max(correcting, solving, reading)


def _written_bytes(work: Work) -> int:
    """Return the size of the output."""
    if work.format is None:
        return sum(4 * c**2 + 8 * c for _, c in expected_stages(work.model))
    return weights_bytes(work.model, work.format, work.plan, work.scale_dtype)


def _disk_bytes(work: Work, written: int) -> int:
    """Return the output, the weight file that is being put together, and two commits of hidden states."""
    rows = work.tokens + work.drift_tokens
    return written + min(written, SHARD_BYTES) + 2 * 4 * rows * work.model.config.hidden_size


def _seconds(work: Work, spilled: int, written: int) -> float:
    ranks = current()
    products = _products(work) / ranks.size
    moved = work.model.checkpoint.stored_bytes() * (1 + (work.drift_tokens > 0) + 2 * work.scaled)
    blocks = work.model.config.num_hidden_layers
    stages = 8 * spilled * blocks  # read and written at every stage
    commits = 4 * (work.tokens + work.drift_tokens) * work.model.config.hidden_size * blocks
    return (
        products / _speed()
        + moved / READ_BYTES_PER_SECOND
        + (written + stages + commits) / WRITTEN_BYTES_PER_SECOND
    )


def _products(work: Work) -> float:
    """Count the floating-point operations of a run, those of slower kernels as so many more."""
    model, tokens, drift, method = work.model, work.tokens, work.drift_tokens, work.options.method
    passes = 1.0
    if work.scaled:
        passes = 3.0 if work.regathers else 2.1
    streams = passes + (2 if work.scaled else 1) * drift / max(tokens, 1)
    solved = 2 if work.scaled else 1
    operations = 0.0
    for index, layout in enumerate(model.layouts):
        share = _routed_share(model, index)
        for stage in layout.stages:
            seen = tokens * (share if stage.expert is not None else 1.0)
            both = drift * (share if stage.expert is not None else 1.0)
            for number, name in enumerate(stage.linears):
                out, channels = layout.linears[name]
                operations += streams * 2 * seen * out * channels
                drifts = drift and stage.expert is None
                if number == 0 and work.has_grams:
                    gathered = passes if work.scaled and work.regathers else 1.0
                    operations += gathered * seen * channels**2 / GRAM_SPEED
                    if drifts:
                        wide = out if stage.adds_to_states else channels
                        operations += solved * 2.0 * both * channels * wide
                        operations += solved * channels**3 / 3 / FACTOR_SPEED
                    if method.factors_gram:
                        operations += solved * 2 / 3 * channels**3 / FACTOR_SPEED
                if not work.plan.get(model.block_prefix(index) + name):
                    continue
                operations += solved * (100.0 * out * channels + method.operations(out, channels))
                if drifts:
                    operations += solved * 4.0 * out * channels**2
                if work.options.refine and work.has_grams:
                    operations += solved * (2.0 + 4.0 * ROUNDS) * out * channels**2 / REFINING_SPEED
                if work.two_sided:
                    operations += solved * two_sided_operations(out, channels)
                    share = drift_rows(tokens, work.rope) / max(tokens, 1)
                    operations += gradient_operations(seen * share, out, channels)
        operations += streams * _attention_products(model, tokens, work.length)
    return operations


def _attention_products(model: Model, tokens: int, length: int) -> float:
    config = model.config
    return 4.0 * tokens * length * config.num_attention_heads * config.head_dim / 2


def _routed_share(model: Model, index: int) -> float:
    experts = model.config.experts
    return experts.chosen / experts.count if experts and model.config.is_sparse[index] else 1.0


def _speed() -> float:
    """Return the products and sums per second that matrix products come to, where nothing else runs."""
    size = MEASURED_SIZE
    left = np.ones((size, size), np.float32)
    out = np.empty_like(left)
    spent: list[float] = []
    while len(spent) < 3 or sum(spent) < MEASURED_SECONDS:
        start = time.perf_counter()
        _kernels.linear(left, left, None, out, False)
        spent.append(time.perf_counter() - start)
    return SUSTAINED_SPEED * 2 * size**3 / min(spent)


def _free_disk(out: Path) -> int | None:
    """Return the bytes that are free, with those that an interrupted run has written already."""
    place = Path(os.path.realpath(out))
    for folder in (place, *place.parents):
        with suppress(OSError):
            kept = (path.stat().st_size for path in work_path(place).rglob("*") if path.is_file())
            usage = shutil.disk_usage(folder)
            # What is no disk, such as /proc, says that it has no room at all.
            return usage.free + sum(kept) if usage.total else None
    return None
