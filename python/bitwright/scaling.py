"""AWQ on one decoder block: what its layers see, scales searched and folded, weights clipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.methods.awq import (
    DEFAULT_GRID,
    Loss,
    ScaleSearch,
    gram_loss,
    quantize_clipped,
    scaled_rounding,
    search_scale,
    token_loss,
)
from bitwright.methods.grid import GridChoice
from bitwright.methods.metrics import Metric, find_metric, total_error
from bitwright.methods.solver import Solver
from bitwright.models.architecture import Architecture, ScaleGroup
from bitwright.models.block import DecoderBlock, Float32, Rotation, Stage
from bitwright.models.fold import fold_scale
from bitwright.statistics import LayerStatistics
from bitwright.tensor import Grid, QuantizedTensor

Objective = Literal["layer", "block"]
OBJECTIVES: tuple[Objective, ...] = ("layer", "block")
Clip = Literal["default", "all", "none"]
CLIPS: tuple[Clip, ...] = ("default", "all", "none")
METRIC_TOKENS = 1024  # that outputs are computed on where the gram does not do
SEARCH_ROWS = 64  # of each weight that a search from coarse to fine looks at
BLOCK_TOKENS = 4096  # the same for sub-blocks, which need whole samples


@dataclass(frozen=True)
class AwqOptions:
    """What AWQ does; see `bitwright.quantize`."""

    n_grid: int = DEFAULT_GRID
    coarse_to_fine: bool = True
    clip: Clip = "default"
    metric: str | Metric = "mse"
    objective: Objective = "layer"

    def __post_init__(self) -> None:
        find_metric(self.metric)
        if self.n_grid < 1:
            raise ValueError(f"n_grid: expected at least 1, got {self.n_grid}")
        for name, value, known in (
            ("objective", self.objective, OBJECTIVES),
            ("clip", self.clip, CLIPS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")

    def clips(self, architecture: Architecture, name: str) -> bool:
        """Tell whether the ranges of a linear are clipped."""
        if self.clip == "default":
            return name not in architecture.never_clipped()
        return self.clip == "all"


@dataclass
class StageFacts:
    """What is known of a stage's input: second moments, mean magnitudes, and some of the tokens."""

    gram: Float32
    mean_abs: NDArray[np.float64]
    activations: Float32 | None

    def divide(self, scale: Float32) -> None:
        """Divide the channels by a scale that was folded into what computes them."""
        self.gram /= scale
        self.gram /= scale[:, None]
        if self.activations is not None:
            self.activations /= scale


def observe_block(
    block: DecoderBlock,
    hidden: Float32,
    rope: Rotation,
    options: AwqOptions,
    finished: int | None = None,
) -> dict[Stage, StageFacts]:
    """Move `hidden` past a block and return what each stage's linears saw; see `DecoderBlock.forward`."""
    if options.objective == "block":
        step, most = 1, max(1, BLOCK_TOKENS // rope.length) * rope.length
    elif options.metric == "mse":
        step, most = 1, 0
    else:
        step, most = -(-len(hidden) // METRIC_TOKENS), METRIC_TOKENS
    statistics: dict[Stage, LayerStatistics] = {}
    kept: dict[Stage, list[Float32]] = {stage: [] for stage in block.stages}

    def observe(stage: Stage, states: Float32) -> None:
        gathered = statistics.setdefault(stage, LayerStatistics(states.shape[1], magnitudes=True))
        room = most - sum(map(len, kept[stage]))
        if room > 0:
            kept[stage].append(states[-gathered.tokens % step :: step][:room].copy())
        gathered.add(states)

    block.forward(hidden, rope, observe, finished)
    return {
        stage: StageFacts(
            gathered.gram(),
            gathered.mean_abs(),
            np.concatenate(kept[stage]) if kept[stage] else None,
        )
        for stage, gathered in statistics.items()
    }


def some_rows(weight: Float32) -> Float32:
    """Return evenly spaced rows of a weight, enough to tell one ratio from another."""
    return np.ascontiguousarray(weight[:: -(-len(weight) // SEARCH_ROWS)])


class ScaledBlock:
    """A block whose weights AWQ changes: scales are searched and folded group by group.

    Parameters
    ----------
    block
        In float; it is left as it is.
    facts
        From `observe_block`; they are changed into those of the scaled block.
    choices
        The grid of every linear that will be quantized, by name.
    dtypes
        What the tensors of the block are stored in, by name: those that stay in float are rounded
        as soon as they change.
    rope, options
        As for the block and the search.
    """

    def __init__(
        self,
        block: DecoderBlock,
        facts: Mapping[Stage, StageFacts],
        choices: Mapping[str, GridChoice],
        dtypes: Mapping[str, np.dtype[Any]],
        rope: Rotation,
        options: AwqOptions,
    ) -> None:
        self.block = block.with_weights({})
        # Names of tensors that stay in float and are no longer what they were.
        self.changed: set[str] = set()
        self.searches: dict[str, ScaleSearch] = {}  # by the last part of a group's first layer
        self._facts = facts
        self._choices = choices
        self._dtypes = dtypes
        self._rope = rope
        self._options = options

    def scale(self) -> None:
        """Search the scale of every group and fold it."""
        for group in self.block.architecture.scale_groups():
            planned = any(name in self._choices for name in group.layers)
            if planned and self._heads_per_scale(group) > 0:
                self._scale_group(group)

    def clipping(self, stage: Stage) -> dict[str, Solver]:
        """Return how to quantize those of a stage's linears whose ranges are clipped."""
        return {
            name: self._clip_solver(self._facts[stage])
            for name in stage.linears
            if name in self._choices and self._options.clips(self.block.architecture, name)
        }

    def _clip_solver(self, facts: StageFacts) -> Solver:
        def solve(
            weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
        ) -> QuantizedTensor:
            return quantize_clipped(
                weight,
                facts.gram,
                bits,
                size,
                grid=grid,
                scale_dtype=dtype,
                activations=facts.activations,
                metric=self._options.metric,
                n_grid=self._options.n_grid,
            )

        return solve

    def fold(self, group: ScaleGroup, scale: Float32) -> None:
        """Multiply a group's layers by a scale of each output of what precedes them, and divide that."""
        weights = self.block.weights
        names = [f"{group.previous}.{part}" for part in ("weight", "bias")]
        weight, bias, scale = fold_scale(
            group.kind,
            scale,
            weights[names[0]],
            weights.get(names[1]),
            np.float32 if group.kind == "linear" else self._dtypes[names[0]],
        )
        self._change(names[0], weight)
        if bias is not None:
            self._change(names[1], bias)
        scale = self._spread(group, scale)
        for layer in group.layers:
            self._change(f"{layer}.weight", weights[f"{layer}.weight"] * scale)
        self._facts[self._stage(group)].divide(scale)

    def _scale_group(self, group: ScaleGroup) -> None:
        stage = self._stage(group)
        loss = self._loss(group, stage, self._facts[stage])
        shared, mean_abs = self._heads_per_scale(group), self._facts[stage].mean_abs
        if shared > 1:
            heads = mean_abs.reshape(-1, shared, self.block.config.head_dim)
            mean_abs = heads.mean(axis=1).reshape(-1)
        search = search_scale(
            mean_abs,
            lambda scale: loss(self._spread(group, scale)),
            n_grid=self._options.n_grid,
            coarse_to_fine=self._options.coarse_to_fine,
        )
        self.searches[group.layers[0].rpartition(".")[2]] = search
        if search.ratio > 0:
            self.fold(group, search.scale)

    def _stage(self, group: ScaleGroup) -> Stage:
        return next(each for each in self.block.stages if group.layers[0] in each.linears)

    def _spread(self, group: ScaleGroup, scale: Float32) -> Float32:
        """Give each of the heads that share a value head that one's scales."""
        shared = self._heads_per_scale(group)
        if shared == 1:
            return scale
        heads = scale.reshape(-1, 1, self.block.config.head_dim)
        return np.repeat(heads, shared, axis=1).reshape(-1)

    def _change(self, name: str, array: Float32) -> None:
        if name.removesuffix(".weight") not in self._choices:
            array = array.astype(self._dtypes[name]).astype(np.float32)
            self.changed.add(name)
        self.block.weights[name] = array

    def _heads_per_scale(self, group: ScaleGroup) -> int:
        """Return how many heads of the layers' input share one of the previous outputs: 1 as a rule, more
        between grouped values and the attention's output, 0 where shapes allow no scale."""
        channels = self.block.weights[f"{group.layers[0]}.weight"].shape[1]
        outputs = len(self.block.weights[f"{group.previous}.weight"])
        if outputs == channels:
            return 1
        whole_heads = channels % outputs == 0 and outputs % self.block.config.head_dim == 0
        return channels // outputs if whole_heads else 0

    def _loss(self, group: ScaleGroup, stage: Stage, facts: StageFacts) -> Loss:
        states, options = facts.activations, self._options
        block_objective = options.objective == "block" and group.sub_block
        names = [name for name in group.layers if name in self._choices]
        weights = [self.block.weights[f"{name}.weight"] for name in names]
        if options.coarse_to_fine and not block_objective:
            weights = [some_rows(weight) for weight in weights]
        choices = [self._choices[name] for name in names]
        if block_objective and states is not None:
            block, rope = self.block, self._rope
            measure, diagonal = find_metric(options.metric), facts.gram.diagonal()
            reference = block.sub_block(stage, states, rope)

            def loss(scale: Float32) -> float:
                rounded = block.with_weights(
                    {
                        f"{name}.weight": weight + scaled_rounding(weight, scale, choice, diagonal)
                        for name, weight, choice in zip(names, weights, choices, strict=True)
                    }
                )
                return total_error(measure, reference, rounded.sub_block(stage, states, rope))

            return loss
        if states is None or options.metric == "mse":
            return gram_loss(weights, choices, facts.gram)
        return token_loss(weights, choices, states, options.metric)
