"""One decoder block, computed stage by stage."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.checkpoint import ModelConfig
from bitwright.models.architecture import Architecture

Float32 = NDArray[np.float32]
MOST_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Stage:
    """Linears that share one input, and what their outputs are turned into.

    A block alternates between two arrays: the hidden states ``[tokens, hidden_size]`` and the inner
    states between two stages (attention's output, the MLP's product). `norm` names the norm between
    hidden states and linears; a stage without one reads the inner states and adds to the hidden ones.
    """

    linears: tuple[str, ...]
    norm: str | None
    inner_width: int  # channels of the inner states that the stage reads or writes


class DecoderBlock:
    """Weights of a block in float32, and its forward pass in stages.

    Parameters
    ----------
    weights
        Float32 arrays by name relative to the block: ``NAME.weight``, ``NAME.bias``.
    architecture, config
        What the names and sizes are.
    """

    def __init__(
        self, weights: dict[str, Float32], architecture: Architecture, config: ModelConfig
    ) -> None:
        self.weights = weights
        self.architecture = architecture
        self.config = config
        names = architecture
        attention_width = config.num_attention_heads * config.head_dim
        self.stages = (
            Stage((names.query, names.key, names.value), names.attention_norm, attention_width),
            Stage((names.attention_output,), None, attention_width),
            Stage((names.gate, names.up), names.mlp_norm, config.intermediate_size),
            Stage((names.down,), None, config.intermediate_size),
        )

    def stage_input(self, stage: Stage, hidden: Float32, inner: Float32) -> Float32:
        """Return what the stage's linears see, ``[tokens, in]``."""
        if stage.norm is None:
            return inner
        normed = np.empty_like(hidden)
        _kernels.rms_norm(
            hidden, self.weights[f"{stage.norm}.weight"], self.config.rms_norm_eps, normed
        )
        return normed

    def advance(
        self, stage: Stage, states: Float32, hidden: Float32, inner: Float32, rope: "Rotation"
    ) -> None:
        """Compute a stage from its input `states`, writing to `inner`, or adding to `hidden`."""
        if stage.norm is None:
            self._linear(stage.linears[0], states, hidden, accumulate=True)
        elif self.architecture.query in stage.linears:
            self._attention(states, inner, rope)
        else:
            self._linear(self.architecture.gate, states, inner)
            _kernels.silu_multiply(inner, self._linear(self.architecture.up, states))

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
        for number, chunk in enumerate(rope.chunks(hidden)):
            inner = np.empty((0, 0), np.float32)
            unfinished = finished is not None and number * rope.chunk_rows >= finished
            for stage in self.stages:
                if stage.norm is not None:
                    inner = np.empty((len(chunk), stage.inner_width), np.float32)
                states = self.stage_input(stage, chunk, inner)
                if observe is not None:
                    observe(stage, states)
                if not (unfinished and stage is self.stages[-1]):
                    self.advance(stage, states, chunk, inner, rope)

    def sub_block(self, stage: Stage, states: Float32, rope: "Rotation") -> Float32:
        """Return what a stage that follows a norm, and the one after it, add to the hidden states."""
        following = self.stages[self.stages.index(stage) + 1]
        output = np.zeros((len(states), self.config.hidden_size), np.float32)
        inner = np.empty((len(states), stage.inner_width), np.float32)
        self.advance(stage, states, output, inner, rope)
        self.advance(following, inner, output, inner, rope)
        return output

    def with_weights(self, changed: Mapping[str, Float32]) -> "DecoderBlock":
        """Return the block with other weights under some names; the rest are shared."""
        return DecoderBlock({**self.weights, **changed}, self.architecture, self.config)

    def _attention(self, states: Float32, output: Float32, rope: "Rotation") -> None:
        config, names = self.config, self.architecture
        query, key, value = (
            self._linear(name, states) for name in (names.query, names.key, names.value)
        )
        _kernels.rotate(query, rope.cosines, rope.sines, config.num_attention_heads)
        _kernels.rotate(key, rope.cosines, rope.sines, config.num_key_value_heads)
        _kernels.attention(
            query,
            key,
            value,
            rope.length,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim**-0.5,
            output,
        )

    def _linear(
        self, name: str, states: Float32, out: Float32 | None = None, accumulate: bool = False
    ) -> Float32:
        weight = self.weights[f"{name}.weight"]
        if out is None:
            out = np.empty((len(states), len(weight)), np.float32)
        _kernels.linear(states, weight, self.weights.get(f"{name}.bias"), out, accumulate)
        return out


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary tables ``[length, head_dim / 2]`` for samples of one length."""

    cosines: Float32
    sines: Float32

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return len(self.cosines)

    @property
    def chunk_rows(self) -> int:
        """Rows to compute at once: whole samples, few enough for the last-level cache."""
        return max(1, MOST_CHUNK_TOKENS // self.length) * self.length

    def chunks(self, hidden: Float32) -> Iterator[Float32]:
        """Yield `hidden` in pieces of so many rows, as views."""
        for first in range(0, len(hidden), self.chunk_rows):
            yield hidden[first : first + self.chunk_rows]
