"""The operations of a decoder block on states, kernel by kernel; `Tape` records them as well."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.models.config import ExpertsConfig
from bitwright.models.routing import Routes, route
from bitwright.products import linear

Float32 = NDArray[np.float32]
Float: TypeAlias = NDArray[Any]  # float32 or, for finite differences, float64
Rows: TypeAlias = NDArray[np.intp] | slice
LATENT_EPSILON = 1e-6  # of the norms of latents, whatever config.json says of the others


class BlockWeights(dict[str, Float]):
    """Float arrays by name relative to the block, read when they are first asked for."""

    def __init__(self, read: Callable[[str], Float], known: Mapping[str, Float]) -> None:
        super().__init__(known)
        self.read = read

    def __missing__(self, name: str) -> Float:
        array = self[name] = self.read(name)
        return array


@dataclass(eq=False)
class Operations:
    """The operations on float32 or float64 states ``[tokens, channels]``.

    Parameters
    ----------
    weights
        By name relative to the block: ``NAME.weight``, ``NAME.bias``.
    vectors
        Names of all tensors that are not matrices; a linear has a bias if it is among them.
    norm_kind, epsilon
        Of the block's norms.
    """

    weights: BlockWeights
    vectors: Mapping[str, Any]
    norm_kind: str
    epsilon: float

    def bias(self, name: str) -> Float | None:
        """Return the bias of a linear or norm, None if it has none."""
        bias = f"{name}.bias"
        return self.weights[bias] if bias in self.vectors else None

    def linear(self, name: str, states: Float) -> Float:
        """Return a linear's outputs."""
        weight = self.weights[f"{name}.weight"]
        out = np.empty((len(states), len(weight)), states.dtype)
        if len(states):
            linear(states, weight, self.bias(name), out, False)
        return out

    def add_linear(self, name: str, states: Float, hidden: Float) -> None:
        """Add a linear's outputs to the hidden states."""
        linear(states, self.weights[f"{name}.weight"], self.bias(name), hidden, True)

    def norm(
        self,
        name: str,
        states: Float,
        width: int | None = None,
        *,
        kind: str | None = None,
        epsilon: float | None = None,
    ) -> Float:
        """Return the states normalized, over each piece of so many channels or over all; kind and epsilon
        are the block's unless others are given."""
        weight, bias = self.weights[f"{name}.weight"], self.bias(name)
        rows = states if width is None else states.reshape(-1, width)
        normed = apply_norm(
            kind or self.norm_kind, rows, weight, bias, self.epsilon if epsilon is None else epsilon
        )
        return normed.reshape(states.shape)

    def latent_norm(self, name: str, states: Float) -> Float:
        """Return latents normalized."""
        return self.norm(name, states, kind="rms_norm", epsilon=LATENT_EPSILON)

    def even_norm(self, states: Float, width: int, gain: float, epsilon: float) -> Float:
        """Return each piece of so many channels divided by its root mean square, times a gain."""
        gains = np.full(width, gain, states.dtype)
        normed = apply_norm("rms_norm", states.reshape(-1, width), gains, None, epsilon)
        return normed.reshape(states.shape)

    def split(self, states: Float, widths: Sequence[int]) -> list[Float]:
        """Return the channels in parts of these widths, each an array of its own."""
        parts = np.split(states, np.cumsum(widths)[:-1], axis=1)
        return [np.ascontiguousarray(part) for part in parts]

    def join(self, parts: Sequence[Float]) -> Float:
        """Return the channels of several arrays side by side."""
        return np.concatenate(parts, axis=1)

    def split_heads(self, states: Float, heads: int, widths: Sequence[int]) -> list[Float]:
        """Return the channels of every head in parts of these widths, those of all heads side by side."""
        each = states.reshape(len(states), heads, sum(widths))
        parts = np.split(each, np.cumsum(widths)[:-1], axis=2)
        return [np.ascontiguousarray(part).reshape(len(states), -1) for part in parts]

    def convolve(self, name: str, states: Float, length: int) -> Float:
        """Return the causal convolution of each channel within samples of a length."""
        output = np.empty_like(states)
        _kernels.convolve(states, self.taps(name), self.bias(name), length, output)
        return output

    def taps(self, name: str) -> Float:
        """Return the weights of a convolution ``[channels, tokens]``."""
        weight = self.weights[f"{name}.weight"]
        return weight.reshape(len(weight), -1)

    def decays(self, states: Float, rate: str, step: str, least: float = 0.0) -> Float:
        """Return the logarithms of decays, −exp(rate) times the steps."""
        return np.asarray(-np.exp(self.weights[rate]) * self._steps_of(states, step, least))

    def steps(self, states: Float, step: str, least: float = 0.0) -> Float:
        """Return softplus(states + step), at least so much."""
        return self._steps_of(states, step, least)

    def _steps_of(self, states: Float, step: str, least: float) -> Float:
        steps = np.logaddexp(states + self.weights[step], states.dtype.type(0))
        return np.asarray(np.maximum(steps, steps.dtype.type(least)))

    def times(self, states: Float, factor: float | Float) -> Float:
        """Return the states times a factor, or each channel times its own."""
        if isinstance(factor, float) and factor == 1:
            return states
        return np.asarray(states * (states.dtype.type(factor) if np.ndim(factor) == 0 else factor))

    def spread(self, states: Float, width: int) -> Float:
        """Return every channel so many times, one after the other."""
        return np.repeat(states, width, axis=1)

    def scale_channels(self, name: str, states: Float) -> Float:
        """Return each channel times its gain."""
        return np.asarray(states * self.weights[name])

    def skip(self, output: Float, states: Float, name: str, width: int) -> Float:
        """Return the output plus the states, those of each head times its factor."""
        return np.asarray(output + states * np.repeat(self.weights[name], width))

    def recurrence(self, parts: Sequence[Float], rule: Mapping[str, Any]) -> Float:
        """Return the outputs of a recurrence from queries, keys, values, decays and strengths; `rule` holds
        the kernel's other arguments."""
        output = np.empty_like(parts[2])
        names = ("query", "key", "value", "decay", "strength")
        inputs: dict[str, Any] = {**dict(zip(names, parts, strict=True)), **rule}
        _kernels.recurrence(out=output, **inputs)
        return output

    def scale_all(self, name: str, hidden: Float) -> None:
        """Multiply the hidden states by a factor, in place."""
        hidden *= self.weights[name]

    def rotate(
        self, states: Float, tables: tuple[Float, Float], heads: int, first: int, interleaved: bool
    ) -> None:
        """Rotate the states by their positions, in place."""
        _kernels.rotate(states, *tables, heads, first, interleaved)

    def scale_positions(self, states: Float, factors: Float) -> Float:
        """Return the states of whole samples, each times the factor of its position."""
        result: Float = states * np.resize(factors, len(states))[:, None]
        return result

    def attend(
        self, query: Float, key: Float, value: Float, rule: Mapping[str, Any], heads: int
    ) -> Float:
        """Return the output of attention; `rule` holds the kernel's other arguments."""
        width = value.shape[1] // rule["key_heads"] * heads
        output = np.empty((len(query), width), query.dtype)
        _kernels.attention(query, key, value, heads=heads, out=output, **rule)
        return output

    def latent_keys(
        self, both: Float, turned: Float, plain: int, heads: int
    ) -> tuple[Float, Float]:
        """Return keys and values per head from an expanded latent: each key's unrotated channels, which the
        `turned` ones complete, and the value."""
        each = both.reshape(len(both), heads, -1)
        key = np.empty((len(both), heads, plain + turned.shape[1]), both.dtype)
        key[:, :, :plain] = each[:, :, :plain]
        key[:, :, plain:] = turned[:, None]
        value = np.ascontiguousarray(each[:, :, plain:])
        return key.reshape(len(both), -1), value.reshape(len(both), -1)

    def activate(self, states: Float, activation: str) -> Float:
        """Return activation(states), in their place."""
        _kernels.activate(states, activation)
        return states

    def gate(self, gate: Float, up: Float, activation: str) -> Float:
        """Return activation(gate) · up, in the gate's place."""
        _kernels.activate_multiply(gate, up, activation)
        return gate

    def clamped_gate(self, gate: Float, up: Float, alpha: float, limit: float) -> Float:
        """Return gpt-oss' gated unit, in the gate's place."""
        _kernels.clamped_swiglu(gate, up, alpha, limit)
        return gate

    def multiply(self, states: Float, others: Float) -> Float:
        """Return the products of two arrays."""
        return np.asarray(states * others)

    def sigmoid(self, states: Float) -> Float:
        """Return 1 / (1 + exp(−states))."""
        result: Float = 1 / (1 + np.exp(-states))
        return result

    def route(self, logits: Float, config: ExpertsConfig, correction: Float | None) -> Routes:
        """Choose experts; see `bitwright.models.routing.route`."""
        return route(logits, config, correction)

    def gather(self, states: Float, rows: Rows) -> Float:
        """Return some rows of the states."""
        return states if isinstance(rows, slice) else states[rows]

    def add(
        self,
        output: Float,
        hidden: Float,
        factor: float,
        rows: Rows = slice(None),
        weights: Float | None = None,
    ) -> None:
        """Add `factor` times the output, each row times its weight, to some rows of the hidden states."""
        if weights is not None:
            output = output * weights.reshape(-1, 1)
        hidden[rows] += output if factor == 1 else hidden.dtype.type(factor) * output


def apply_norm(
    kind: str, states: Float, weight: Float, bias: Float | None, epsilon: float
) -> Float:
    """Return `states` ``[tokens, channels]`` normalized; see `fold_scale` for the kinds."""
    normed = np.empty_like(states)
    if kind == "biasless_layer_norm":
        bias = np.zeros_like(weight)
    if bias is not None:
        _kernels.layer_norm(states, weight, bias, epsilon, normed)
    else:
        _kernels.rms_norm(states, norm_gain(kind, weight), epsilon, normed)
    return normed


def norm_gain(kind: str, weight: Float) -> Float:
    """Return the gain of a norm: some families store it less one."""
    return weight + weight.dtype.type(1) if kind == "offset_rms_norm" else weight
