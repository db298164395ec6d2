"""Scales and biases in training: what is computed with is what is stored, and gradients are theirs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import DTYPES
from shared_data import TESTS
from squared_logits import SquaredLogits

import bitwright
from bitwright import _kernels
from bitwright.distill.adam import Adam
from bitwright.distill.student import PACE, Student, TrainedTensor, Zeros
from bitwright.grids.tensor import Grid
from bitwright.models.network import Network

TINY = TESTS / "data" / "tiny"
by_grid = pytest.mark.parametrize("grid", ["affine", "zero_point", "symmetric"])


def random_tensor(
    grid: Grid, bits: int = 3, dtype: str = "float32", shuffled: bool = False, seed: int = 0
) -> bitwright.QuantizedTensor:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((12, 48), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, bits, 16, grid=grid, scale_dtype=DTYPES[dtype])
    if shuffled:
        index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 16))
        tensor = replace(tensor, group_index=index)
    return tensor


@by_grid
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zeros", ["fixed", "project"])
def test_starts_with_what_was_given(grid: Grid, dtype: str, zeros: Zeros) -> None:
    start = random_tensor(grid, dtype=dtype)
    now = TrainedTensor(start, zeros).tensor()
    np.testing.assert_array_equal(now.scales, start.scales)
    assert now.scales.dtype == start.scales.dtype
    np.testing.assert_array_equal(now.dequantize(), start.dequantize())
    assert now.grid == start.grid


@by_grid
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gradient_is_that_of_the_weights(grid: Grid, bits: int, shuffled: bool) -> None:
    trained = TrainedTensor(random_tensor(grid, bits, shuffled=shuffled))
    rng = np.random.default_rng(1)
    slopes = rng.standard_normal((12, 48))  # of a loss that is linear in the weights
    trained.add_gradient(np.eye(48, dtype=np.float32), np.ascontiguousarray(slopes.T, np.float32))
    gradient = trained.gradient()
    assert not trained.sums.any()
    # The weights are linear in the parameters, so a large step is as exact as a small one.
    direction = rng.standard_normal(gradient.shape).astype(np.float32)
    ends = []
    for sign in (1, -1):
        trained.parameters[...] = sign * direction / PACE
        ends.append(float((slopes * trained.tensor().dequantize()).sum()))
    measured = float(PACE) * (ends[0] - ends[1]) / 2
    assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-4, abs=1e-3)


def test_zeros_are_projected() -> None:
    start = random_tensor("zero_point", 4)
    trained = TrainedTensor(start, "project")
    assert trained.parameters.shape == (2, 12, 3)
    known = np.asarray(start.zeros).astype(int)
    step = 1 / (PACE * trained.middle / 2)
    trained.parameters[1] = 1.2 * step
    np.testing.assert_array_equal(
        trained.tensor().zeros, np.clip(known - 1, np.minimum(known, 1), 15)
    )
    trained.parameters[1] = -100 * step
    assert (np.asarray(trained.tensor().zeros) == 15).all()
    trained.parameters[1] = 0.4 * step
    np.testing.assert_array_equal(trained.tensor().zeros, start.zeros)
    # The gradient: a zero that is one larger makes every weight of its group one scale smaller.
    trained.parameters[1] = 0
    slopes = np.random.default_rng(0).standard_normal((12, 48)).astype(np.float32)
    trained.add_gradient(np.eye(48, dtype=np.float32), np.ascontiguousarray(slopes.T))
    by_group = slopes.reshape(12, 3, 16).sum(2) * start.scales
    np.testing.assert_allclose(trained.gradient()[1], by_group / step, rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(
    grid=st.sampled_from(["affine", "zero_point", "symmetric"]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    size=st.floats(0, 0.05),
)
def test_computes_with_what_is_stored(grid: Grid, dtype: str, size: float) -> None:
    trained = TrainedTensor(random_tensor(grid, dtype=dtype))
    rng = np.random.default_rng(0)
    trained.parameters += size * rng.standard_normal(trained.parameters.shape).astype(np.float32)
    tensor = trained.tensor()
    assert tensor.scales.dtype == DTYPES[dtype]
    assert tensor.biases is None or tensor.biases.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(tensor.codes, trained.start.codes)


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_of_an_embedding(shuffled: bool) -> None:
    trained = TrainedTensor(random_tensor("affine", shuffled=shuffled))
    rows = np.array([3, 0, 3, 11], np.int32)
    above = np.random.default_rng(0).standard_normal((4, 48)).astype(np.float32)
    trained.add_row_gradient(rows, above)
    found = trained.sums.copy()
    dense = np.zeros((12, 48), np.float32)
    np.add.at(dense, rows, above)
    trained.sums[...] = 0
    trained.add_gradient(np.eye(48, dtype=np.float32), np.ascontiguousarray(dense.T))
    np.testing.assert_allclose(found, trained.sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "qwen3_moe", "starcoder2"])
def test_gradients_of_a_quantized_model(name: str, tmp_path: Path) -> None:
    """Those of scales and biases, straight from the codes, are what the dense gradient comes to."""
    options: dict[str, Any] = {"group_size": 32, "bits": 4, "progress": False}
    tied = bitwright.load_model(TINY / name).tied
    options |= {"embedding_bits": 4} if tied else {"embedding_bits": 4, "head_bits": 8}
    bitwright.quantize(TINY / name, tmp_path / "q", "rtn", **options)
    model = bitwright.load_model(tmp_path / "q")
    student = Student(model)
    network = Network(model, student.weight)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24)).astype(np.int32)
    dense: dict[str, NDArray[np.float64]] = {}

    def on_linear(name: str, inputs: NDArray[Any], above: NDArray[Any]) -> None:
        student.add_gradient(name, inputs, above)
        dense[name] = dense.get(name, 0) + above.T.astype(np.float64) @ inputs

    def on_embedding(rows: NDArray[np.int32], above: NDArray[Any]) -> None:
        student.add_row_gradient(rows, above)
        shape = (model.config.vocab_size, model.config.hidden_size)
        known = dense.setdefault(model.embedding_name, np.zeros(shape))
        np.add.at(known, rows, above)

    network.gradients(ids, SquaredLogits(), on_linear, on_embedding=on_embedding, on_head=on_linear)
    reached = 0
    for layer, trained in student.tensors.items():
        if layer not in dense:  # an expert that no token has chosen
            assert layer in model.experts
            continue
        reached += 1
        groups = dense[layer].reshape(*trained.sums.shape[1:], -1)
        codes = trained.start.codes.reshape(groups.shape)
        for found, wanted in zip(
            trained.sums, ((groups * codes).sum(2), groups.sum(2)), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-4 * np.abs(wanted).max())
    assert reached > 5
    changed = {name for name, gradient in student.gradients().items() if gradient.any()}
    assert model.embedding_name in changed


def test_adam_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    values = {"x": np.zeros(5, np.float32)}
    adam = Adam(values, momentum=0.9, decay=0.99, epsilon=1e-8)
    wanted, first, second = np.zeros(5), np.zeros(5), np.zeros(5)
    for step in range(1, 30):
        gradient = rng.standard_normal(5)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        unbiased = first / (1 - 0.9**step), second / (1 - 0.99**step)
        wanted -= 0.01 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        adam.step({"x": gradient.astype(np.float32)}, 0.01)
    np.testing.assert_allclose(values["x"], wanted, rtol=1e-4)


def test_network_of_a_quantized_model_is_the_model(tmp_path: Path) -> None:
    bitwright.quantize(TINY / "llama-biases", tmp_path / "q", "rtn", group_size=32, progress=False)
    model = bitwright.load_model(tmp_path / "q")
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    states = Network(model, Student(model).weight).final_states(ids)
    logits = model.head_logits(states, model.rows(model.head_name))
    np.testing.assert_array_equal(logits.reshape(2, 12, -1), model.logits(ids))
    assert _kernels.num_threads() >= 1
