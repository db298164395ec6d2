"""Output metrics: second moments of gradients with respect to the outputs of a model's layers."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.blocks.drift import drift_rows
from bitwright.checkpoint.fingerprint import digest, model_fingerprint
from bitwright.checkpoint.work_folder import (
    WorkFolder,
    read_sealed,
    remove_tree,
    write_sealed,
)
from bitwright.distill.gradient_memory import (
    backward_bytes,
    batch_step,
    final_bytes,
    sub_block_bytes,
)
from bitwright.distill.losses import DistillationLoss, TopTokens
from bitwright.errors import CheckpointError, NonFiniteError
from bitwright.files.replacing import output_errors
from bitwright.files.seals import Seals, files_of
from bitwright.loading.model import Model
from bitwright.methods.two_sided import METRIC_ROWS, normalized_metric
from bitwright.models.block import Rotation
from bitwright.models.network import Network
from bitwright.models.operations import Float, Float32
from bitwright.ranks import current
from bitwright.runs.budget import Budget
from bitwright.runs.progress import Progressing, phase
from bitwright.text.samples import tokens_fingerprint

DRAWS = 2  # of what comes next, at each token
PARTS = 8  # of the samples, each of which is kept when it is complete
BATCH_SAMPLES = 8  # at a time, where the budget allows


@dataclass(frozen=True)
class GradientPlan:
    """Samples at a time in the backward passes, the expected peak of the process, and the smallest budget
    that would work."""

    samples: int
    memory_bytes: int
    least_bytes: int


def metric_tokens(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the samples of calibration tokens ``[samples, length]`` that gradients are taken over: those
    that drift correction compares, too."""
    length = tokens.shape[1]
    return tokens[: math.ceil(drift_rows(tokens.size, Rotation(length, {})) / length)]


def plan_gradients(model: Model, tokens: NDArray[np.int32], memory: float | None) -> GradientPlan:
    """Plan the backward passes over samples ``[samples, length]``; MemoryBudgetError if the budget is too
    small.

    Batches consist of whole chunks of the backward pass, so that every sum is taken in the same order."""
    length = tokens.shape[1]
    step = batch_step(model, length)
    part = -(-len(tokens) // PARTS)
    most = min(part, max(BATCH_SAMPLES, step))
    choices = [most, *range((most - 1) // step * step, 0, -step)]
    budget = Budget.of(memory)
    base = budget.base + backward_bytes()
    takes = [base + _batch_bytes(model, length, samples) for samples in choices]
    budget.require(min(takes), model.checkpoint.folder, ", or take preset default")
    chosen = next(number for number, taken in enumerate(takes) if taken <= budget.bytes)
    return GradientPlan(choices[chosen], takes[chosen], min(takes))


def _batch_bytes(model: Model, length: int, samples: int) -> int:
    rows = samples * length
    peaks = [final_bytes(model, rows, 2)]
    for index, (_, _, backward) in enumerate(sub_block_bytes(model, length, rows)):
        linears = model.layouts[index // 2].linears.values()
        widest = max(out for out, _ in linears)
        sums = sum(out for out, _ in linears) * METRIC_ROWS
        # Two forms of the gradients in a chunk, taken apart into blocks.
        chunk = min(rows, Rotation(length, {}).tape_rows)
        peaks.append(backward + 4 * sums + 8 * chunk * widest)
    return max(peaks)


def gradient_operations(tokens: float, out: int, channels: int) -> float:
    """Return how many floating-point operations a layer's metric takes over so many tokens: two passes
    forward and one backward, and the sums of products."""
    return DRAWS * tokens * out * (6.0 * channels + 2.0 * min(out, METRIC_ROWS))


class OutputMetrics:
    """The metrics of the outputs of a model's layers, kept in files of a work folder.

    With gradients g_t of −log p(y_t) with respect to a layer's outputs, y_t drawn from the model's own
    distribution, and inputs x_t, a layer's metric is ``Σ_t ‖x_t‖² g_t g_tᵀ``, of which diagonal blocks of
    `METRIC_ROWS` rows are kept. The samples are cut into `PARTS` parts, which are summed up in their order
    when a metric is read: ranks share them, and an interrupted run resumes after the last complete one.

    Parameters
    ----------
    model
        In float.
    tokens
        ``[samples, length]`` int32, from `metric_tokens`.
    seed
        Of the draws.
    work
        Entered.
    plan
        From `plan_gradients`.
    """

    def __init__(
        self,
        model: Model,
        tokens: NDArray[np.int32],
        seed: int,
        work: WorkFolder,
        plan: GradientPlan,
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._seed = seed
        self._work = work
        self._plan = plan
        self._shapes = model.linear_shapes()
        self._numbers = {name: number for number, name in enumerate(self._shapes)}
        count = min(PARTS, len(self._tokens))
        starts = [part * len(self._tokens) // count for part in range(count + 1)]
        self._parts = [range(*ends) for ends in itertools.pairwise(starts)]

    def identity(self) -> dict[str, object]:
        """Return what decides the metrics."""
        return {
            "model": model_fingerprint(self._model.checkpoint),
            "tokens": tokens_fingerprint(self._tokens),
            "seed of the draws": self._seed,
        }

    def fingerprint(self) -> str:
        """Return a digest of what decides the metrics."""
        return digest(json.dumps(self.identity()).encode())

    def gather(self, resume: bool, progress: Progressing) -> None:
        """Compute all parts but those that the work folder holds already."""
        ranks, work, identity = current(), self._work, self.identity()
        work.inputs.watch_model(self._model.checkpoint)
        resumed = resume and ranks.on_first(lambda: any(work.path.glob("part-*.json")))
        if work.resume(identity, resumed) is None:
            work.commit(identity, {})
            work.keep = False  # until there is more
        known = ranks.on_first(lambda: [self._is_known(part) for part in range(len(self._parts))])
        left = [part for part, done in enumerate(known) if not done]
        work.keep = len(left) < len(self._parts)
        share = ranks.share(len(left))
        with phase("gradients of outputs", progress, len(share), unit="parts") as shown:
            for part in left[share.start : share.stop]:
                self._compute(part)
                work.inputs.check()
                work.keep_checksums()
                work.keep = True
                shown.step()
        ranks.barrier()

    def of(self, name: str) -> Float32 | None:
        """Return the metric of a layer, ``[out, METRIC_ROWS]`` float32, as `refine_two_sided` takes it, or
        None if no gradient has reached it."""
        if name not in self._shapes:
            return None
        total = self._read(0, name)
        for part in range(1, len(self._parts)):
            total += self._read(part, name)
        return normalized_metric(total)

    def _folder(self, part: int) -> Path:
        return self._work.path / f"part-{part}"

    def _manifest(self, part: int) -> Path:
        return self._work.path / f"part-{part}.json"

    def _file(self, part: int, name: str) -> Path:
        return self._folder(part) / f"{self._numbers[name]}.npy"

    def _read(self, part: int, name: str) -> Float32:
        path, width = self._file(part, name), self._width(name)
        with output_errors(path, "read"):
            found: Float32 = np.load(path)
        if found.shape != (self._shapes[name][0], width) or found.dtype != np.float32:
            raise CheckpointError(f"{path}: is damaged; remove {self._work.path} and start over")
        return found

    def _width(self, name: str) -> int:
        return min(METRIC_ROWS, self._shapes[name][0])

    def _is_known(self, part: int) -> bool:
        """Tell whether a part is complete and what it was; a damaged one is computed again."""
        found = read_sealed(self._manifest(part))
        return found is not None and Seals(self._work.path).broken(found, whole=True) is None

    def _compute(self, part: int) -> None:
        folder = self._folder(part)
        with output_errors(folder):
            self._manifest(part).unlink(missing_ok=True)
            remove_tree(folder)
            folder.mkdir()
        for name in self._shapes:
            self._write(
                part, name, np.zeros((self._shapes[name][0], self._width(name)), np.float32)
            )
        for draw in range(DRAWS):
            for samples in self._batches(part):
                self._add(part, samples, draw)
        write_sealed(self._manifest(part), Seals(self._work.path).of(files_of(folder)))

    def _batches(self, part: int) -> Iterator[range]:
        samples, step = self._parts[part], self._plan.samples
        for first in range(samples.start, samples.stop, step):
            yield range(first, min(first + step, samples.stop))

    def _write(self, part: int, name: str, sums: Float32) -> None:
        path = self._file(part, name)
        with output_errors(path):
            np.save(path, sums)

    def _add(self, part: int, samples: range, draw: int) -> None:
        """Add one draw at the tokens of some samples to a part; one block's sums are in memory."""
        model = self._model
        sums: dict[str, Float32] = {}
        block = ""

        def store() -> None:
            for name, total in sums.items():
                if not np.isfinite(total).all():
                    raise NonFiniteError(
                        f"{model.checkpoint.folder}: the gradients of {name} are NaN or infinite; check "
                        f"the model with bitwright evaluate"
                    )
                self._write(part, name, total)
            sums.clear()

        def add(name: str, inputs: Float, above: Float) -> None:
            nonlocal block
            if name not in self._shapes:
                return
            prefix = next(each for each in prefixes if name.startswith(each))
            if prefix != block:
                store()
                block = prefix
            if name not in sums:
                sums[name] = self._read(part, name)
            weight = np.einsum("ij,ij->i", inputs, inputs)
            _kernels.add_output_metric(above, weight, sums[name])

        prefixes = [model.block_prefix(index) for index in range(len(model.layouts))]
        length = self._tokens.shape[1]
        uniform = np.concatenate(
            [np.random.default_rng([self._seed, sample, draw]).random(length) for sample in samples]
        )
        loss = _DrawnLoss(uniform)
        Network(model).gradients(self._tokens[samples.start : samples.stop], loss, add)
        store()


@dataclass(frozen=True, eq=False)
class _DrawnLoss:
    """−log p(y) of tokens drawn from the model's own distribution, as `uniform` ``[positions]`` says."""

    uniform: NDArray[np.float64]

    def __call__(
        self, first: int, logits: Float32, gradient: Float32 | None
    ) -> NDArray[np.float64]:
        """Return the losses of the positions from `first` on, and write the gradient of their logits."""
        drawn = _kernels.draw_tokens(logits, self.uniform[first : first + len(logits)])
        nothing = np.zeros((len(logits), 1), np.int32)
        unused = TopTokens(nothing, nothing.astype(np.float32), np.zeros(len(logits), np.float32))
        loss = DistillationLoss(lambda start, stop: unused, drawn, "cross_entropy")
        return loss(0, logits, gradient)
