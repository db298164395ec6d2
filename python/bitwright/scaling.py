"""AWQ on one decoder block: what its layers see, scales searched and folded, weights clipped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import check_choice
from bitwright.methods.awq import (
    DEFAULT_GRID,
    Loss,
    ScaleSearch,
    gram_loss,
    scaled_rounding,
    search_scale,
    token_loss,
)
from bitwright.methods.grid import GridChoice
from bitwright.methods.metrics import Metric, find_metric, total_error
from bitwright.methods.solver import Solver, clip_solver
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.fold import fold_scale
from bitwright.models.layout import BlockLayout, ScaleGroup, Stage
from bitwright.models.operations import Float32
from bitwright.statistics import LayerStatistics

Objective = Literal["layer", "block"]
OBJECTIVES: tuple[Objective, ...] = ("layer", "block")
Clip = Literal["default", "all", "none"]
CLIPS: tuple[Clip, ...] = ("default", "all", "none")
METRIC_TOKENS = 1024  # that outputs are computed on where the gram does not do
SEARCH_ROWS = 64  # of each weight that a search from coarse to fine looks at
FEWEST_ROWS = 8  # of each of many experts
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
            check_choice(name, value, known)

    def clips(self, layout: BlockLayout, name: str) -> bool:
        """Tell whether the ranges of a linear are clipped."""
        if self.clip == "default":
            return name not in layout.never_clipped
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
    # The experts' inputs are some of the router's; of those that they receive, they see too few each for
    # a scale of their own, and all their grams would not fit in memory.
    kept: dict[Stage, list[Float32]] = {
        stage: [] for stage in block.stages if stage.kind not in ("shared", "expert")
    }

    def observe(stage: Stage, states: Float32) -> None:
        if stage not in kept or len(states) == 0:
            return
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


def some_rows(weight: Float32, most: int = SEARCH_ROWS) -> Float32:
    """Return evenly spaced rows of a weight, enough to tell one ratio from another."""
    return np.ascontiguousarray(weight[:: -(-len(weight) // most)])


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
    dtype_of
        What a tensor of the block is stored in: those that stay in float are rounded as soon as they
        change.
    rope, options
        As for the block and the search.
    """

    def __init__(
        self,
        block: DecoderBlock,
        facts: Mapping[Stage, StageFacts],
        choices: Mapping[str, GridChoice],
        dtype_of: Callable[[str], np.dtype[Any]],
        rope: Rotation,
        options: AwqOptions,
    ) -> None:
        self.block = block.with_weights({})
        # Names of tensors that stay in float and are no longer what they were.
        self.changed: set[str] = set()
        self.searches: dict[str, ScaleSearch] = {}  # by the last part of a group's first layer
        self._facts = facts
        self._choices = choices
        self._dtype_of = dtype_of
        self._rope = rope
        self._options = options

    def scale(self) -> None:
        """Search the scale of every group and fold it."""
        for group in self.block.layout.groups:
            planned = any(name in self._choices for name in group.layers)
            if planned and self._stage(group) in self._facts and self._heads_per_scale(group) > 0:
                self._scale_group(group)

    def clip_solver(self, stage: Stage, name: str, gram: Float32 | None) -> Solver | None:
        """Return how to quantize a linear whose ranges are clipped, by what is known of its input or else
        by the gram given; None for the others."""
        facts = self._facts.get(stage)
        known, activations = (facts.gram, facts.activations) if facts else (gram, None)
        if known is None or not self._options.clips(self.block.layout, name):
            return None
        return clip_solver(known, self._options.n_grid, self._options.metric, activations)

    def fold(self, group: ScaleGroup, scale: Float32) -> None:
        """Multiply a group's layers by a scale of each output of what precedes them, and divide that."""
        weights = self.block.weights
        name = f"{group.previous}.weight"
        bias_name = f"{group.previous}.bias"
        whole, offset = weights[name], None
        if bias_name in self.block.layout.vectors:
            offset = weights[bias_name]
        rows = slice(None) if group.outputs is None else np.asarray(group.outputs)
        weight, bias, scale = fold_scale(
            group.kind,
            scale,
            np.ascontiguousarray(whole[rows]),
            None if offset is None else np.ascontiguousarray(offset[rows]),
            np.float32 if group.kind == "linear" else self._dtype_of(name),
        )
        self._change(name, _with_rows(whole, rows, weight))
        if offset is not None and bias is not None:
            self._change(bias_name, _with_rows(offset, rows, bias))
        scale = self._spread(group, scale)
        for layer in (*group.layers, *group.floats):
            self._change(f"{layer}.weight", weights[f"{layer}.weight"] * scale)
        facts = self._facts.get(self._stage(group))
        if facts is not None:
            facts.divide(scale)

    def _scale_group(self, group: ScaleGroup) -> None:
        stage = self._stage(group)
        facts = self._facts[stage]
        loss = self._loss(group, stage, facts)
        shared, mean_abs = self._heads_per_scale(group), facts.mean_abs
        if shared > 1:
            heads = mean_abs.reshape(-1, shared, self.block.config.head_dim)
            mean_abs = heads.mean(axis=1).reshape(-1)
        search = search_scale(
            mean_abs,
            lambda scale: loss(self._spread(group, scale)),
            n_grid=self._options.n_grid,
            coarse_to_fine=self._options.coarse_to_fine,
        )
        self.searches[_label(group.layers[0])] = search
        if search.ratio > 0:
            self.fold(group, search.scale)

    def _stage(self, group: ScaleGroup) -> Stage:
        """Return the stage that reads what the group's previous layer computes."""
        stages = self.block.stages
        after_norm = (each for each in stages if each.norm == group.previous)
        reading = (each for each in stages if group.layers[0] in each.linears)
        return next(after_norm, None) or next(reading)

    def _spread(self, group: ScaleGroup, scale: Float32) -> Float32:
        """Give each of the heads that share a value head that one's scales."""
        shared = self._heads_per_scale(group)
        if shared == 1:
            return scale
        heads = scale.reshape(-1, 1, self.block.config.head_dim)
        return np.repeat(heads, shared, axis=1).reshape(-1)

    def _change(self, name: str, array: Float32) -> None:
        if name.removesuffix(".weight") not in self._choices:
            array = array.astype(self._dtype_of(name)).astype(np.float32)
            self.changed.add(name)
        self.block.weights[name] = array

    def _heads_per_scale(self, group: ScaleGroup) -> int:
        """Return how many heads of the layers' input share one of the previous outputs: 1 as a rule, more
        between grouped values and the attention's output, 0 where shapes allow no scale."""
        channels = self.block.weights[f"{group.layers[0]}.weight"].shape[1]
        outputs = len(self.block.weights[f"{group.previous}.weight"])
        if group.outputs is not None:
            outputs = len(group.outputs)
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
            most = max(FEWEST_ROWS, 4 * SEARCH_ROWS // max(4, len(weights)))
            weights = [some_rows(weight, most) for weight in weights]
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


def _with_rows(whole: Float32, rows: slice | NDArray[np.intp], part: Float32) -> Float32:
    """Return `whole` with some of its rows replaced."""
    changed = whole.copy()
    changed[rows] = part
    return changed


def _label(name: str) -> str:
    """Return the short name of a linear, with the index of its expert if it has one."""
    *_, before, last = name.split(".")
    return f"{before}.{last}" if before.isdigit() else last
