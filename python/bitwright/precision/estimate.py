"""Estimates the sensitivity of a model's outputs to the precision of each layer."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.checkpoint.fingerprint import model_checksum, model_fingerprint
from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.work_folder import WorkFolder, read_sealed, write_sealed
from bitwright.distill.gradient_memory import (
    backward_bytes,
    batch_step,
    final_bytes,
    sub_block_bytes,
)
from bitwright.distill.losses import LOSSES, DistillationLoss, TopTokens, next_tokens
from bitwright.distill.targets import DEFAULT_K
from bitwright.errors import (
    MALFORMED,
    BitwrightError,
    NonFiniteError,
    check_choice,
)
from bitwright.files.home import expands_home
from bitwright.files.inputs import InputFiles, same_inputs
from bitwright.files.replacing import check_new_file
from bitwright.formats import Format, Precision
from bitwright.grids.choice import GridChoice
from bitwright.grids.tensor import Grid
from bitwright.loading.model import Model, load_model
from bitwright.methods.rtn import quantize_rtn
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.network import Network
from bitwright.models.operations import Float, Float32
from bitwright.precision.recipe import unfit_layers
from bitwright.precision.sensitivities import Sensitivities, precision_name
from bitwright.process.memory import give_back
from bitwright.ranks import current
from bitwright.runs.budget import Budget
from bitwright.runs.limits import RunLimits
from bitwright.runs.progress import Progressing, phase
from bitwright.spellings import Old, respelled
from bitwright.text.builtin import given_or_builtin
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import Samples, TokenSource, tokens_fingerprint

DEFAULT_SAMPLES = 32
BATCH_SIZE = 4
BATCH = "batch-{}.json"  # in the work folder
WHOLE = "sensitivities.json"  # there, too: what is moved into place


class _Batch(TypedDict):
    """The terms of one batch in the loss and in the alignment of each layer."""

    total: float
    alignments: dict[str, float]


@respelled(Old("data", "calibration"))
@expands_home
@finds_models
@same_inputs()
def estimate_sensitivities(
    model: str | os.PathLike[str] | Model,
    calibration: TokenSource | None = None,
    low_bits: int = 3,
    low_group_size: int | None = 64,
    high_bits: int = 5,
    high_group_size: int | None = 64,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    batch_size: int = BATCH_SIZE,
    loss: str = "kl",
    grid: Grid = "affine",
    out: str | os.PathLike[str] | WorkFolder | None = None,
    plot: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    memory: float | None = None,
    resume: bool = True,
    threads: int | None = None,
    progress: Progressing = True,
) -> Sensitivities:
    """Estimate the sensitivity of the model's outputs to each layer's precision.

    All linears of the blocks are rounded to the low precision, and the gradient of the divergence from the
    original is taken there: what it has in common with the change from high to low precision tells how much
    of the divergence is the layer's (as mlx-lm's dynamic_quant). Two forward passes and one backward pass,
    block by block; weights are rounded again when they are needed. The ranks of an MPI run share the
    batches (see `bitwright.ranks.spread_over`); any number of them gives the same bits.

    Parameters
    ----------
    model
        Checkpoint folder of the original, or a loaded model.
    calibration
        Text or token ids, see `load_tokens`.
    low_bits, low_group_size, high_bits, high_group_size
        Both precisions; group size None or -1 is the whole row.
    samples, length, seed
        Take so many samples of so many tokens, chosen by the seed; by default at most 32 samples, of 512
        tokens, or as many as the model knows positions, where that is text.
    bos
        Begin every sample of a text with what the tokenizer puts first, see `load_tokens`.
    batch_size
        Samples that are in memory at a time; fewer where the budget asks for it, with the same result.
    loss
        ``"kl"``, KL(original ‖ low), ``"reverse_kl"``, KL(low ‖ original), or another of DWQ's losses.
    grid
        To round to.
    out
        JSON file to write. Until it is there the batches that are done lie beside it, in ``.NAME.work``. Or
        such a folder by itself, entered, in which they stay.
    plot
        File to plot them to, see `plot_sensitivities`, before `out` is there.
    overwrite
        Replace whatever files `out` and `plot` are; otherwise only such as hold sensitivities, and plots of
        bitwright's.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    resume
        Go on where an interrupted call with the same `out` and arguments stopped.
    threads
        Number of threads from now on, in the whole process.
    progress
        Show progress on standard error, or what gets each record of it, see `Progress`.

    Returns
    -------
    Sensitivities

    Raises
    ------
    ResumeError
        If the interrupted call had other arguments; the message says which.
    OutputExistsError
        If `out` is a file that holds something else.
    MemoryBudgetError
        If the budget is too small, with the smallest that would work.
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError
        If the model or the data cannot be used, or the file not be written; the message says which and why.

    Examples
    --------
    >>> import bitwright
    >>> demo = bitwright.demo_folder()
    >>> found = bitwright.estimate_sensitivities(
    ...     demo, demo / "calibration.txt", samples=4, length=64, progress=False
    ... )
    >>> len(found.per_million) == len(bitwright.load_model(demo).linear_shapes())
    True
    """
    from bitwright.precision.plot import plot_sensitivities  # which import this
    from bitwright.records.plots import PlotBeside

    RunLimits(threads=threads).set_threads()
    original = model if isinstance(model, Model) else load_model(model)
    if original.format is not None:
        raise ValueError(f"{original.checkpoint.folder}: is quantized already; give the original")
    check_choice("loss", loss, LOSSES)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    loaded = _loaded(original, given_or_builtin(calibration), samples, length, seed, bos)
    low, high = (low_bits, low_group_size), (high_bits, high_group_size)
    _check_groups(original, (low, high), grid)
    plan = plan_estimate(original, loaded.tokens, batch_size, memory)
    estimate = _Estimate(original, loaded, low, high, batch_size, loss, grid, plan)
    if isinstance(out, WorkFolder):
        return estimate.go(out, resume, progress)
    if out is None:
        found = estimate.go(None, resume, progress)
        if plot is not None:
            current().on_first(lambda: plot_sensitivities(found, plot))
        return found
    place, work = Path(out), WorkFolder(out)
    beside = PlotBeside(plot, work, overwrite)

    def check() -> None:
        check_new_file(place, Sensitivities.load, overwrite)
        beside.check()

    def write() -> None:
        check()  # hours may have passed
        beside.write(lambda path: plot_sensitivities(found, path))
        found.save(work.path / WHOLE)
        work.put_file_into_place(WHOLE)

    current().on_first(check)
    with work:
        found = estimate.go(work, resume, progress)
        current().on_first(write)
    return found


def check_estimate(
    original: Model,
    data: TokenSource,
    *,
    samples: int | None,
    length: int | None,
    seed: int,
    bos: bool,
    memory: float | None,
) -> None:
    """Raise CalibrationError or MemoryBudgetError where there can be no estimate, see
    `estimate_sensitivities`."""
    tokens = _loaded(original, data, samples, length, seed, bos).tokens
    plan_estimate(original, tokens, BATCH_SIZE, memory)


def _loaded(
    model: Model,
    data: TokenSource,
    samples: int | None,
    length: int | None,
    seed: int,
    bos: bool,
) -> Samples:
    return CalibrationOptions(data, samples, length, seed, bos).load(model, DEFAULT_SAMPLES)


def _check_groups(model: Model, precisions: tuple[tuple[int, int | None], ...], grid: Grid) -> None:
    """Raise ValueError unless every layer consists of whole groups in both precisions."""
    shapes = model.linear_shapes()
    for each in precisions:
        precision = Precision(*each, grid)
        unfit = {
            name: precision
            for name, shape in shapes.items()
            if not Format.fits(shape[1], precision)
        }
        if unfit:
            smaller = [
                f"in smaller groups, such as {precision_name((each[0], size))}, or "
                for size in (64, 32)
                if size < (each[1] or size)
                and all(
                    Format.fits(row, Precision(each[0], size, grid)) for _, row in shapes.values()
                )
            ]
            raise ValueError(
                f"{model.checkpoint.folder}: {unfit_layers(unfit, shapes, Format)}. Estimate "
                f"{smaller[0] if smaller else ''}in whole rows, {each[0]}:-1"
            )


@dataclass(frozen=True)
class EstimatePlan:
    """The pieces in which a batch is computed, and their memory.

    Parameters
    ----------
    samples
        Of a batch, at a time.
    differences
        How many layers' differences between both precisions are kept.
    memory_bytes
        Expected peak of the process.
    least_bytes
        The smallest budget that would work.
    """

    samples: int
    differences: int
    memory_bytes: int
    least_bytes: int


def plan_estimate(
    model: Model, tokens: NDArray[np.int32], batch_size: int, memory: float | None
) -> EstimatePlan:
    """Plan an estimate over tokens ``[samples, length]``; MemoryBudgetError if the budget is too small.

    Pieces consist of the same chunks as a whole batch, from the first to the last, so that every sum is
    taken in the same order.
    """
    length = tokens.shape[1]
    batch = min(batch_size, len(tokens))
    step = batch_step(model, length)
    every = max(len(layout.linears) for layout in model.layouts)
    # From what is fastest to what takes least.
    choices = [(batch, every)]
    choices += [(samples, every) for samples in range((batch - 1) // step * step, 0, -step)]
    choices.append((min(step, batch), 1))
    budget = Budget.of(memory)
    base = budget.base + backward_bytes()
    takes = [base + _piece_bytes(model, length, *choice) for choice in choices]
    budget.require(min(takes), model.checkpoint.folder)
    chosen = next(number for number, most in enumerate(takes) if most <= budget.bytes)
    return EstimatePlan(*choices[chosen], takes[chosen], min(takes))


def _piece_bytes(model: Model, length: int, samples: int, differences: int) -> int:
    """Return what some samples of a batch take, with so many layers' differences kept."""
    rows = samples * length
    peaks = [final_bytes(model, rows, 2)]
    for own, read, backward in sub_block_bytes(model, length, rows):
        known = 4 * sum(sorted(read)[-differences:])
        # The weight, its codes, and both precisions; the difference is counted above.
        rounding = (4 + 1 + 4 + (0 if differences > 1 else 4)) * max(own, default=0)
        final_states = 4 * rows * model.config.hidden_size  # of the other model
        peaks.append(backward + final_states + known + rounding)
    return max(peaks)


class _Estimate:
    """The estimates of batches, one after another or shared by several ranks."""

    def __init__(
        self,
        original: Model,
        samples: Samples,
        low: tuple[int, int | None],
        high: tuple[int, int | None],
        batch_size: int,
        loss: str,
        grid: Grid,
        plan: EstimatePlan,
    ) -> None:
        self.original = original
        self.tokens = samples.tokens
        self.bos = samples.bos
        self.low = low
        self.high = high
        self.batch_size = batch_size
        self.loss = loss
        self.grid = grid
        self.plan = plan
        self.shapes = original.linear_shapes()
        self.model = model_fingerprint(original.checkpoint)
        for name, (_, channels) in self.shapes.items():
            for bits, size in (low, high):
                try:
                    GridChoice.check(np.zeros((1, channels), np.float32), bits, size, grid)
                except ValueError as error:
                    raise self._of_layer(name, error) from error

    def go(self, work: WorkFolder | None, resume: bool, progress: Progressing) -> Sensitivities:
        """Compute all batches but those that the work folder holds already, and sum them."""
        ranks, count = current(), -(-len(self.tokens) // self.batch_size)
        self.inputs = InputFiles() if work is None else work.inputs
        self.inputs.watch_model(self.original.checkpoint)
        known: dict[int, _Batch] = {}
        if work is not None:
            resumed = resume and ranks.on_first(lambda: any(work.path.glob(BATCH.format("*"))))
            identity = {
                "model": self.model,
                "tokens": tokens_fingerprint(self.tokens),
                "bos": self.bos,
                "samples": len(self.tokens),
                "length": self.tokens.shape[1],
                "low precision": precision_name(self.low),
                "high precision": precision_name(self.high),
                "loss": self.loss,
                "batch_size": self.batch_size,
                "grid": self.grid,
            }
            if work.resume(identity, resumed) is None:
                work.commit(identity, {})
                work.keep = False  # until there is more
            known = ranks.on_first(lambda: self._stored(work.path, count))
        left = [number for number in range(count) if number not in known]
        share = ranks.share(len(left))
        with phase("estimating sensitivities", progress, len(share), unit="batches") as shown:
            for number in left[share.start : share.stop]:
                known[number] = self._batch(number)
                self.inputs.check()
                if work is None:
                    self.inputs.take_checksums()
                else:
                    work.keep_checksums()
                    write_sealed(work.path / BATCH.format(f"{number + 1:05d}"), known[number])
                    work.keep = True
                shown.step()
        for others in ranks.gather({number: known[number] for number in left if number in known}):
            known |= others
        give_back()  # what batches have taken, before the weights are read once more
        # In order from the first batch to the last, whichever rank computed them and when.
        batches = [known[number] for number in range(count)]
        return Sensitivities(
            {name: sum(each["alignments"][name] for each in batches) for name in self.shapes},
            {name: math.prod(shape) for name, shape in self.shapes.items()},
            self.low,
            self.high,
            self.model,
            tokens_fingerprint(self.tokens),
            self.loss,
            sum(each["total"] for each in batches),
            ranks.on_first(lambda: model_checksum(self.original.checkpoint)),
        )

    def _stored(self, folder: Path, count: int) -> dict[int, _Batch]:
        """Return the batches that an interrupted run has left; a damaged one is computed again."""
        known: dict[int, _Batch] = {}
        for number in range(count):
            path = folder / BATCH.format(f"{number + 1:05d}")
            content = read_sealed(path)
            if content is None:
                continue
            with suppress(*MALFORMED):
                found = {name: float(content["alignments"][name]) for name in self.shapes}
                total = float(content["total"])
                if all(map(math.isfinite, (total, *found.values()))):
                    known[number] = {"total": total, "alignments": found}
        return known

    @cached_property
    def _reference(self) -> tuple[Network, MatrixRows]:
        return Network(self.original), self.original.rows(self.original.head_name)

    @cached_property
    def _student(self) -> Network:
        return Network(self.original, self._low_weight, rows=self.original.rows)

    def _low_weight(self, name: str, shape: tuple[int, ...]) -> Float32:
        if name in self.shapes:
            return self._rounded(name, self.low)
        return self.original.weight(name, shape)

    def _batch(self, number: int) -> _Batch:
        original, shapes = self.original, self.shapes
        ids = self.tokens[number * self.batch_size :][: self.batch_size]
        alignments = dict.fromkeys(shapes, 0.0)

        # The gradients of a layer come piece by piece, those of one block after those of another.
        @lru_cache(maxsize=self.plan.differences)
        def difference(name: str) -> Float32:
            return self._rounded(name, self.low) - self._rounded(name, self.high)

        def align(name: str, inputs: Float, above: Float) -> None:
            if name not in shapes:
                return
            # ⟨aboveᵀ · inputs, difference⟩ without the dense gradient
            moved = np.empty((len(inputs), shapes[name][0]), np.float32)
            _kernels.linear(inputs, difference(name), None, moved, False)
            alignments[name] += _kernels.inner_product(above, moved)

        reference, head = self._reference
        count = min(DEFAULT_K, original.config.vocab_size)

        def losses(part: NDArray[np.int32]) -> NDArray[np.float64]:
            states = reference.final_states(part)

            def teacher(start: int, stop: int) -> TopTokens:
                return TopTokens.of(original.head_logits(states[start:stop], head), count)

            divergence = DistillationLoss(
                teacher, next_tokens(part), self.loss, factor=1 / self.tokens.size
            )
            return self._student.gradients(part, divergence, align)

        step = self.plan.samples
        parts = [losses(ids[first : first + step]) for first in range(0, len(ids), step)]
        total = float(np.concatenate(parts).sum()) / self.tokens.size
        if not all(map(math.isfinite, (total, *alignments.values()))):
            raise NonFiniteError(
                f"{original.checkpoint.folder}: the sensitivities are not finite; check the model with "
                f"bitwright evaluate"
            )
        return {"total": total, "alignments": alignments}

    def _rounded(self, name: str, precision: tuple[int, int | None]) -> Float32:
        try:
            weight = self.original.weight(name, self.shapes[name])
            return quantize_rtn(weight, *precision, grid=self.grid).dequantize()
        except BitwrightError:
            raise
        except ValueError as error:
            raise self._of_layer(name, error) from error

    def _of_layer(self, name: str, error: ValueError) -> ValueError:
        return ValueError(f"{self.original.checkpoint.folder}: layer {name}: {error}")
