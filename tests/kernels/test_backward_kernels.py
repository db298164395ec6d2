"""The gradients of every kernel, against finite differences in float64; float32 against float64."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS
from numpy.typing import NDArray

from bitwright import _kernels

pytestmark = pytest.mark.usefixtures("all_processors")

Float = NDArray[Any]
STEP = 1e-5


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape)


def check(
    function: Callable[..., Float],
    inputs: Sequence[Float],
    backward: Callable[[Float], Sequence[Float]],
) -> None:
    """Compare ⟨weights, function(inputs)⟩'s change along random directions with what `backward`, given the
    weights as gradient of the output, says."""
    output = function(*inputs)
    weights = gaussian(*output.shape, seed=77)
    gradients = backward(weights)
    assert len(gradients) == len(inputs)
    for place, (array, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        assert gradient.shape == array.shape
        for seed in range(2):
            direction = gaussian(*array.shape, seed=100 + seed)
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[place] = array + sign * STEP * direction
                ends.append(float((weights * function(*moved)).sum()))
            measured = (ends[0] - ends[1]) / (2 * STEP)
            size = float(np.linalg.norm(gradient)) * np.sqrt(gradient.size) + 1e-3
            assert abs(measured - float((gradient * direction).sum())) < 1e-7 * size, place


def new(like: Float, fill: float = np.nan) -> Float:
    return np.full_like(like, fill)


@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 40), channels=st.integers(1, 40), out=st.integers(1, 150))
def test_linear(tokens: int, channels: int, out: int) -> None:
    states, weight = gaussian(tokens, channels), gaussian(out, channels, seed=1)
    bias = gaussian(out, seed=2)

    def forward(states: Float, weight: Float, bias: Float) -> Float:
        result = np.empty((tokens, out))
        _kernels.linear(states, weight, bias, result, False)
        return result

    def backward(gradient: Float) -> list[Float]:
        once, twice, dense = new(states), new(states, 0), new(weight, 1)
        _kernels.linear_backward_input(gradient, weight, once, False)
        for _ in range(2):
            _kernels.linear_backward_input(gradient, weight, twice, True)
        np.testing.assert_allclose(twice, 2 * once)
        _kernels.linear_backward_weight(gradient, states, dense)
        return [once, dense - 1, gradient.sum(0)]

    check(forward, [states, weight, bias], backward)


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(1, 20),
    groups=st.integers(1, 5),
    size=st.integers(1, 9),
    out=st.integers(1, 300),
    shuffled=st.booleans(),
)
def test_quantized_linear(tokens: int, groups: int, size: int, out: int, shuffled: bool) -> None:
    rng = np.random.default_rng(groups + 10 * size)
    codes = rng.integers(0, 16, (out, groups * size), np.uint8)
    group_of = np.repeat(np.arange(groups, dtype=np.int32), size)
    if shuffled:
        rng.shuffle(group_of)
    states = gaussian(tokens, groups * size)
    scales, biases = gaussian(out, groups, seed=1), gaussian(out, groups, seed=2)

    def forward(scales: Float, biases: Float) -> Float:
        result: Float = states @ (codes * scales[:, group_of] + biases[:, group_of]).T
        return result

    def backward(gradient: Float) -> list[Float]:
        found = [new(scales, 0), new(biases, 0)]
        _kernels.linear_backward_groups(gradient, states, codes, group_of, *found)
        single = [part.astype(np.float32) for part in (gradient, states)]
        rough = [np.zeros(scales.shape, np.float32) for _ in range(2)]
        _kernels.linear_backward_groups(*single, codes, group_of, *rough)
        for exact, part in zip(found, rough, strict=True):
            np.testing.assert_allclose(part, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
        return found

    check(forward, [scales, biases], backward)


@pytest.mark.parametrize("tokens", [1, 33, 600])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norms(tokens: int, kind: str) -> None:
    states, weight, bias = gaussian(tokens, 23), gaussian(23, seed=1), gaussian(23, seed=2)

    def forward(states: Float, weight: Float, *bias: Float) -> Float:
        result = np.empty_like(states)
        getattr(_kernels, kind)(states, weight, *bias, 1e-3, result)
        return result

    def backward(gradient: Float) -> list[Float]:
        kernel = getattr(_kernels, f"{kind}_backward")
        alone, result, gain = new(states), new(states), np.ones(23)
        kernel(states, weight, 1e-3, gradient, result, gain)
        kernel(states, weight, 1e-3, gradient, alone)
        np.testing.assert_array_equal(alone, result)
        return [result, gain - 1, *([gradient.sum(0)] if kind == "layer_norm" else [])]

    check(forward, [states, weight, *([bias] if kind == "layer_norm" else [])], backward)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("first", [0, 3])
def test_rotate(interleaved: bool, first: int) -> None:
    angles = gaussian(7, 4)
    # Longrope scales both tables, so this is more than a rotation.
    cosines, sines = 1.3 * np.cos(angles), 1.3 * np.sin(angles)

    def turned(states: Float, backward: bool) -> Float:
        result = states.copy()
        _kernels.rotate(result, cosines, sines, 3, first, interleaved, backward)
        return result

    states = gaussian(14, 3 * 11, seed=1)
    check(lambda states: turned(states, False), [states], lambda g: [turned(g, True)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    gate, up = 2 * gaussian(9, 21), gaussian(9, 21, seed=1)

    def alone(states: Float) -> Float:
        result = states.copy()
        _kernels.activate(result, activation)
        return result

    def alone_backward(gradient: Float) -> list[Float]:
        result = gradient.copy()
        _kernels.activate_backward(gate, activation, result)
        return [result]

    def gated(gate: Float, up: Float) -> Float:
        result = gate.copy()
        _kernels.activate_multiply(result, up, activation)
        return result

    def gated_backward(gradient: Float) -> list[Float]:
        to_gate, to_up = gradient.copy(), new(up)
        _kernels.activate_multiply_backward(gate, up, activation, to_gate, to_up)
        return [to_gate, to_up]

    check(alone, [gate], alone_backward)
    check(gated, [gate, up], gated_backward)


@pytest.mark.parametrize("length", [1, 5, 64, 130])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (3, 0.0), (70, 1.5), (0, 0.7)])
def test_attention(length: int, heads: int, key_heads: int, window: int, softcap: float) -> None:
    rows, width, value_width = 2 * length, 6, 4
    inputs = [
        gaussian(rows, heads * width),
        gaussian(rows, key_heads * width, seed=1),
        gaussian(rows, key_heads * value_width, seed=2),
    ]
    rule = {"window": window, "softcap": softcap}

    def forward(*inputs: Float) -> Float:
        result = np.empty((rows, heads * value_width), inputs[0].dtype)
        _kernels.attention(*inputs, length, heads, key_heads, 0.4, result, **rule)  # type: ignore[arg-type]
        return result

    def gradients(gradient: Float, *inputs: Float) -> list[Float]:
        found = [new(part) for part in inputs]
        _kernels.attention_backward(  # type: ignore[call-arg]
            *inputs,
            length,
            heads,
            key_heads,
            0.4,
            gradient,
            *found,
            **rule,  # type: ignore[arg-type]
        )
        return found

    def backward(gradient: Float) -> list[Float]:
        found = gradients(gradient, *inputs)
        single = [part.astype(np.float32) for part in (gradient, *inputs)]
        for exact, rough in zip(found, gradients(*single), strict=True):
            np.testing.assert_allclose(rough, exact, rtol=0, atol=2e-5 * np.abs(exact).max() + 1e-6)
        return found

    check(forward, inputs, backward)


@pytest.mark.parametrize("length", [1, 70])
def test_attention_with_sinks(length: int) -> None:
    inputs = [gaussian(2 * length, 12), *(gaussian(2 * length, 6, seed=seed) for seed in (1, 2))]
    sinks = gaussian(4, seed=9) + 1

    def forward(*inputs: Float) -> Float:
        result = np.empty_like(inputs[0])
        _kernels.attention(*inputs, length, 4, 2, 0.4, result, sinks=sinks)
        return result

    def backward(gradient: Float) -> list[Float]:
        found = [new(part) for part in inputs]
        _kernels.attention_backward(*inputs, length, 4, 2, 0.4, gradient, *found, sinks=sinks)
        return found

    check(forward, inputs, backward)
    query, key, value = (each.reshape(2, length, -1, 3) for each in inputs)
    scores = 0.4 * np.einsum("bihc,bjhc->bhij", query, key.repeat(2, axis=2))
    weights = np.exp(scores) * np.tril(np.ones((length, length)))
    weights /= weights.sum(axis=3, keepdims=True) + np.exp(sinks)[:, None, None]
    expected = np.einsum("bhij,bjhc->bihc", weights, value.repeat(2, axis=2))
    np.testing.assert_allclose(forward(*inputs), expected.reshape(2 * length, 12), atol=1e-12)


def stepped(
    query: Float, key: Float, value: Float, decay: Float, strength: Float, corrects: bool
) -> Float:
    """The recurrence of one sample and head, token by token, as its definition has it."""
    state, outputs = np.zeros((key.shape[1], value.shape[1])), []
    for q, k, v, d, s in zip(query, key, value, decay, strength, strict=True):
        state = np.exp(d) * state
        update = s * (v - state.T @ k if corrects else v)
        state = state + np.outer(k, update)
        outputs.append(state.T @ q)
    return np.array(outputs)


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("length", [1, 5, 64, 130])
def test_recurrence(length: int, heads: int, key_heads: int, corrects: bool) -> None:
    rows, width, value_width = 2 * length, 5, 3
    inputs = [
        gaussian(rows, key_heads * width),
        gaussian(rows, key_heads * width, seed=1) / np.sqrt(width),
        gaussian(rows, heads * value_width, seed=2),
        -np.abs(gaussian(rows, heads, seed=3)) / 5,
        1 / (1 + np.exp(-gaussian(rows, heads, seed=4))),
    ]
    rule: Any = {"length": length, "heads": heads, "key_heads": key_heads, "corrects": corrects}

    def forward(*inputs: Float) -> Float:
        result = new(inputs[2])
        _kernels.recurrence(*inputs, out=result, **rule)
        return result

    def gradients(gradient: Float, *inputs: Float) -> list[Float]:
        found = [new(part) for part in inputs]
        names = ("query", "key", "value", "decay", "strength")
        written: Any = {f"{name}_gradient": part for name, part in zip(names, found, strict=True)}
        _kernels.recurrence_backward(*inputs, gradient=gradient, **written, **rule)
        return found

    def backward(gradient: Float) -> list[Float]:
        found = gradients(gradient, *inputs)
        single = [part.astype(np.float32) for part in (gradient, *inputs)]
        for exact, rough in zip(found, gradients(*single), strict=True):
            np.testing.assert_allclose(rough, exact, rtol=0, atol=3e-5 * np.abs(exact).max() + 1e-6)
        return found

    check(forward, inputs, backward)
    output = forward(*inputs)
    for sample, head in ((0, 0), (1, heads - 1)):
        place, key_head = slice(sample * length, (sample + 1) * length), head * key_heads // heads
        channels = slice(key_head * width, (key_head + 1) * width)
        values = slice(head * value_width, (head + 1) * value_width)
        query, key, value, decay, strength = (part[place] for part in inputs)
        expected = stepped(
            query[:, channels],
            key[:, channels],
            value[:, values],
            decay[:, head],
            strength[:, head],
            corrects,
        )
        np.testing.assert_allclose(output[place, values], expected, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolve(length: int) -> None:
    states, taps, bias = gaussian(3 * length, 7), gaussian(7, 4, seed=1), gaussian(7, seed=2)

    def forward(states: Float) -> Float:
        result = new(states)
        _kernels.convolve(states, taps, bias, length, result)
        return result

    def backward(gradient: Float) -> list[Float]:
        found = new(states)
        _kernels.convolve_backward(gradient, taps, length, found)
        return [found]

    check(forward, [states], backward)
    padded = np.concatenate([np.zeros((3, 7)), states[:length]])
    expected = [(padded[i : i + 4] * taps.T).sum(0) + bias for i in range(length)]
    np.testing.assert_allclose(forward(states)[:length], expected, atol=1e-12)


def test_clamped_swiglu() -> None:
    gate, up = 2 * gaussian(9, 31), 2 * gaussian(9, 31, seed=1)
    for values in (gate, up):  # finite differences do not see kinks
        values[np.abs(np.abs(values) - 1.5) < 0.01] = 0.3

    def forward(gate: Float, up: Float) -> Float:
        result = gate.copy()
        _kernels.clamped_swiglu(result, up, 1.7, 1.5)
        return result

    def backward(gradient: Float) -> list[Float]:
        to_gate, to_up = gradient.copy(), new(up)
        _kernels.clamped_swiglu_backward(gate, up, 1.7, 1.5, to_gate, to_up)
        return [to_gate, to_up]

    check(forward, [gate, up], backward)
    low = np.minimum(gate, 1.5)
    expected = low / (1 + np.exp(-1.7 * low)) * (np.clip(up, -1.5, 1.5) + 1)
    np.testing.assert_allclose(forward(gate, up), expected, rtol=1e-12)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_cap_logits(cap: float) -> None:
    logits = 4 * gaussian(9, 31)

    def forward(logits: Float) -> Float:
        result = logits.copy()
        _kernels.cap_logits(result, 1.7, cap)
        return result

    def backward(gradient: Float) -> list[Float]:
        result = gradient.copy()
        _kernels.cap_logits_backward(forward(logits), 1.7, cap, result)
        return [result]

    check(forward, [logits], backward)


def softmax(logits: Float) -> Float:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    result: Float = powers / powers.sum(1, keepdims=True)
    return result


def top(logits: Float, count: int, temperature: float) -> tuple[Float, Float, Float]:
    ids = np.empty((len(logits), count), np.int32)
    known, rest = np.empty((len(logits), count), logits.dtype), np.empty(len(logits), logits.dtype)
    _kernels.top_tokens(logits, temperature, ids, known, rest)
    return ids, known, rest


def plain_loss(
    name: str, teacher: Float, logits: Float, ids: Float, next_ids: Float, temperature: float
) -> Float:
    """The losses from their definitions: all tokens that are not listed are one outcome."""
    rows = np.arange(len(logits))
    whole = [softmax(each / temperature) for each in (teacher, logits)]
    if name == "cross_entropy":
        known = np.where(next_ids < 0, 1.0, whole[1][rows, next_ids])
        return -np.log(known)
    listed = [np.take_along_axis(each, ids, 1) for each in whole]
    if name == "logits_mse":
        logs = [np.log(each) for each in listed]
        change = logs[1] - logs[0]
        result: Float = (change - change.mean(1, keepdims=True)) ** 2
        return np.asarray(result.mean(1))
    p, q = listed
    if ids.shape[1] < logits.shape[1]:
        p, q = (np.hstack([each, 1 - each.sum(1, keepdims=True)]) for each in listed)
    if name == "kl":
        return np.asarray((p * np.log(p / q)).sum(1))
    if name == "reverse_kl":
        return np.asarray((q * np.log(q / p)).sum(1))
    m = (p + q) / 2
    return np.asarray((p * np.log(p / m) + q * np.log(q / m)).sum(1) / 2)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "cross_entropy", "logits_mse"])
@pytest.mark.parametrize("count", [1, 5, 19])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses(name: str, count: int, temperature: float) -> None:
    teacher, logits = 3 * gaussian(8, 19), 3 * gaussian(8, 19, seed=1)
    next_ids = np.array([0, 3, 18, -1, 5, 5, 7, -1], np.int32)
    ids, known, rest = top(teacher, count, temperature)

    def losses(logits: Float, gradient: Float | None, known: Float = known) -> Float:
        return _kernels.distillation_loss(
            logits, ids, known, rest, next_ids, name, temperature, 3.0, gradient
        )

    found = losses(logits, new(logits))
    np.testing.assert_allclose(losses(logits, None), found, rtol=1e-12)
    np.testing.assert_allclose(
        found, plain_loss(name, teacher, logits, ids, next_ids, temperature), atol=1e-9
    )
    # One loss per row: the weights of the finite differences, too, are one per row.
    gradient = new(logits)
    losses(logits, gradient)
    direction = gaussian(8, 19, seed=2)
    ends = [losses(logits + sign * STEP * direction, new(logits)) for sign in (1, -1)]
    measured = (ends[0] - ends[1]) / (2 * STEP)
    np.testing.assert_allclose((gradient * direction).sum(1), 3 * measured, atol=2e-8)
    # Stored log-probabilities that are all off by a factor mean the same distribution.
    if name != "cross_entropy":
        np.testing.assert_allclose(losses(logits, new(logits), known + 0.01), found, atol=1e-9)
    single = [part.astype(np.float32) for part in (logits, known, rest)]
    rough = np.empty((8, 19), np.float32)
    _kernels.distillation_loss(
        single[0], ids, single[1], single[2], next_ids, name, temperature, 3.0, rough
    )
    np.testing.assert_allclose(rough, gradient, atol=1e-5 * max(1.0, np.abs(gradient).max()))


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "logits_mse"])
def test_losses_of_extreme_logits_are_finite(name: str) -> None:
    teacher = np.array([[0, 1000, -1000, 3], [0, 0, 0, 1e30]], np.float32)
    logits = np.array([[1000, 0, 0, -1000], [1e30, 0, 0, 0]], np.float32)
    ids, known, rest = top(teacher, 2, 1.0)
    gradient = np.empty_like(logits)
    losses = _kernels.distillation_loss(
        logits, ids, known, rest, np.zeros(2, np.int32), name, 1.0, 1.0, gradient
    )
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), vocabulary=st.integers(1, 60), data=st.data())
def test_top_tokens(rows: int, vocabulary: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, vocabulary))
    # Whole numbers, so that there are ties: the smaller ids win.
    logits = np.random.default_rng(count).integers(-3, 4, (rows, vocabulary)).astype(np.float64)
    ids, known, rest = top(logits, count, 2.0)
    wanted = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :count], axis=1)
    np.testing.assert_array_equal(ids, wanted)
    p = softmax(logits / 2)
    np.testing.assert_allclose(np.exp(known), np.take_along_axis(p, wanted, 1))
    np.testing.assert_allclose(rest, 1 - np.exp(known).sum(1), atol=1e-12)


def test_wrong_arguments_are_named() -> None:
    two = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="groups: expected indices from 0 to 0"):
        _kernels.linear_backward_groups(
            two,
            two,
            two.astype(np.uint8),
            np.array([0, 1], np.int32),
            two[:, :1].copy(),
            two[:, :1].copy(),
        )
    with pytest.raises(TypeError, match="weight: expected dtype float64, got float32"):
        _kernels.linear_backward_input(two.astype(float), two, two, False)
    with pytest.raises(ValueError, match="ids and next: expected token ids from 0 to 1"):
        _kernels.distillation_loss(
            two, np.full((2, 1), 2, np.int32), two[:, :1].copy(), two[0], np.zeros(2, np.int32),
            "kl", 1.0, 1.0, two.copy(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="loss: expected kl, .* got mse"):
        _kernels.distillation_loss(
            two, np.zeros((2, 1), np.int32), two[:, :1].copy(), two[0], np.zeros(2, np.int32),
            "mse", 1.0, 1.0, two.copy(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="ids: expected 1 to 2 columns, got 3"):
        top(two, 3, 1.0)
