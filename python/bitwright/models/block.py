"""One decoder block, computed stage by stage."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.checkpoint import ExpertsConfig, LatentConfig, LayerType, ModelConfig
from bitwright.models.architecture import Architecture, Attention, Experts, LatentAttention, Mlp
from bitwright.models.layout import BlockLayout, Stage
from bitwright.models.routing import Routes, route

Float32 = NDArray[np.float32]
MOST_CHUNK_TOKENS = 1024
LATENT_EPSILON = 1e-6  # of the norms of latents, whatever config.json says of the others


class BlockWeights(dict[str, Float32]):
    """Float32 arrays by name relative to the block, read when they are first asked for."""

    def __init__(self, read: Callable[[str], Float32], known: Mapping[str, Float32]) -> None:
        super().__init__(known)
        self.read = read

    def __missing__(self, name: str) -> Float32:
        array = self[name] = self.read(name)
        return array


@dataclass(eq=False)
class ChunkStates:
    """What is known of some whole samples between two stages.

    Parameters
    ----------
    hidden
        ``[tokens, hidden_size]``, the residual stream; blocks change it in place.
    inner
        What stages leave for later ones, by name: ``inner`` (attention's output, an MLP's product),
        ``normed`` (what experts read), the latents.
    routes
        Which tokens go to which expert.
    """

    hidden: Float32
    inner: dict[str, Float32] = field(default_factory=dict)
    routes: Routes | None = None

    def routed(self, expert: int | None) -> NDArray[np.intp] | slice:
        """Return the rows of an expert; all for the one that every token passes."""
        if expert is None or self.routes is None:
            return slice(None)
        return self.routes.rows[expert]


class DecoderBlock:
    """Weights of a block in float32, and its forward pass in stages.

    Parameters
    ----------
    weights
        Float32 arrays by name relative to the block: ``NAME.weight``, ``NAME.bias``.
    layout, architecture, config, index
        What the names and sizes are, and which block it is.
    """

    def __init__(
        self,
        weights: BlockWeights,
        layout: BlockLayout,
        architecture: Architecture,
        config: ModelConfig,
        index: int,
    ) -> None:
        self.weights = weights
        self.layout = layout
        self.architecture = architecture
        self.config = config
        self.index = index

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in their order."""
        return self.layout.stages

    def stage_input(self, stage: Stage, chunk: ChunkStates) -> Float32:
        """Return what the stage's linears see, ``[tokens, in]``."""
        match stage.kind:
            case "attention" | "latent" | "mlp" | "router":
                return chunk.hidden if stage.norm is None else self._norm(stage.norm, chunk.hidden)
            case "latent_query":
                return chunk.inner["query_latent"]
            case "latent_attention":
                return chunk.inner["latent"]
            case "shared":
                return chunk.inner["normed"]
            case "expert":
                return chunk.inner["normed"][chunk.routed(stage.expert)]
            case _:
                return chunk.inner["inner"]

    def as_if_routed(self, stage: Stage, chunk: ChunkStates) -> Float32:
        """Return what an expert's linears would see if every token went to it."""
        normed = chunk.inner["normed"]
        return normed if stage.kind == "expert" else self._gated(cast(Mlp, stage.mlp), normed)

    def advance(self, stage: Stage, states: Float32, chunk: ChunkStates, rope: "Rotation") -> None:
        """Compute a stage from its input `states`, changing what is known of the chunk."""
        match stage.kind:
            case "attention":
                chunk.inner["inner"] = self._attention(states, rope)
            case "latent":
                self._to_latents(states, chunk)
            case "latent_query":
                chunk.inner["query"] = self._linear(stage.linears[0], states)
            case "latent_attention":
                chunk.inner["inner"] = self._latent_attention(stage, states, chunk, rope)
            case "mlp" | "shared" | "expert":
                chunk.inner["inner"] = self._gated(cast(Mlp, stage.mlp), states)
            case "router":
                chunk.inner["normed"] = states
                chunk.routes = self._route(states)
            case "attention_output":
                self._add(stage, states, chunk.hidden, self.architecture.attention_post_norm)
            case "mlp_output":
                self._add(stage, states, chunk.hidden, self.architecture.mlp_post_norm)
            case "shared_output" | "expert_output":
                self._add_weighed(stage, states, chunk)

    def forward(
        self,
        hidden: Float32,
        rope: "Rotation",
        observe: Callable[[Stage, Float32], None] | None = None,
        finished: int | None = None,
    ) -> None:
        """Run the whole block over `hidden` ``[batch * length, hidden_size]``, in place.

        `observe` is shown each stage's input, chunk by chunk. Where only the first so many rows are to be
        `finished`, the last product of the others is left out.
        """
        for number, rows in enumerate(rope.chunks(hidden)):
            chunk = ChunkStates(rows)
            unfinished = finished is not None and number * rope.chunk_rows >= finished
            for stage in self.stages:
                states = self.stage_input(stage, chunk)
                if observe is not None:
                    observe(stage, states)
                if not (unfinished and stage is self.stages[-1]):
                    self.advance(stage, states, chunk, rope)

    def sub_block(self, stage: Stage, states: Float32, rope: "Rotation") -> Float32:
        """Return what a stage that reads the hidden states, and those up to the next one, add to them."""
        output = np.zeros((len(states), self.config.hidden_size), np.float32)
        chunk = ChunkStates(output)
        self.advance(stage, states, chunk, rope)
        for following in self.stages[self.stages.index(stage) + 1 :]:
            if following.kind in ("mlp", "router"):
                break
            self.advance(following, self.stage_input(following, chunk), chunk, rope)
        return output

    def with_weights(self, changed: Mapping[str, Float32]) -> "DecoderBlock":
        """Return the block with other weights under some names; the rest are shared."""
        weights = BlockWeights(self.weights.read, {**self.weights, **changed})
        return DecoderBlock(weights, self.layout, self.architecture, self.config, self.index)

    def release(self, stage: Stage) -> None:
        """Forget an expert's weights, which are read again if they are asked for."""
        if stage.kind == "expert_output" and stage.mlp is not None:
            for name in (stage.mlp.gate, stage.mlp.up, stage.mlp.down):
                self.weights.pop(f"{name}.weight", None)

    def _attention(self, states: Float32, rope: "Rotation") -> Float32:
        config, names = self.config, cast(Attention, self.architecture.attention)
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        if names.fused is None:
            query, key, value = (
                self._linear(name, states) for name in (names.query, names.key, names.value)
            )
        else:
            ends = np.cumsum([heads * config.head_dim, key_heads * config.head_dim])
            parts = np.split(self._linear(names.fused, states), ends, axis=1)
            query, key, value = map(np.ascontiguousarray, parts)
        for norm, turned in ((names.query_norm, query), (names.key_norm, key)):
            if norm is not None:
                width = turned.shape[1] if names.whole else config.head_dim
                rows = turned.reshape(-1, width)
                rows[:] = self._norm(norm, rows)
        if config.rotates[self.index]:
            self._rotate(query, heads, 0, rope)
            self._rotate(key, key_heads, 0, rope)
        return self._attend(query, key, value, rope)

    def _to_latents(self, states: Float32, chunk: ChunkStates) -> None:
        names = cast(LatentAttention, self.architecture.attention)
        latent = cast(LatentConfig, self.config.latent)
        if latent.query_rank is None:
            chunk.inner["query"] = self._linear(names.query, states)
        else:
            down = self._linear(names.query_down, states)
            weight = self.weights[f"{names.query_norm}.weight"]
            normed = apply_norm("rms_norm", down, weight, None, LATENT_EPSILON)
            chunk.inner["query_latent"] = normed
        down = self._linear(names.key_value_down, states)
        rank = latent.key_value_rank
        weight, first = self.weights[f"{names.key_value_norm}.weight"], down[:, :rank]
        chunk.inner["latent"] = apply_norm(
            "rms_norm", np.ascontiguousarray(first), weight, None, LATENT_EPSILON
        )
        chunk.inner["rotary_key"] = np.ascontiguousarray(down[:, rank:])

    def _latent_attention(
        self, stage: Stage, states: Float32, chunk: ChunkStates, rope: "Rotation"
    ) -> Float32:
        latent, heads = cast(LatentConfig, self.config.latent), self.config.num_attention_heads
        query, turned = chunk.inner.pop("query"), chunk.inner.pop("rotary_key")
        self._rotate(query, heads, latent.plain_dim, rope)
        self._rotate(turned, 1, 0, rope)
        both = self._linear(stage.linears[0], states).reshape(len(states), heads, -1)
        key = np.empty((len(states), heads, self.config.head_dim), np.float32)
        key[:, :, : latent.plain_dim] = both[:, :, : latent.plain_dim]
        key[:, :, latent.plain_dim :] = turned[:, None]
        value = np.ascontiguousarray(both[:, :, latent.plain_dim :])
        rows = (len(states), -1)
        return self._attend(query, key.reshape(rows), value.reshape(rows), rope)

    def _attend(self, query: Float32, key: Float32, value: Float32, rope: "Rotation") -> Float32:
        config = self.config
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        sliding = config.layer_types[self.index] == "sliding_attention"
        output = np.empty((len(query), value.shape[1] // key_heads * heads), np.float32)
        _kernels.attention(
            query,
            key,
            value,
            rope.length,
            heads,
            key_heads,
            config.attention_scale,
            output,
            window=config.sliding_window or 0 if sliding else 0,
            softcap=config.attention_softcap or 0.0,
        )
        return output

    def _rotate(self, states: Float32, heads: int, first: int, rope: "Rotation") -> None:
        cosines, sines = rope.tables[self.config.layer_types[self.index]]
        _kernels.rotate(states, cosines, sines, heads, first, self.config.interleaved)

    def _gated(self, names: Mlp, states: Float32) -> Float32:
        """Return what the down projection of an MLP sees."""
        activation = self.config.hidden_act
        if names.fused is not None:
            both = self._linear(names.fused, states)
            gate, up = map(np.ascontiguousarray, np.split(both, 2, axis=1))
        else:
            up = self._linear(names.up, states)
            if names.gate is None:
                _kernels.activate(up, activation)
                return up
            gate = self._linear(names.gate, states)
        _kernels.activate_multiply(gate, up, activation)
        return gate

    def _route(self, states: Float32) -> Routes:
        names = cast(Experts, self.architecture.experts)
        config = cast(ExpertsConfig, self.config.experts)
        correction = None if names.correction is None else self.weights[names.correction]
        return route(self._linear(names.router, states), config, correction)

    def _add(self, stage: Stage, states: Float32, hidden: Float32, norm: str | None) -> None:
        scale = self.config.residual_scale
        if norm is None and scale == 1:
            self._linear(stage.linears[0], states, hidden, accumulate=True)
            return
        output = self._linear(stage.linears[0], states)
        if norm is not None:
            output = self._norm(norm, output)
        hidden += np.float32(scale) * output

    def _add_weighed(self, stage: Stage, states: Float32, chunk: ChunkStates) -> None:
        """Add an expert's output: by the router's weights or, of the one that every token passes, by its
        own gate's if it has one."""
        rows = chunk.routed(stage.expert)
        if len(states) == 0:
            return
        output = self._linear(stage.linears[0], states)
        experts = self.architecture.experts
        if stage.expert is not None and chunk.routes is not None:
            output *= chunk.routes.weights[stage.expert][:, None]
        elif experts is not None and experts.shared_gate is not None:
            logits = self._linear(experts.shared_gate, chunk.inner["normed"])
            output /= 1 + np.exp(-logits)
        chunk.hidden[rows] += np.float32(self.config.residual_scale) * output

    def _norm(self, name: str, states: Float32) -> Float32:
        weight, bias = self.weights[f"{name}.weight"], self._bias(name)
        kind, epsilon = self.architecture.norm_kind, self.config.norm_eps
        return apply_norm(kind, states, weight, bias, epsilon)

    def _bias(self, name: str) -> Float32 | None:
        bias = f"{name}.bias"
        return self.weights[bias] if bias in self.layout.vectors else None

    def _linear(
        self, name: str, states: Float32, out: Float32 | None = None, accumulate: bool = False
    ) -> Float32:
        weight = self.weights[f"{name}.weight"]
        if out is None:
            out = np.empty((len(states), len(weight)), np.float32)
        if len(states):
            _kernels.linear(states, weight, self._bias(name), out, accumulate)
        return out


def apply_norm(
    kind: str, states: Float32, weight: Float32, bias: Float32 | None, epsilon: float
) -> Float32:
    """Return `states` ``[tokens, channels]`` normalized; see `fold_scale` for the kinds."""
    normed = np.empty_like(states)
    if bias is not None:
        _kernels.layer_norm(states, weight, bias, epsilon, normed)
    else:
        gain = weight + np.float32(1) if kind == "offset_rms_norm" else weight
        _kernels.rms_norm(states, gain, epsilon, normed)
    return normed


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary tables ``[length, rotary_dim / 2]``, cosines and sines, for samples of one length."""

    length: int
    tables: Mapping[LayerType, tuple[Float32, Float32]]

    @property
    def chunk_rows(self) -> int:
        """Rows to compute at once: whole samples, few enough for the last-level cache."""
        return max(1, MOST_CHUNK_TOKENS // self.length) * self.length

    def chunks(self, hidden: Float32) -> Iterator[Float32]:
        """Yield `hidden` in pieces of so many rows, as views."""
        for first in range(0, len(hidden), self.chunk_rows):
            yield hidden[first : first + self.chunk_rows]
