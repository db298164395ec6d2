"""AWQ on one decoder block: what its layers see, scales searched and folded, weights clipped."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import check_choice
from bitwright.grids.choice import GridChoice
from bitwright.methods.awq import (
    DEFAULT_GRID,
    Loss,
    ScaleSearch,
    clip_solver,
    gram_loss,
    scaled_rounding,
    search_scale,
    token_loss,
)
from bitwright.methods.method import Solver
from bitwright.methods.metrics import Metric, find_metric, total_error
from bitwright.methods.moments import LayerStatistics
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.fold import fold_scale
from bitwright.models.layout import BlockLayout, ScaleGroup, Stage
from bitwright.models.operations import Float32
from bitwright.ranks import current
from bitwright.runs.states import States

Objective = Literal["layer", "block"]
OBJECTIVES: tuple[Objective, ...] = ("layer", "block")
Clip = Literal["default", "all", "none"]
CLIPS: tuple[Clip, ...] = ("default", "all", "none")
METRIC_TOKENS = 1024  # that outputs are computed on where the gram does not do
SEARCH_ROWS = 64  # of each weight that a search from coarse to fine looks at
FEWEST_ROWS = 8  # of each of many experts
CLIPPED_CHANNELS = 1024  # at least, of which ranges are clipped together
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

    gram: Float32 | None
    blocks: tuple[Float32, ...]  # on the gram's diagonal, of which ranges' clipping asks
    mean_abs: NDArray[np.float64]
    activations: Float32 | None

    def divide(self, scale: Float32) -> None:
        """Divide the channels by a scale that was folded into what computes them."""
        if self.gram is not None:
            divide_channels(self.gram, scale)
        if self.activations is not None:
            self.activations /= scale


def divide_channels(gram: Float32, scale: Float32) -> None:
    """Turn the second moments of an input into those of the input divided by a scale."""
    gram /= scale
    gram /= scale[:, None]


def observe_block(
    block: DecoderBlock,
    states: States,
    rope: Rotation,
    options: AwqOptions,
    finished: int | None = None,
) -> dict[Stage, StageFacts]:
    """Move the states past a block and return what each stage's linears saw.

    Where only chunks whose number is below `finished` are asked for, the last product of the others is left
    out.
    """
    rows = states.plan.rows
    if options.objective == "block":
        step, most = 1, max(1, BLOCK_TOKENS // rope.length) * rope.length
    elif options.metric == "mse":
        step, most = 1, 0
    else:
        step, most = -(-rows // METRIC_TOKENS), METRIC_TOKENS
    # The experts' inputs are some of the router's; of those that they receive, they see too few each for
    # a scale of their own, and all their grams would not fit in memory.
    seen = [stage for stage in block.stages if not stage.reads_routed]
    statistics = {stage: LayerStatistics(block.layout.channels(stage), True) for stage in seen}
    kept: dict[Stage, list[tuple[int, Float32]]] = {stage: [] for stage in seen}
    numbers = states.plan.numbers

    def observe(place: int, stage: Stage, inputs: Float32) -> None:
        if stage not in statistics or len(inputs) == 0:
            return
        if most:
            # Of an expert's tokens nobody knows which of all they are.
            first = states.plan.place(numbers[place]).start
            start = first if stage.expert is None else statistics[stage].tokens
            chosen = inputs[-start % step :: step]
            room = most - (-(-start // step) if stage.expert is None else _count(kept[stage]))
            if room > 0:
                kept[stage].append((start, chosen[:room].copy()))
        statistics[stage].add(inputs, states.plan.leaf(numbers[place]))

    asked = None if finished is None else sum(number < finished for number in numbers)
    block.pass_all(states.chunks, rope, observe, asked)
    states.forget_inner()
    facts = {}
    for stage in seen:
        moments = statistics[stage].gather()
        if moments.tokens == 0 or moments.mean_abs is None:
            continue
        found = current().gather(kept[stage]) if most else []
        parts = sorted((part for each in found for part in each), key=lambda part: part[0])
        facts[stage] = StageFacts(
            moments.gram,
            (moments.gram,),
            moments.mean_abs,
            np.concatenate([rows for _, rows in parts])[:most] if parts else None,
        )
    return facts


def _count(parts: Sequence[tuple[int, Float32]]) -> int:
    return sum(len(rows) for _, rows in parts)


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
        changes: dict[str, list[Callable[[Float32], Float32]]] = {}
        self._changes = changes

        # Not a method: that would be a cycle of references, which holds the grams until it is found.
        def read(name: str) -> Float32:
            array = block.weights.read(name)
            for change in changes.get(name, ()):
                array = change(array)
            return array

        self.block = block.reading(read)
        # Names of tensors that stay in float and are no longer what they were.
        self.changed: set[str] = set()
        self.searches: dict[str, ScaleSearch] = {}  # by the last part of a group's first layer
        # By the stage that reads what was divided; of the norm before experts, the router.
        self.scales: dict[Stage, Float32] = {}
        self._facts = facts
        self._choices = choices
        self._dtype_of = dtype_of
        self._rope = rope
        self._options = options

    def scale(self) -> None:
        """Search the scale of every group and fold it."""
        for group in self.block.layout.groups:
            planned = any(name in self._choices for name in group.layers)
            if planned and self._stage(group) in self._facts and self.channels(group):
                self._scale_group(group)
                self.block.weights.clear()

    def forget_grams(self, clips: bool) -> None:
        """Give back the memory of the grams; for `clips`, keep blocks of whole groups on the diagonals."""
        for stage, facts in self._facts.items():
            if facts.gram is None:
                continue
            if not clips or not any(map(self._clips, stage.linears)):
                facts.gram, facts.blocks = None, ()
                continue
            sizes = [
                self._choices[name].group_size for name in stage.linears if name in self._choices
            ]
            width = math.lcm(*sizes, 1)
            width *= -(-CLIPPED_CHANNELS // width)
            facts.blocks = tuple(
                facts.gram[first : first + width, first : first + width].copy()
                for first in range(0, len(facts.gram), width)
            )
            facts.gram = None

    def clip_solver(self, stage: Stage, name: str, gram: Float32 | None) -> Solver | None:
        """Return how to quantize a linear whose ranges are clipped, by what is known of its input or else
        by the gram given; None for the others."""
        facts = self._facts.get(stage)
        known, activations = (facts.blocks, facts.activations) if facts else ((), None)
        if not known and gram is not None:
            known = (gram,)
        if not known or not self._clips(name):
            return None
        return clip_solver(known, self._options.n_grid, self._options.metric, activations)

    def _clips(self, name: str) -> bool:
        return self._options.clips(self.block.layout, name)

    def fold(self, group: ScaleGroup, scale: Float32) -> None:
        """Multiply a group's layers by a scale of each output of what precedes them, and divide that."""
        weights = self.block.weights
        name, bias_name = f"{group.previous}.weight", f"{group.previous}.bias"
        rows = slice(None) if group.outputs is None else np.asarray(group.outputs)
        dtype = np.float32 if group.kind == "linear" else self._dtype_of(name)
        kind, given = group.kind, scale
        if kind == "linear":  # may be large; neither its bias nor the scale depends on it
            weight = np.empty((len(scale), 0), np.float32)
        else:
            weight = np.ascontiguousarray(weights[name][rows])
        offset = None
        if bias_name in self.block.layout.vectors:
            offset = np.ascontiguousarray(weights[bias_name][rows])
        _, bias, scale = fold_scale(kind, given, weight, offset, dtype)

        def divided(whole: Float32) -> Float32:
            part = np.ascontiguousarray(whole[rows])
            return _with_rows(whole, rows, fold_scale(kind, given, part, offset, dtype)[0])

        self._change(name, divided)
        if bias is not None:
            self._change(bias_name, lambda whole: _with_rows(whole, rows, bias))
        scale = self._spread(group, scale)
        for layer in (*group.layers, *group.floats):
            self._change(f"{layer}.weight", lambda whole: whole * scale)
        stage = self._stage(group)
        self.scales[stage] = self.scales.get(stage, np.float32(1)) * scale
        facts = self._facts.get(stage)
        if facts is not None:
            facts.divide(scale)

    def multiply(self, name: str, factor: float) -> None:
        """Multiply the outputs of a linear."""
        for tensor in (f"{name}.weight", f"{name}.bias"):
            if tensor.endswith(".weight") or tensor in self.block.layout.vectors:
                self._change(tensor, lambda whole: whole * np.float32(factor))

    def channels(self, group: ScaleGroup) -> int:
        """Return how many numbers a group's scale has, 0 where shapes allow none."""
        shared = self._heads_per_scale(group)
        return self.block.layout.linears[group.layers[0]][1] // shared if shared else 0

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

    def _change(self, name: str, change: Callable[[Float32], Float32]) -> None:
        """Change a tensor from now on, whenever it is read."""
        self.block.weights.pop(name, None)
        changes = self._changes.setdefault(name, [])
        changes.append(change)
        if name.removesuffix(".weight") not in self._choices:
            dtype = self._dtype_of(name)
            changes.append(lambda array: array.astype(dtype).astype(np.float32))
            self.changed.add(name)

    def _heads_per_scale(self, group: ScaleGroup) -> int:
        """Return how many heads of the layers' input share one of the previous outputs: 1 as a rule, more
        between grouped values and the attention's output, 0 where shapes allow no scale."""
        layout = self.block.layout
        channels = layout.linears[group.layers[0]][1]
        outputs = channels
        if group.outputs is not None:
            outputs = len(group.outputs)
        elif group.previous in layout.linears:
            outputs = layout.linears[group.previous][0]
        if outputs == channels:
            return 1
        whole_heads = channels % outputs == 0 and outputs % self.block.config.head_dim == 0
        return channels // outputs if whole_heads else 0

    def _loss(self, group: ScaleGroup, stage: Stage, facts: StageFacts) -> Loss:
        states, options = facts.activations, self._options
        block_objective = options.objective == "block" and group.sub_block
        names = [name for name in group.layers if name in self._choices]
        choices = [self._choices[name] for name in names]
        if block_objective and states is not None:
            return self._block_loss(stage, names, choices, facts, states)
        most = None
        if options.coarse_to_fine:
            most = max(FEWEST_ROWS, 4 * SEARCH_ROWS // max(4, len(names)))
        if facts.gram is None:
            raise ValueError("facts: their grams were forgotten")
        losses = []
        for leaf in zip(*(self._leaves(name, most) for name in names), strict=True):
            # Of few rows not every leaf has one.
            weights = [rows for rows in leaf if len(rows)]
            chosen = [choice for choice, rows in zip(choices, leaf, strict=True) if len(rows)]
            if not weights:
                continue
            if states is None or options.metric == "mse":
                loss = gram_loss(weights, chosen, facts.gram)
            else:
                loss = token_loss(weights, chosen, states, options.metric)
            losses.append((sum(map(len, weights)), loss))
        return _mean_loss(losses)

    def _block_loss(
        self,
        stage: Stage,
        names: Sequence[str],
        choices: Sequence[GridChoice],
        facts: StageFacts,
        states: Float32,
    ) -> Loss:
        """Return the loss of what a sub-block adds to the hidden states; every rank computes all of it."""
        block, rope = self.block, self._rope
        measure = find_metric(self._options.metric)
        diagonal = None if facts.gram is None else facts.gram.diagonal()
        weights = [block.weights[f"{name}.weight"] for name in names]
        reference = block.sub_block(stage, states, rope)

        def loss(scale: Float32) -> float:
            rounded = block.with_weights(
                {
                    f"{name}.weight": weight + scaled_rounding(weight, scale, choice, diagonal)
                    for name, weight, choice in zip(names, weights, choices, strict=True)
                }
            )
            error = total_error(measure, reference, rounded.sub_block(stage, states, rope))
            return current().broadcast(error)

        return loss

    def _leaves(self, name: str, most: int | None) -> list[Float32]:
        """Return this rank's share of a weight's rows, or of so many of them, as they are added up."""
        weight = self.block.weights.read(f"{name}.weight")
        rows = weight if most is None else some_rows(weight, most)
        leaves = current().leaves(len(rows))
        return [np.ascontiguousarray(rows[leaf.start : leaf.stop]) for leaf in leaves]


def _mean_loss(losses: Sequence[tuple[int, Loss]]) -> Loss:
    """Return the mean over the rows of all ranks of losses that are means over so many rows."""
    ranks = current()
    all_rows = ranks.total(rows for rows, _ in losses)

    def mean(scale: Float32) -> float:
        return ranks.total(rows * loss(scale) for rows, loss in losses) / all_rows

    return mean


def _with_rows(whole: Float32, rows: slice | NDArray[np.intp], part: Float32) -> Float32:
    """Return `whole` with some of its rows replaced."""
    if isinstance(rows, slice):  # all of them
        return part
    changed = whole.copy()
    changed[rows] = part
    return changed


def _label(name: str) -> str:
    """Return the short name of a linear, with the index of its expert if it has one."""
    *_, before, last = name.split(".")
    return f"{before}.{last}" if before.isdigit() else last
