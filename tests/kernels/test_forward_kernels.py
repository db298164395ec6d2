"""The kernels of a decoder block, against NumPy in float64."""

import math
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import Array

from bitwright import _kernels
from bitwright.models import config

pytestmark = pytest.mark.usefixtures("all_processors")

LONG = [1, 3, 63, 64, 65, 130]  # attention works on tiles of 64 positions


def gaussian(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_close(found: Array, wanted: Array, tolerance: float = 3e-6) -> None:
    largest = max(float(np.abs(wanted).max(initial=0)), 1e-30)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * largest)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 70),
    channels=st.integers(1, 130),
    out=st.integers(1, 70),
    biased=st.booleans(),
    accumulate=st.booleans(),
)
def test_linear(tokens: int, channels: int, out: int, biased: bool, accumulate: bool) -> None:
    states, weight = gaussian(tokens, channels), gaussian(out, channels, seed=1)
    bias = gaussian(out, seed=2) if biased else None
    result = gaussian(tokens, out, seed=3)
    wanted = states.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        wanted += bias
    if accumulate:
        wanted += result
    else:
        result.fill(np.nan)
    _kernels.linear(states, weight, bias, result, accumulate)
    assert_close(result, wanted)


@pytest.mark.parametrize("tokens", [1, 33, 100])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_rms_norm(tokens: int, magnitude: float) -> None:
    states, weight = gaussian(tokens, 67) * np.float32(magnitude), gaussian(67, seed=1)
    states[0] = 0
    result = np.empty_like(states)
    _kernels.rms_norm(states, weight, 1e-5, result)
    assert_close(result, reference.rms_norm(states, weight, 1e-5))


@pytest.mark.parametrize("tokens", [1, 33, 100])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_layer_norm(tokens: int, magnitude: float) -> None:
    states = (gaussian(tokens, 67) + 3) * np.float32(magnitude)
    weight, bias = gaussian(67, seed=1), gaussian(67, seed=2)
    result = np.empty_like(states)
    _kernels.layer_norm(states, weight, bias, 1e-5, result)
    assert_close(result, reference.layer_norm(states, weight, bias, 1e-5), 1e-5)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "half"), [(1, 1, 1, 1), (2, 5, 3, 8), (3, 40, 2, 13)]
)
def test_rotate(batch: int, length: int, heads: int, half: int) -> None:
    states = gaussian(batch * length, heads * 2 * half)
    angles = np.random.default_rng(1).uniform(0, 9, (length, half))
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    wanted = reference.rotate(states, cosines, sines, heads)
    _kernels.rotate(states, cosines, sines, heads)
    assert_close(states, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("first", "half", "width"), [(0, 3, 6), (2, 3, 8), (5, 8, 30), (0, 1, 9)])
def test_rotate_part_of_a_head(interleaved: bool, first: int, half: int, width: int) -> None:
    length, heads = 7, 3
    states = gaussian(2 * length, heads * width)
    angles = np.random.default_rng(1).uniform(0, 9, (length, half))
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    wanted = reference.rotate(states, *tables, heads, first, interleaved)
    _kernels.rotate(states, *tables, heads, first, interleaved)
    assert_close(states, wanted)


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("window", [0, 1, 5, 64, 65, 100, 2**63 - 1])
@pytest.mark.parametrize(("softcap", "value_width"), [(0.0, 10), (1.5, 7)])
def test_attention_in_windows_and_capped(
    length: int, window: int, softcap: float, value_width: int
) -> None:
    batch, width, heads, key_heads = 2, 10, 4, 2
    query = gaussian(batch * length, heads * width)
    key = gaussian(batch * length, key_heads * width, seed=1)
    value = gaussian(batch * length, key_heads * value_width, seed=2)
    result = np.full((batch * length, heads * value_width), np.nan, np.float32)
    sizes = length, heads, key_heads, 0.4
    _kernels.attention(query, key, value, *sizes, result, window, softcap)
    wanted = reference.attention(query, key, value, *sizes, min(window, length), softcap)
    assert_close(result, wanted, 1e-5)


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_attention(length: int, heads: int, key_heads: int) -> None:
    batch, width = 2, 10
    query = gaussian(batch * length, heads * width)
    key = gaussian(batch * length, key_heads * width, seed=1)
    value = gaussian(batch * length, key_heads * width, seed=2)
    result = np.full_like(query, np.nan)
    _kernels.attention(query, key, value, length, heads, key_heads, 0.4, result)
    assert_close(
        result, reference.attention(query, key, value, length, heads, key_heads, 0.4), 1e-5
    )


def test_attention_with_huge_scores_picks_the_largest() -> None:
    length, width = 70, 8
    query, key = (np.float32(1e5) * gaussian(length, width, seed=seed) for seed in (0, 1))
    value = gaussian(length, width, seed=2)
    result = np.empty_like(query)
    _kernels.attention(query, key, value, length, 1, 1, 1.0, result)
    scores = query.astype(np.float64) @ key.astype(np.float64).T
    best = np.where(np.tri(length, dtype=bool), scores, -np.inf).argmax(axis=1)
    assert_close(result, value[best])


def test_attention_does_not_see_the_future() -> None:
    length, width = 100, 8
    query, key, value = (gaussian(length, width, seed=seed) for seed in range(3))
    result, changed = np.empty_like(query), np.empty_like(query)
    _kernels.attention(query, key, value, length, 1, 1, 0.3, result)
    key[80:], value[80:] = np.nan, np.nan
    _kernels.attention(query, key, value, length, 1, 1, 0.3, changed)
    np.testing.assert_array_equal(result[:64], changed[:64])  # a whole tile lies before the change


def silu(x: Array) -> Array:
    return x * 0.5 * (1 + np.tanh(x / 2))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 9])
def test_activations(name: str, rows: int) -> None:
    assert sorted(ACTIVATIONS) == sorted((*config.ACTIVATIONS, "sigmoid"))  # of gates only
    gate, up = 5 * gaussian(rows, 130), gaussian(rows, 130, seed=1)
    gate[0, :4] = [-1e4, 1e4, 0, -80]
    wanted = ACTIVATIONS[name](gate.astype(np.float64))
    alone = gate.copy()
    _kernels.activate(alone, name)
    np.testing.assert_allclose(alone, wanted, rtol=3e-6, atol=3e-6)
    _kernels.activate_multiply(gate, up, name)
    np.testing.assert_allclose(gate, wanted * up, rtol=3e-6, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 20),
    vocabulary=st.integers(1, 300),
    magnitude=st.sampled_from([0.1, 1.0, 30.0, 1e6]),
    shift=st.sampled_from([0.0, 1e3, -1e3]),
    seed=st.integers(0, 99),
)
def test_losses(tokens: int, vocabulary: int, magnitude: float, shift: float, seed: int) -> None:
    p, q = (
        gaussian(tokens, vocabulary, seed=seed + 1000 * i) * np.float32(magnitude)
        + np.float32(shift)
        for i in range(2)
    )
    targets = np.random.default_rng(seed).integers(0, vocabulary, tokens, np.int32)
    log_p, log_q = reference.log_softmax(p), reference.log_softmax(q)
    found = _kernels.cross_entropy(q, targets)
    assert found.dtype == np.float64
    tolerance = 1e-6 * max(1, magnitude)
    np.testing.assert_allclose(found, -log_q[np.arange(tokens), targets], 1e-6, tolerance)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    tolerance = max(tolerance, 1e-6 * abs(shift))
    np.testing.assert_allclose(_kernels.kl_divergence(p, q), divergence, 1e-6, tolerance)


def test_divergence_from_itself_is_zero() -> None:
    logits = 10 * gaussian(5, 1000)
    np.testing.assert_allclose(_kernels.kl_divergence(logits, logits), 0, atol=1e-12)


def test_tokens_that_are_ruled_out_take_no_part() -> None:
    p, q = gaussian(3, 20), gaussian(3, 20, seed=1)
    allowed = np.arange(20) % 4 != 0
    masked_p, masked_q = (np.where(allowed, logits, np.float32(-np.inf)) for logits in (p, q))
    targets = np.array([1, 2, 3], np.int32)
    left = np.ascontiguousarray(p[:, allowed]), np.ascontiguousarray(q[:, allowed])
    np.testing.assert_allclose(
        _kernels.cross_entropy(masked_p, targets),
        _kernels.cross_entropy(left[0], targets - 1),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        _kernels.kl_divergence(masked_p, masked_q), _kernels.kl_divergence(*left), rtol=1e-5
    )


def test_logits_that_are_no_numbers_do_not_pass_for_good_ones() -> None:
    logits = gaussian(3, 20)
    broken = logits.copy()
    broken[1, 7] = np.nan
    targets = np.zeros(3, np.int32)
    for losses in (
        _kernels.cross_entropy(broken, targets),
        _kernels.kl_divergence(logits, broken),
        _kernels.kl_divergence(broken, logits),
    ):
        assert np.isnan(losses).tolist() == [False, True, False]


# wrong arguments

MATRIX = gaussian(6, 8)
OUT = np.empty((6, 8), np.float32)
SQUARE = gaussian(8, 8)
TABLE = gaussian(3, 2)
READ_ONLY = OUT.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("kernel", "arguments", "kind", "message"),
    [
        ("linear", (MATRIX, SQUARE[:, :4].copy(), None, OUT, False), ValueError, "weight: "),
        ("linear", (MATRIX, SQUARE, MATRIX[0, :4], OUT, False), ValueError, "bias: "),
        ("linear", (MATRIX, SQUARE, None, SQUARE, False), ValueError, "out: "),
        ("linear", (MATRIX, SQUARE, None, READ_ONLY, False), ValueError, "out: .*read-only"),
        ("linear", (MATRIX.astype("f2"), SQUARE, None, OUT, False), TypeError, "input: .*float16"),
        ("linear", (MATRIX.astype("f8"), SQUARE, None, OUT, False), TypeError, "weight: .*float64"),
        ("linear", (MATRIX, SQUARE[:, ::-1], None, OUT, False), ValueError, "weight: .*contiguous"),
        ("rms_norm", (MATRIX, MATRIX[0, :7], 1e-5, OUT), ValueError, "weight: "),
        ("rms_norm", (MATRIX, MATRIX[0], 1e-5, SQUARE), ValueError, "out: "),
        ("rotate", (OUT, TABLE, TABLE[:, :1].copy(), 2), ValueError, "sines: "),
        ("rotate", (OUT, TABLE, TABLE, 3), ValueError, "states: "),
        ("rotate", (OUT, TABLE, TABLE, 0), ValueError, "heads: "),
        ("rotate", (OUT[:5], TABLE, TABLE, 2), ValueError, "states: .*whole samples"),
        ("rotate", (READ_ONLY, TABLE, TABLE, 2), ValueError, "states: .*read-only"),
        ("attention", (MATRIX, MATRIX, MATRIX, 4, 2, 2, 1.0, OUT), ValueError, "query: "),
        ("attention", (MATRIX, MATRIX, MATRIX, 3, 3, 3, 1.0, OUT), ValueError, "query: "),
        ("attention", (MATRIX, MATRIX, MATRIX, 3, 2, 1, 1.0, OUT), ValueError, "key: "),
        ("attention", (MATRIX, MATRIX, SQUARE, 3, 2, 2, 1.0, OUT), ValueError, "value: "),
        ("attention", (MATRIX, MATRIX, MATRIX, 0, 2, 2, 1.0, OUT), ValueError, "length: "),
        ("attention", (MATRIX, MATRIX, MATRIX, 3, 2, 2, 1.0, SQUARE), ValueError, "out: "),
        ("attention", (MATRIX, MATRIX, MATRIX, 3, 2, 2, 1.0, OUT, -1), ValueError, "window"),
        ("attention", (MATRIX, MATRIX, MATRIX, 3, 2, 2, 1.0, OUT, 0, -1.0), ValueError, "window"),
        ("rotate", (OUT, TABLE, TABLE, 2, 1), ValueError, "states: .*do not fit"),
        ("rotate", (OUT, TABLE, TABLE, 1, -1), ValueError, "states: "),
        ("layer_norm", (MATRIX, MATRIX[0], MATRIX[0, :7], 1e-5, OUT), ValueError, "bias: "),
        ("activate", (READ_ONLY, "silu"), ValueError, "states: .*read-only"),
        ("activate", (OUT, "swish"), ValueError, "activation: .*silu.*swish"),
        ("activate_multiply", (OUT, SQUARE, "silu"), ValueError, "up: "),
        ("activate_multiply", (READ_ONLY, MATRIX, "silu"), ValueError, "gate: .*read-only"),
        ("cross_entropy", (MATRIX, np.zeros(5, np.int32)), ValueError, "targets: "),
        ("cross_entropy", (MATRIX, np.zeros(6, np.int64)), TypeError, "targets: .*int64"),
        ("cross_entropy", (MATRIX, np.full(6, 8, np.int32)), ValueError, "targets: .*0 to 7"),
        ("cross_entropy", (MATRIX, np.full(6, -1, np.int32)), ValueError, "targets: .*0 to 7"),
        ("kl_divergence", (MATRIX, SQUARE), ValueError, "logits: "),
        ("kl_divergence", (OUT[:, :0].copy(),) * 2, ValueError, "reference: .*empty"),
    ],
)
def test_wrong_arguments_are_named(
    kernel: str, arguments: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        getattr(_kernels, kernel)(*arguments)


def test_results_do_not_depend_on_where_arrays_lie() -> None:
    """Vectorized loops treat the elements before an aligned address apart; their bits must not differ."""
    rng = np.random.default_rng(0)
    rows, width = 6, 72
    values, others = rng.standard_normal((2, rows * width)).astype(np.float32)
    angles = rng.standard_normal((rows, width // 2))
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def results(offset: int) -> list[bytes]:
        def placed(array: NDArray[np.float32]) -> NDArray[np.float32]:
            room = np.empty(array.size + 64, np.float32)
            start = (-room.ctypes.data // 4) % 16 + offset
            view = room[start : start + array.size].reshape(array.shape)
            view[:] = array
            return view

        gate, up = (placed(each.reshape(rows, width)) for each in (values, others))
        cosines, sines = map(placed, tables)
        states, normed = placed(gate), np.empty_like(gate)
        _kernels.rms_norm(gate, placed(others[:width]), 1e-6, normed)
        _kernels.rotate(states, cosines, sines, 1)
        centred = np.empty_like(gate)
        _kernels.layer_norm(gate, placed(others[:width]), placed(values[:width]), 1e-6, centred)
        losses = _kernels.cross_entropy(gate, np.arange(rows, dtype=np.int32))
        divergences = _kernels.kl_divergence(gate, up)
        attended = placed(np.zeros_like(gate))
        _kernels.attention(gate, up, states, rows, 3, 3, 0.2, attended)
        _kernels.activate_multiply(gate, up, "silu")
        _kernels.activate(up, "gelu_pytorch_tanh")
        found = (gate, up, states, normed, centred, losses, divergences, attended)
        return [each.tobytes() for each in found]

    aligned = results(0)
    for offset in range(1, 16):
        assert results(offset) == aligned
