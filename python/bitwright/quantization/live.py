"""Statistics of the quantized model: calibration tokens move through its blocks as they are quantized."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.blocks.drift import Drift, OriginalStream, drift_rows
from bitwright.blocks.equalizing import Equalized
from bitwright.blocks.gathering import (
    advance,
    head_moments,
    require_finite_inputs,
    tied_gram,
)
from bitwright.blocks.hidden_states import opened_states
from bitwright.blocks.known_inputs import FEW_TOKENS
from bitwright.blocks.scaling import ScaledBlock, divide_channels, observe_block
from bitwright.loading.model import Model
from bitwright.methods.moments import LayerStatistics, Moments
from bitwright.models.block import DecoderBlock
from bitwright.models.layout import Stage
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.operations import Float32
from bitwright.quantization.layers import Finish, Layers, OwnSolver
from bitwright.quantization.output import QuantizedLayer, Trial
from bitwright.quantization.source import StatisticsSource
from bitwright.ranks import current
from bitwright.runs.journal import Journal
from bitwright.runs.states import ChunkPlan, States
from bitwright.text.samples import tokens_fingerprint

JUDGED_CHUNKS = 1  # that decide between a block with AWQ's scales and one without


class LiveStatistics(StatisticsSource):
    """The inputs of calibration tokens, gathered behind the layers that are quantized already.

    It holds the hidden states before the current block and the inner states of the current stage, for all
    tokens or as many as fit.

    Parameters
    ----------
    model
        In float.
    tokens
        ``[samples, length]`` int32.
    propagates
        Whether layers see what the quantized ones before them compute, or what the original computes.
    """

    def __init__(self, model: Model, tokens: NDArray[np.int32], propagates: bool) -> None:
        self.tokens = tokens.size
        self.moved = (tokens.shape[0], tokens.shape[1])
        self.propagates = propagates
        self._ids = tokens
        self._rope = model.rotation(tokens.shape[1])
        self._states: States | None = None
        self._original: States | None = None

    def identity(self) -> Mapping[str, object]:
        return {"calibration": tokens_fingerprint(self._ids)}

    def begin(
        self,
        layers: Layers,
        journal: Journal,
        state: Mapping[str, Any] | None,
        table: NDArray[Any] | MatrixRows | None,
        resident: int | None,
    ) -> None:
        """Look up the tokens in the embedding, or read the states that an interrupted run has left."""
        model, rope, drifts = layers.model, self._rope, layers.options.drift
        chunks = -(-drift_rows(self.tokens, rope) // rope.chunk_rows) if drifts else 0
        plan = ChunkPlan.shared(self.tokens, rope.chunk_rows, chunks, resident, journal.scratch)
        original = None
        if not self.propagates:
            table = None
        if state is None and (table is None or drifts):
            original = model.embedding_table()
        looked_up = original if table is None else table
        self._states = opened_states(model, self._ids, plan, journal, state, "hidden", looked_up)
        if drifts:
            below = plan.below(chunks)
            self._original = opened_states(
                model, self._ids, below, journal, state, "original", original
            )

    def quantize_block(self, layers: Layers, index: int, block: Equalized) -> None:
        names = (name for stage in block.block.stages for name in stage.linears)
        if layers.awq is None or not layers.plans_any(layers.model.block_prefix(index), names):
            self._pass(layers, block.block, index, self._hidden, layers.output.finish)
        else:
            self._quantize_scaled(layers, block.block, index)

    def kept(self, layers: Layers, index: int) -> Mapping[str, States | None]:
        if not self._is_followed(layers, index):
            return {}
        return {"hidden": self._states, "original": self._original}

    def tied_solver(self, layers: Layers, name: str) -> OwnSolver | None:
        if not (self.propagates and layers.options.method.factors_gram and layers.model.tied):
            return None
        return layers.own_solver(name, tied_gram(layers.model, self._ids))

    def head_solver(self, layers: Layers, name: str, scale: Float32) -> OwnSolver:
        gram = head_moments(layers.model, self._hidden).gram
        divide_channels(gram, scale)
        return layers.own_solver(name, gram)

    def end(self) -> None:
        self._states = self._original = None

    @property
    def _hidden(self) -> States:
        assert self._states is not None
        return self._states

    def _quantize_scaled(self, layers: Layers, block: DecoderBlock, index: int) -> None:
        """Quantize a block with AWQ's scales, or without them where that is nearer to the float block."""
        awq, method = layers.awq, layers.options.method
        assert awq is not None
        prefix, states, rope = layers.model.block_prefix(index), self._hidden, self._rope
        # Rounding asks for no statistics, so those that are known do for the reported errors, and some
        # of the tokens for the comparison.
        regather = self.propagates and (method.needs_gram or layers.options.drift)
        # What experts see is not among the facts: the passes gather it, and from all tokens.
        judged = None if regather or block.layout.experts else JUDGED_CHUNKS
        original = states.copy()
        facts = observe_block(block, original, rope, awq, judged if self.propagates else None)
        block.weights.clear()
        for stage, fact in facts.items():
            require_finite_inputs(np.isfinite(fact.mean_abs).all(), layers.model, stage, index)
        scaled = layers.scaled_block(block, prefix, facts, rope)
        known = None
        if regather:
            scaled.scale()
            scaled.forget_grams(method.clips)
        else:
            known = {stage: fact.gram for stage, fact in facts.items() if fact.gram is not None}
        plain, plain_layers = states.copy(judged), list[QuantizedLayer]()
        after_plain = None if self._original is None else self._original.copy()
        before, self._original = self._original, after_plain
        self._pass(layers, block, index, plain, plain_layers.append, known, whole=True)
        if after_plain is not None:
            after_plain.delete()
        self._original = before
        if not regather:
            scaled.scale()  # which changes what is known, in place
        scaled_layers: list[QuantizedLayer] = []
        is_read = self.propagates and self._is_followed(layers, index)
        after = states.copy(None if is_read or regather else judged)
        clips = scaled if method.clips else None
        self._pass(
            layers, scaled.block, index, after, scaled_layers.append, known, clips, whole=True
        )
        trials = (
            Trial(plain_layers, _mean_square(plain, original, judged)),
            Trial(scaled_layers, _mean_square(after, original, judged)),
        )
        kept = layers.output.finish_better(index, *trials, scaled.searches)
        if kept:
            layers.take_scales(prefix, scaled)
        following = states
        if not self.propagates:
            following = original
        elif is_read and kept:
            following = after
        elif is_read and judged is None:
            following = plain
        elif is_read:
            self._move(block, prefix, plain_layers)
        for each in (states, original, plain, after):
            if each is not following:
                each.delete()
        self._states = following

    def _move(self, block: DecoderBlock, prefix: str, layers: Iterable[QuantizedLayer]) -> None:
        """Move the states past a block whose layers are quantized."""
        tensors = {f"{layer.name.removeprefix(prefix)}.weight": layer.tensor for layer in layers}

        def read(name: str) -> Float32:
            tensor = tensors.get(name)
            return block.weights.read(name) if tensor is None else tensor.dequantize()

        block.reading(read).pass_all(self._hidden.chunks, self._rope)
        self._hidden.forget_inner()

    def _pass(
        self,
        layers: Layers,
        block: DecoderBlock,
        index: int,
        states: States,
        finish: Finish,
        known: Mapping[Stage, Float32] | None = None,
        clips: ScaledBlock | None = None,
        *,
        whole: bool = False,
    ) -> None:
        """Quantize a block stage by stage and move the states past it.

        While a stage is computed chunk by chunk, the next stage's statistics are gathered from the same
        chunk: every product of the forward pass is done once, and on warm data. Where grams are `known`
        they are not gathered. With `clips`, some linears are quantized as it says. With `whole`, what is
        computed is what the quantized block does, to the end, whoever reads it. Weights are forgotten when
        they are done.
        """
        prefix, known, rope = layers.model.block_prefix(index), known or {}, self._rope
        original = OriginalStream(block, self._original, rope)

        def gatherers(stage: Stage | None) -> tuple[LayerStatistics | None, Drift]:
            planned = () if stage is None or stage in known else stage.linears
            planned = tuple(name for name in planned if layers.is_planned(prefix + name))
            statistics = None
            if planned:
                statistics = LayerStatistics(block.layout.linears[planned[0]][1])
            return statistics, original.drift(stage, statistics)

        statistics, drift = gatherers(block.stages[0])
        advance(block, None, block.stages[0], states, rope, statistics, drift)
        for stage, following in zip(block.stages, (*block.stages[1:], None), strict=True):
            gram = known.get(stage)
            few = False
            if statistics is not None:
                moments = statistics.gather()
                require_finite_inputs(moments.is_finite(), layers.model, stage, index)
                drift.gather(moments, statistics.first_tokens)
                few = stage.expert is not None and moments.tokens < FEW_TOKENS
                if few:
                    moments = _gram_of_all(block, stage, states)
                gram = moments.gram
                del moments

            def own_solver(
                name: str, stage: Stage = stage, gram: Float32 | None = gram
            ) -> OwnSolver | None:
                solve = None if clips is None else clips.clip_solver(stage, name, gram)
                return None if solve is None else OwnSolver(solve, gram)

            layers.quantize_stage(
                block,
                prefix,
                stage,
                gram,
                finish,
                own_solver,
                replace=whole or self.propagates,
                few_tokens=few,
                drift=drift,
            )
            del gram, own_solver
            if following is None and not whole and not self._is_followed(layers, index):
                return  # nobody reads the last hidden states
            statistics, drift = gatherers(following)
            advance(block, stage, following, states, rope, statistics, drift)
            block.release(stage)
        original.finish()
        states.forget_inner()

    @staticmethod
    def _is_followed(layers: Layers, index: int) -> bool:
        """Tell whether something after block `index` is calibrated."""
        last = index + 1 == layers.model.config.num_hidden_layers
        return not last or layers.is_planned(layers.model.names.head)


def _mean_square(states: States, original: States, below: int | None) -> float:
    """Return the mean squared difference, over all chunks or those whose number is below a limit."""
    mine: dict[int, tuple[float, int]] = {}
    chunks = zip(states.plan.numbers, states.hidden(), original.hidden(), strict=False)
    for number, rows, others in chunks:
        if below is None or number < below:
            change = rows - others
            mine[number] = _kernels.inner_product(change, change), change.size
    found = sorted(chunk for part in current().gather(mine) for chunk in part.items())
    return sum(total for _, (total, _) in found) / sum(count for _, (_, count) in found)


def _gram_of_all(block: DecoderBlock, stage: Stage, states: States) -> Moments:
    """Gather what an expert that is hardly ever chosen would see if it always were: the gram of its few
    tokens says little of those to come."""
    statistics = LayerStatistics(block.layout.linears[stage.linears[0]][1])
    for number, chunk in zip(states.plan.numbers, states.chunks(), strict=True):
        statistics.add(block.as_if_routed(stage, chunk), states.plan.leaf(number))
    return statistics.gather()
