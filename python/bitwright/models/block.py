"""One decoder block, computed stage by stage."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from bitwright.models.architecture import (
    Architecture,
    Attention,
    Experts,
    GatedDelta,
    LatentAttention,
    Mamba,
    Mlp,
    ShortConvolution,
)
from bitwright.models.config import (
    ExpertsConfig,
    LatentConfig,
    LayerType,
    ModelConfig,
    RecurrenceConfig,
)
from bitwright.models.layout import SUB_BLOCK_STARTS, BlockLayout, Stage
from bitwright.models.operations import BlockWeights, Float, Operations
from bitwright.models.routing import Routes
from bitwright.models.tape import OnLinear, Tape

DELTA_EPSILON = 1e-6  # of the squared lengths of a delta-net's queries and keys
MOST_CHUNK_TOKENS, MOST_TAPE_TOKENS = 1024, 512
Observer = Callable[[int, Stage, Float], None]


@dataclass(eq=False)
class ChunkStates:
    """The activations of some whole samples between two stages.

    Parameters
    ----------
    hidden
        ``[tokens, hidden_size]``, the residual stream; blocks change it in place.
    inner
        Intermediate activations by name: ``inner`` (attention's output, an MLP's product),
        ``normed`` (what experts read), the latents.
    routes
        Which tokens go to which expert.
    """

    hidden: Float
    inner: dict[str, Float] = field(default_factory=dict)
    routes: Routes | None = None

    def routed(self, expert: int | None) -> NDArray[np.intp] | slice:
        """Return the rows of an expert; all of them for the shared expert."""
        if expert is None or self.routes is None:
            return slice(None)
        return self.routes.rows[expert]


@dataclass(eq=False)
class DecoderBlock:
    """Weights of a block in float, and its forward pass in stages.

    Parameters
    ----------
    weights
        Arrays by name relative to the block: ``NAME.weight``, ``NAME.bias``; all float32, or all float64.
    layout, architecture, config, index
        Names and sizes of the tensors, and the index of the block.
    """

    weights: BlockWeights
    layout: BlockLayout
    architecture: Architecture
    config: ModelConfig
    index: int

    def __post_init__(self) -> None:
        self.operations = Operations(
            self.weights, self.layout.vectors, self.architecture.norm_kind, self.config.norm_eps
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in their order."""
        return self.layout.stages

    def stage_input(self, stage: Stage, chunk: ChunkStates) -> Float:
        """Return the input of the stage's linears, ``[tokens, in]``."""
        match stage.kind:
            case "attention" | "latent" | "delta" | "convolution" | "mamba" | "mlp" | "router":
                if stage.norm is None:
                    return chunk.hidden
                return self.operations.norm(stage.norm, chunk.hidden)
            case "latent_query":
                return chunk.inner["query_latent"]
            case "latent_attention":
                return chunk.inner["latent"]
            case "beside":
                return chunk.inner["beside"]
            case "mixer_output":
                return chunk.inner["mixed"]
            case "shared":
                return chunk.inner["normed"]
            case "expert":
                return self.operations.gather(chunk.inner["normed"], chunk.routed(stage.expert))
            case "mlp_output" if "product" in chunk.inner:
                return chunk.inner["product"]
            case _:
                return chunk.inner["inner"]

    def as_if_routed(self, stage: Stage, chunk: ChunkStates) -> Float:
        """Return the input that an expert's linears would have if every token were routed to it."""
        normed = chunk.inner["normed"]
        return normed if stage.kind == "expert" else self._gated(cast(Mlp, stage.mlp), normed)

    def advance(self, stage: Stage, states: Float, chunk: ChunkStates, rope: "Rotation") -> None:
        """Compute a stage from its input `states`, updating the chunk."""
        match stage.kind:
            case "attention":
                if self.architecture.beside is not None:
                    chunk.inner["mixed"] = self._mamba(
                        self.architecture.beside, states, rope.length
                    )
                chunk.inner["inner"] = self._attention(states, rope)
                if stage.mlp is not None:  # in parallel
                    chunk.inner["product"] = self._gated(stage.mlp, states)
                for other in self.stages:  # before attention changes the hidden states
                    if other.kind == "beside" and other.norm is not None:
                        chunk.inner["beside"] = self.operations.norm(other.norm, chunk.hidden)
            case "delta":
                chunk.inner["inner"] = self._delta(stage, states, rope.length)
            case "mamba":
                mixer = self.architecture.mixers[self.config.layer_types[self.index]]
                chunk.inner["inner"] = self._mamba(cast(Mamba, mixer), states, rope.length)
            case "convolution":
                chunk.inner["inner"] = self._convolution(stage, states, rope.length)
            case "latent":
                self._to_latents(states, chunk)
            case "latent_query":
                chunk.inner["query"] = self.operations.linear(stage.linears[0], states)
            case "latent_attention":
                chunk.inner["inner"] = self._latent_attention(stage, states, chunk, rope)
            case "mlp" | "beside" | "shared" | "expert":
                chunk.inner["inner"] = self._gated(cast(Mlp, stage.mlp), states)
            case "router":
                chunk.inner["normed"] = states
                chunk.routes = self._route(states)
            case "attention_output":
                self._add(stage, states, chunk.hidden, self.architecture.attention_post_norm)
                chunk.inner.pop("inner", None)
            case "mixer_output":
                self._add(stage, states, chunk.hidden, None)
                chunk.inner.pop("mixed", None)
            case "mlp_output":
                self._add(stage, states, chunk.hidden, self.architecture.mlp_post_norm)
                chunk.inner.pop("inner", None)
                chunk.inner.pop("product", None)
                chunk.inner.pop("beside", None)
            case "shared_output" | "expert_output":
                self._add_weighed(stage, states, chunk)
                chunk.inner.pop("inner", None)
        if stage is self.stages[-1] and self.architecture.layer_scale is not None:
            self.operations.scale_all(self.architecture.layer_scale, chunk.hidden)

    def added_scale(self, stage: Stage) -> float:
        """Return the factor of a stage's outputs when they are added to the hidden states."""
        factors = self.config.multipliers
        own = {
            "attention_output": factors.attention_out,
            "mixer_output": factors.mixer_out,
            "mlp_output": factors.down,
        }
        return self.config.residual_scale * own.get(stage.kind, 1.0)

    def adds_linearly(self, stage: Stage) -> bool:
        """Tell whether a stage adds the outputs of its one linear to the hidden states as they are."""
        post_norms = {
            "attention_output": self.architecture.attention_post_norm,
            "mlp_output": self.architecture.mlp_post_norm,
        }
        return post_norms.get(stage.kind, "") is None

    def forward(self, hidden: Float, rope: "Rotation", observe: Observer | None = None) -> None:
        """Run the whole block over `hidden` ``[batch * length, hidden_size]``, in place; see `pass_all`."""
        chunks = [ChunkStates(rows) for rows in rope.chunks(hidden)]
        self.pass_all(lambda: chunks, rope, observe)

    def pass_all(
        self,
        chunks: Callable[[], Iterable[ChunkStates]],
        rope: "Rotation",
        observe: Observer | None = None,
        finished: int | None = None,
    ) -> None:
        """Run the whole block over all chunks, in place.

        A block without experts is passed chunk by chunk, so that one chunk has inner states at a time; one
        with experts stage by stage, so that one expert's weights are in memory at a time.

        Parameters
        ----------
        chunks
            Called for an iterator over the chunks in order, once per pass.
        rope
            Rotary tables.
        observe
            Called with the index of each chunk, the stage, and its input.
        finished
            Number of chunks whose outputs are needed, None for all; the last product of the others is left
            out.
        """
        by_stage = bool(self.layout.experts)
        for stages in [(stage,) for stage in self.stages] if by_stage else [self.stages]:
            for place, chunk in enumerate(chunks()):
                for stage in stages:
                    states = self.stage_input(stage, chunk)
                    if observe is not None:
                        observe(place, stage, states)
                    if finished is None or place < finished or stage is not self.stages[-1]:
                        self.advance(stage, states, chunk, rope)
                if not by_stage:
                    chunk.inner.clear()
            if by_stage:
                self.release(*stages)

    @property
    def sub_blocks(self) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """The stages of attention, and those of the MLP or experts."""
        return self.layout.sub_blocks

    def forward_kept(self, hidden: Float, rope: "Rotation") -> tuple[Float, ...]:
        """Run the whole block in place; return the hidden states before each of its `sub_blocks`."""
        kept = tuple(np.empty_like(hidden) for _ in self.sub_blocks)
        pieces = [rope.chunks(each) for each in (hidden, *kept)]
        for rows, *copies in zip(*pieces, strict=True):
            chunk = ChunkStates(rows)
            for stages, before in zip(self.sub_blocks, copies, strict=True):
                before[:] = rows
                for stage in stages:
                    self.advance(stage, self.stage_input(stage, chunk), chunk, rope)
        return kept

    def backward(
        self,
        stages: tuple[Stage, ...],
        hidden: Float,
        gradient: Float,
        rope: "Rotation",
        on_linear: OnLinear,
        vector_gradients: Mapping[str, Float] | None = None,
    ) -> None:
        """Turn the gradient of the hidden states after a sub-block into that before it, in place.

        Parameters
        ----------
        stages
            One of `sub_blocks`.
        hidden
            ``[tokens, hidden_size]``, its input, whole samples, from which its activations are recomputed.
        gradient
            ``[tokens, hidden_size]``.
        rope
            Rotary tables.
        on_linear, vector_gradients
            What to do with the gradients of weights, see `Tape`.
        """
        tape = Tape(self.operations, on_linear, vector_gradients)
        recorded = copy(self)
        recorded.operations = tape
        chunk = ChunkStates(hidden)
        for stage in stages:
            recorded.advance(stage, recorded.stage_input(stage, chunk), chunk, rope)
        tape.backward(hidden, gradient, hidden)

    def sub_block(self, stage: Stage, states: Float, rope: "Rotation") -> Float:
        """Return what the sub-block that a stage begins adds to the hidden states."""
        output = np.zeros((len(states), self.config.hidden_size), states.dtype)
        chunk = ChunkStates(output)
        self.advance(stage, states, chunk, rope)
        for following in self.stages[self.stages.index(stage) + 1 :]:
            if following.kind in SUB_BLOCK_STARTS:
                break
            self.advance(following, self.stage_input(following, chunk), chunk, rope)
        return output

    def with_weights(self, changed: Mapping[str, Float]) -> "DecoderBlock":
        """Return the block with other weights under some names; the rest are shared."""
        weights = BlockWeights(self.weights.read, {**self.weights, **changed})
        return DecoderBlock(weights, self.layout, self.architecture, self.config, self.index)

    def as_read(self) -> "DecoderBlock":
        """Return the block with its original weights, whatever has replaced them since."""
        return self.reading(self.weights.read)

    def reading(self, read: Callable[[str], Float]) -> "DecoderBlock":
        """Return the block with weights from elsewhere."""
        weights = BlockWeights(read, {})
        return DecoderBlock(weights, self.layout, self.architecture, self.config, self.index)

    def release(self, stage: Stage) -> None:
        """Forget the weights of a stage that has been computed; they are read again when needed.

        Those of an expert are released together, once its output has been computed."""
        names = stage.linears
        if stage.kind == "expert":
            names = ()
        elif stage.kind == "expert_output" and stage.mlp is not None:
            names = tuple(filter(None, (stage.mlp.gate, stage.mlp.up, stage.mlp.down)))
        for name in names:
            self.weights.pop(f"{name}.weight", None)

    def _attention(self, states: Float, rope: "Rotation") -> Float:
        config, names = self.config, cast(Attention, self.architecture.attention)
        states = self.operations.times(states, config.multipliers.attention_in)
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        if names.fused is None:
            query, key = (self.operations.linear(each, states) for each in (names.query, names.key))
            value = key if config.keys_are_values else self.operations.linear(names.value, states)
        elif names.by_head:
            together = self.operations.linear(names.fused, states)
            query, key, value = self.operations.split_heads(together, heads, [config.head_dim] * 3)
        else:
            widths = [count * config.head_dim for count in (heads, key_heads, key_heads)]
            query, key, value = self.operations.split(
                self.operations.linear(names.fused, states), widths
            )
        gate = None
        if names.value_norm:
            value = self.operations.even_norm(value, config.head_dim, 1.0, config.norm_eps)
        if names.gated:
            query, gate = self.operations.split_heads(query, heads, [config.head_dim] * 2)
        if not names.norms_last:
            query, key = self._norm_heads(names, query, key)
        if config.rotates[self.index]:
            self._rotate(query, heads, 0, rope)
            self._rotate(key, key_heads, 0, rope)
        if names.norms_last:
            query, key = self._norm_heads(names, query, key)
        sinks = None if names.sinks is None else self.weights[names.sinks]
        output = self._attend(query, key, value, rope, sinks)
        return output if gate is None else self.operations.gate(gate, output, "sigmoid")

    def _norm_heads(self, names: Attention, query: Float, key: Float) -> tuple[Float, Float]:
        """Return queries and keys after their norms, if they have any."""
        width = None if names.whole else self.config.head_dim
        if names.query_norm is not None and self.config.head_norms:
            query = self.operations.norm(names.query_norm, query, width)
        if names.key_norm is not None and self.config.head_norms:
            key = self.operations.norm(names.key_norm, key, width)
        return query, key

    def _delta(self, stage: Stage, states: Float, length: int) -> Float:
        names = cast(GatedDelta, self.architecture.mixers[self.config.layer_types[self.index]])
        sizes, operations = cast(RecurrenceConfig, self.config.recurrence), self.operations
        shared, heads = sizes.heads // sizes.key_heads, sizes.key_heads
        keys, values = heads * sizes.key_dim, sizes.heads * sizes.value_dim
        made = [operations.linear(name, states) for name in (*names.inputs, *names.controls)]
        if len(names.inputs) == 1:
            widths = [sizes.key_dim] * 2 + [shared * sizes.value_dim] * 2
            *three, gate = operations.split_heads(made[0], heads, widths)
            made = [
                operations.join(three),
                gate,
                *operations.split_heads(made[1], heads, [shared] * 2),
            ]
        mixed, gate, strength, step = made
        mixed = operations.activate(operations.convolve(names.convolution, mixed, length), "silu")
        query, key, value = operations.split(mixed, [keys, keys, values])
        # Divided by their lengths; queries by the root of their width, too.
        width = sizes.key_dim
        query = operations.even_norm(query, width, 1 / width, DELTA_EPSILON / width)
        key = operations.even_norm(key, width, width**-0.5, DELTA_EPSILON / width)
        decay = operations.decays(step, names.decay, names.step)
        parts = [query, key, value, decay, operations.sigmoid(strength)]
        rule = {"length": length, "heads": sizes.heads, "key_heads": heads, "corrects": True}
        output = operations.recurrence(parts, rule)
        output = operations.norm(names.norm, output, sizes.value_dim, kind="rms_norm")
        return operations.gate(gate, output, "silu")

    def _convolution(self, stage: Stage, states: Float, length: int) -> Float:
        names = cast(
            ShortConvolution, self.architecture.mixers[self.config.layer_types[self.index]]
        )
        operations = self.operations
        all_three = operations.linear(names.inputs, states)
        first, second, value = operations.split(all_three, [self.config.hidden_size] * 3)
        convolved = operations.convolve(
            names.convolution, operations.multiply(first, value), length
        )
        return operations.multiply(second, convolved)

    def _mamba(self, names: Mamba, states: Float, length: int) -> Float:
        sizes, operations = cast(RecurrenceConfig, self.config.recurrence), self.operations
        values, keys = sizes.heads * sizes.value_dim, sizes.key_heads * sizes.key_dim
        factors = self.config.multipliers
        made = operations.linear(names.inputs, operations.times(states, factors.mixer_in))
        if factors.parts != (1.0,) * 5:
            each = np.repeat(factors.parts, [values, values, keys, keys, sizes.heads])
            made = operations.times(made, each.astype(made.dtype))
        widths = [values, values + 2 * keys, sizes.heads]
        gate, mixed, raw = operations.split(made, widths)
        mixed = operations.activate(operations.convolve(names.convolution, mixed, length), "silu")
        value, key, query = operations.split(mixed, [values, keys, keys])
        least = sizes.least_step
        step = operations.spread(operations.steps(raw, names.step, least), sizes.value_dim)
        decay = operations.decays(raw, names.decay, names.step, least)
        parts = [query, key, operations.multiply(value, step), decay, np.ones_like(decay)]
        rule = {
            "length": length,
            "heads": sizes.heads,
            "key_heads": sizes.key_heads,
            "corrects": False,
        }
        output = operations.recurrence(parts, rule)
        output = operations.skip(output, value, names.skip, sizes.value_dim)
        if self.config.norm_first:
            return operations.gate(gate, self._mamba_norm(names, output), "silu")
        return self._mamba_norm(names, operations.gate(gate, output, "silu"))

    def _mamba_norm(self, names: Mamba, output: Float) -> Float:
        """Return a mixer's output after its norm over the heads of each key head, if it has one."""
        if not self.config.gated_norm:
            return output
        width = output.shape[1] // cast(RecurrenceConfig, self.config.recurrence).key_heads
        output = self.operations.even_norm(output, width, 1.0, self.operations.epsilon)
        return self.operations.scale_channels(f"{names.norm}.weight", output)

    def _to_latents(self, states: Float, chunk: ChunkStates) -> None:
        names, operations = cast(LatentAttention, self.architecture.attention), self.operations
        latent = cast(LatentConfig, self.config.latent)
        if latent.query_rank is None:
            chunk.inner["query"] = operations.linear(names.query, states)
        else:
            down = operations.linear(names.query_down, states)
            chunk.inner["query_latent"] = operations.latent_norm(names.query_norm, down)
        down = operations.linear(names.key_value_down, states)
        widths = [latent.key_value_rank, latent.rotary_dim]
        first, chunk.inner["rotary_key"] = operations.split(down, widths)
        chunk.inner["latent"] = operations.latent_norm(names.key_value_norm, first)

    def _latent_attention(
        self, stage: Stage, states: Float, chunk: ChunkStates, rope: "Rotation"
    ) -> Float:
        latent, heads = cast(LatentConfig, self.config.latent), self.config.num_attention_heads
        query, turned = chunk.inner.pop("query"), chunk.inner.pop("rotary_key")
        self._rotate(query, heads, latent.plain_dim, rope)
        self._rotate(turned, 1, 0, rope)
        both = self.operations.linear(stage.linears[0], states)
        key, value = self.operations.latent_keys(both, turned, latent.plain_dim, heads)
        return self._attend(query, key, value, rope)

    def _attend(
        self, query: Float, key: Float, value: Float, rope: "Rotation", sinks: Float | None = None
    ) -> Float:
        config = self.config
        sliding = config.layer_types[self.index] == "sliding_attention"
        rule = {
            "length": rope.length,
            "key_heads": config.num_key_value_heads,
            "scale": config.attention_scale,
            "window": config.sliding_window or 0 if sliding else 0,
            "softcap": config.attention_softcap or 0.0,
            "sinks": sinks,
        }
        if rope.query_scale is not None:
            query = self.operations.scale_positions(query, rope.query_scale)
        return self.operations.attend(query, key, value, rule, config.num_attention_heads)

    def _rotate(self, states: Float, heads: int, first: int, rope: "Rotation") -> None:
        tables = rope.tables[self.config.layer_types[self.index]]
        self.operations.rotate(states, tables, heads, first, self.config.interleaved)

    def _gated(self, names: Mlp, states: Float) -> Float:
        """Return the input of an MLP's down projection."""
        activation, operations = self.config.hidden_act, self.operations
        if names.fused is not None:
            both = operations.linear(names.fused, states)
            gate, up = operations.split(both, [both.shape[1] // 2] * 2)
        else:
            up = operations.linear(names.up, states)
            if names.gate is None:
                return operations.activate(up, activation)
            gate = operations.linear(names.gate, states)
        gate = operations.times(gate, self.config.multipliers.gate)
        if self.config.swiglu_limit:
            return operations.clamped_gate(
                gate, up, self.config.swiglu_alpha, self.config.swiglu_limit
            )
        return operations.gate(gate, up, activation)

    def _route(self, states: Float) -> Routes:
        names = cast(Experts, self.architecture.experts)
        config = cast(ExpertsConfig, self.config.experts)
        correction = None if names.correction is None else self.weights[names.correction]
        logits = self.operations.linear(names.router, states)
        return self.operations.route(logits, config, correction)

    def _add(self, stage: Stage, states: Float, hidden: Float, norm: str | None) -> None:
        scale = self.added_scale(stage)
        if norm is None and scale == 1:
            self.operations.add_linear(stage.linears[0], states, hidden)
            return
        output = self.operations.linear(stage.linears[0], states)
        if norm is not None:
            output = self.operations.norm(norm, output)
        self.operations.add(output, hidden, scale)

    def _add_weighed(self, stage: Stage, states: Float, chunk: ChunkStates) -> None:
        """Add an expert's output, weighted by the router or, for the shared expert, by its own gate if it
        has one."""
        if len(states) == 0:
            return
        output = self.operations.linear(stage.linears[0], states)
        experts, weights = self.architecture.experts, None
        if stage.expert is not None and chunk.routes is not None:
            weights = chunk.routes.weights[stage.expert]
        elif experts is not None and experts.shared_gate is not None:
            logits = self.operations.linear(experts.shared_gate, chunk.inner["normed"])
            weights = self.operations.sigmoid(logits)
        self.operations.add(
            output, chunk.hidden, self.config.residual_scale, chunk.routed(stage.expert), weights
        )


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary tables ``[length, rotary_dim / 2]``, cosines and sines, for samples of one length, and factors
    of queries ``[length]`` if they have any."""

    length: int
    tables: Mapping[LayerType, tuple[Float, Float]]
    query_scale: Float | None = None

    @property
    def chunk_rows(self) -> int:
        """Rows to compute at once: whole samples, few enough for the last-level cache."""
        return max(1, MOST_CHUNK_TOKENS // self.length) * self.length

    @property
    def tape_rows(self) -> int:
        """Rows to compute at once where all activations are kept, with a gradient for each."""
        return max(1, MOST_TAPE_TOKENS // self.length) * self.length

    def chunks(self, hidden: Float, rows: int | None = None) -> Iterator[Float]:
        """Yield `hidden` in pieces of `chunk_rows`, or of so many, as views."""
        step = self.chunk_rows if rows is None else rows
        for first in range(0, len(hidden), step):
            yield hidden[first : first + step]
