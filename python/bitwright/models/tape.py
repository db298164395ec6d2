"""Reverse-mode gradients of a block: its operations are recorded on a tape, which is walked backwards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitwright import _kernels
from bitwright.models.config import ExpertsConfig
from bitwright.models.operations import Float, Operations, Rows, norm_gain
from bitwright.models.routing import Routes, route_backward

OnLinear = Callable[[str, Float, Float], None]


class Tape(Operations):
    """Operations that are recorded for the backward pass.

    Additions to the hidden states are not computed: the caller has the sums, and an addition passes the
    gradient unchanged. That saves the last product of attention and MLP.

    Parameters
    ----------
    operations
        The operations of the block, with its weights.
    on_linear
        Called with each linear's name, its input ``[tokens, in]`` and the gradient of its output
        ``[tokens, out]``, from which the gradient of its weight follows.
    vector_gradients
        Arrays by name to which the gradients of norms' weights and biases and of linears' biases are added;
        of those that are not in it they are not computed.
    """

    def __init__(
        self,
        operations: Operations,
        on_linear: OnLinear,
        vector_gradients: Mapping[str, Float] | None = None,
    ) -> None:
        super().__init__(
            operations.weights, operations.vectors, operations.norm_kind, operations.epsilon
        )
        self._on_linear = on_linear
        self._vector_gradients = vector_gradients or {}
        self._steps: list[Callable[[], None]] = []
        # By the identity of the array that it is the gradient of; the steps keep these arrays alive.
        self._gradients: dict[int, Float] = {}

    def backward(self, output: Float, gradient: Float, states: Float) -> Float:
        """Return the gradient of the input states, given that of the output. Both are hidden states, and
        the gradient changes in place."""
        self._gradients[id(output)] = gradient
        while self._steps:
            self._steps.pop()()
        return self._gradients.pop(id(states))

    def linear(self, name: str, states: Float) -> Float:
        output = super().linear(name, states)

        def step() -> None:
            gradient = self._take(output)
            if gradient is not None and len(states):
                self._linear_backward(name, states, gradient)

        self._steps.append(step)
        return output

    def add_linear(self, name: str, states: Float, hidden: Float) -> None:
        self._steps.append(lambda: self._linear_backward(name, states, self._gradients[id(hidden)]))

    def norm(
        self,
        name: str,
        states: Float,
        width: int | None = None,
        *,
        kind: str | None = None,
        epsilon: float | None = None,
    ) -> Float:
        normed = super().norm(name, states, width, kind=kind, epsilon=epsilon)
        channels = states.shape[1] if width is None else width
        kernel = _kernels.rms_norm_backward
        if f"{name}.bias" in self.vectors or (kind or self.norm_kind) == "biasless_layer_norm":
            kernel = _kernels.layer_norm_backward
        self._steps.append(
            lambda: self._norm_backward(
                name,
                states,
                normed,
                channels,
                kernel,
                kind or self.norm_kind,
                self.epsilon if epsilon is None else epsilon,
            )
        )
        return normed

    def even_norm(self, states: Float, width: int, gain: float, epsilon: float) -> Float:
        normed = super().even_norm(states, width, gain, epsilon)

        def step() -> None:
            above = self._required(normed).reshape(-1, width)
            result = np.empty_like(above)
            gains = np.full(width, gain, states.dtype)
            _kernels.rms_norm_backward(states.reshape(-1, width), gains, epsilon, above, result)
            self._give(states, result.reshape(states.shape))

        self._steps.append(step)
        return normed

    def split(self, states: Float, widths: Sequence[int]) -> list[Float]:
        parts = super().split(states, widths)

        def step() -> None:
            gradients = [self._take(part) for part in parts]
            known = [
                np.zeros_like(part) if gradient is None else gradient
                for part, gradient in zip(parts, gradients, strict=True)
            ]
            self._give(states, np.concatenate(known, axis=1))

        self._steps.append(step)
        return parts

    def join(self, parts: Sequence[Float]) -> Float:
        whole = super().join(parts)

        def step() -> None:
            gradient = self._required(whole)
            pieces = np.split(gradient, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
            for part, piece in zip(parts, pieces, strict=True):
                self._give(part, np.ascontiguousarray(piece))

        self._steps.append(step)
        return whole

    def split_heads(self, states: Float, heads: int, widths: Sequence[int]) -> list[Float]:
        parts = super().split_heads(states, heads, widths)

        def step() -> None:
            gradients = [
                self._required(part).reshape(len(states), heads, width)
                for part, width in zip(parts, widths, strict=True)
            ]
            self._give(states, np.concatenate(gradients, axis=2).reshape(states.shape))

        self._steps.append(step)
        return parts

    def convolve(self, name: str, states: Float, length: int) -> Float:
        output = super().convolve(name, states, length)

        def step() -> None:
            gradient = np.empty_like(states)
            above = self._required(output)
            bias = self._vector_gradients.get(f"{name}.bias")
            if bias is not None:
                bias += above.sum(axis=0)
            _kernels.convolve_backward(above, self.taps(name), length, gradient)
            self._give(states, gradient)

        self._steps.append(step)
        return output

    def decays(self, states: Float, rate: str, step: str, least: float = 0.0) -> Float:
        result = super().decays(states, rate, step, least)

        def backward() -> None:
            slope = self._slope(states, step, least)
            self._give(states, self._required(result) * -np.exp(self.weights[rate]) * slope)

        self._steps.append(backward)
        return result

    def steps(self, states: Float, step: str, least: float = 0.0) -> Float:
        result = super().steps(states, step, least)

        def backward() -> None:
            self._give(states, self._required(result) * self._slope(states, step, least))

        self._steps.append(backward)
        return result

    def _slope(self, states: Float, step: str, least: float) -> Float:
        """Return the derivatives of the steps: none of those that are raised to the least."""
        slope = 1 / (1 + np.exp(-(states + self.weights[step])))
        return np.asarray(np.where(self._steps_of(states, step, 0.0) > least, slope, 0))

    def times(self, states: Float, factor: float | Float) -> Float:
        result = super().times(states, factor)
        if result is not states:
            self._steps.append(
                lambda: self._give(states, super(Tape, self).times(self._required(result), factor))
            )
        return result

    def spread(self, states: Float, width: int) -> Float:
        result = super().spread(states, width)

        def step() -> None:
            above = self._required(result).reshape(len(states), -1, width)
            self._give(states, above.sum(axis=2))

        self._steps.append(step)
        return result

    def scale_channels(self, name: str, states: Float) -> Float:
        result = super().scale_channels(name, states)

        def step() -> None:
            above = self._required(result)
            known = self._vector_gradients.get(name)
            if known is not None:
                known += (above * states).sum(axis=0)
            self._give(states, above * self.weights[name])

        self._steps.append(step)
        return result

    def skip(self, output: Float, states: Float, name: str, width: int) -> Float:
        result = super().skip(output, states, name, width)

        def step() -> None:
            above = self._required(result)
            self._give(states, above * np.repeat(self.weights[name], width))
            self._give(output, above)

        self._steps.append(step)
        return result

    def recurrence(self, parts: Sequence[Float], rule: Mapping[str, Any]) -> Float:
        output = super().recurrence(parts, rule)

        def step() -> None:
            above, gradients = self._required(output), [np.empty_like(part) for part in parts]
            names = ("query", "key", "value", "decay", "strength")
            written = {
                f"{name}_gradient": each for name, each in zip(names, gradients, strict=True)
            }
            inputs: dict[str, Any] = {**dict(zip(names, parts, strict=True)), **written, **rule}
            _kernels.recurrence_backward(gradient=above, **inputs)
            for part, gradient in zip(parts, gradients, strict=True):
                self._give(part, gradient)

        self._steps.append(step)
        return output

    def scale_all(self, name: str, hidden: Float) -> None:
        def step() -> None:  # the caller has the product, as it has sums
            self._gradients[id(hidden)] *= self.weights[name]

        self._steps.append(step)

    def rotate(
        self, states: Float, tables: tuple[Float, Float], heads: int, first: int, interleaved: bool
    ) -> None:
        super().rotate(states, tables, heads, first, interleaved)
        self._steps.append(
            lambda: _kernels.rotate(
                self._gradients[id(states)], *tables, heads, first, interleaved, backward=True
            )
        )

    def scale_positions(self, states: Float, factors: Float) -> Float:
        result = super().scale_positions(states, factors)
        self._steps.append(
            lambda: self._give(
                states, super(Tape, self).scale_positions(self._required(result), factors)
            )
        )
        return result

    def attend(
        self, query: Float, key: Float, value: Float, rule: Mapping[str, Any], heads: int
    ) -> Float:
        output = super().attend(query, key, value, rule, heads)

        def step() -> None:
            gradients = [np.empty_like(each) for each in (query, key, value)]
            _kernels.attention_backward(
                query,
                key,
                value,
                heads=heads,
                gradient=self._required(output),
                query_gradient=gradients[0],
                key_gradient=gradients[1],
                value_gradient=gradients[2],
                **rule,
            )
            for array, gradient in zip((query, key, value), gradients, strict=True):
                self._give(array, gradient)

        self._steps.append(step)
        return output

    def latent_keys(
        self, both: Float, turned: Float, plain: int, heads: int
    ) -> tuple[Float, Float]:
        key, value = super().latent_keys(both, turned, plain, heads)

        def step() -> None:
            to_key, to_value = (
                self._required(each).reshape(len(both), heads, -1) for each in (key, value)
            )
            to_both = np.concatenate([to_key[:, :, :plain], to_value], axis=2)
            self._give(both, to_both.reshape(both.shape))
            self._give(turned, to_key[:, :, plain:].sum(axis=1))

        self._steps.append(step)
        return key, value

    def activate(self, states: Float, activation: str) -> Float:
        result = super().activate(states.copy(), activation)

        def step() -> None:
            gradient = self._required(result)
            _kernels.activate_backward(states, activation, gradient)
            self._give(states, gradient)

        self._steps.append(step)
        return result

    def gate(self, gate: Float, up: Float, activation: str) -> Float:
        result = super().gate(gate.copy(), up, activation)

        def step() -> None:
            gradient = self._take(result)
            if gradient is not None:
                to_up = np.empty_like(up)
                _kernels.activate_multiply_backward(gate, up, activation, gradient, to_up)
                self._give(gate, gradient)
                self._give(up, to_up)

        self._steps.append(step)
        return result

    def clamped_gate(self, gate: Float, up: Float, alpha: float, limit: float) -> Float:
        result = super().clamped_gate(gate.copy(), up, alpha, limit)

        def step() -> None:
            gradient = self._take(result)
            if gradient is not None:
                to_up = np.empty_like(up)
                _kernels.clamped_swiglu_backward(gate, up, alpha, limit, gradient, to_up)
                self._give(gate, gradient)
                self._give(up, to_up)

        self._steps.append(step)
        return result

    def multiply(self, states: Float, others: Float) -> Float:
        result = super().multiply(states, others)

        def step() -> None:
            gradient = self._required(result)
            self._give(states, gradient * others)
            self._give(others, gradient * states)

        self._steps.append(step)
        return result

    def sigmoid(self, states: Float) -> Float:
        result = super().sigmoid(states)
        self._steps.append(
            lambda: self._give(states, self._required(result) * result * (1 - result))
        )
        return result

    def route(self, logits: Float, config: ExpertsConfig, correction: Float | None) -> Routes:
        routes = super().route(logits, config, correction)

        def step() -> None:
            gradients = [self._take(weights) for weights in routes.weights]
            self._give(logits, route_backward(routes, config, gradients))

        self._steps.append(step)
        return routes

    def gather(self, states: Float, rows: Rows) -> Float:
        part = super().gather(states, rows)
        if part is not states:

            def step() -> None:
                gradient = self._take(part)
                if gradient is None:
                    return
                if id(states) not in self._gradients:
                    self._gradients[id(states)] = np.zeros_like(states)
                self._gradients[id(states)][rows] += gradient  # no row is there twice

            self._steps.append(step)
        return part

    def add(
        self,
        output: Float,
        hidden: Float,
        factor: float,
        rows: Rows = slice(None),
        weights: Float | None = None,
    ) -> None:
        def step() -> None:
            gradient = self._gradients[id(hidden)][rows] * hidden.dtype.type(factor)
            if weights is not None:
                self._give(weights, (gradient * output).sum(axis=1).reshape(weights.shape))
                gradient *= weights.reshape(-1, 1)
            self._give(output, gradient)

        self._steps.append(step)

    def _linear_backward(self, name: str, states: Float, gradient: Float) -> None:
        self._on_linear(name, states, gradient)
        bias = self._vector_gradients.get(f"{name}.bias")
        if bias is not None:
            bias += gradient.sum(axis=0)
        known = self._gradients.get(id(states))
        result = np.empty_like(states) if known is None else known
        _kernels.linear_backward_input(
            gradient, self.weights[f"{name}.weight"], result, known is not None
        )
        self._gradients[id(states)] = result

    def _norm_backward(
        self,
        name: str,
        states: Float,
        normed: Float,
        channels: int,
        kernel: Callable[..., None],
        kind: str,
        epsilon: float,
    ) -> None:
        above = self._take(normed)
        if above is None:
            return
        gradient = above.reshape(-1, channels)
        bias = self._vector_gradients.get(f"{name}.bias")
        if bias is not None:
            bias += gradient.sum(axis=0)
        result = np.empty_like(gradient)
        kernel(
            states.reshape(-1, channels),
            norm_gain(kind, self.weights[f"{name}.weight"]),
            epsilon,
            gradient,
            result,
            self._vector_gradients.get(f"{name}.weight"),
        )
        self._give(states, result.reshape(states.shape))

    def _give(self, array: Float, gradient: Float) -> None:
        """Add to the gradient of an array; the one given may be kept."""
        known = self._gradients.get(id(array))
        if known is None:
            self._gradients[id(array)] = np.ascontiguousarray(gradient)
        else:
            known += gradient

    def _take(self, array: Float) -> Float | None:
        """Return the gradient of an array that nothing before it adds to any more, None for zeros."""
        return self._gradients.pop(id(array), None)

    def _required(self, array: Float) -> Float:
        gradient = self._take(array)
        return np.zeros_like(array) if gradient is None else gradient
