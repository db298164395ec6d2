"""Gradients of whole models of every family, against finite differences in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shared_data import ARCH, OWN, TINY

import bitwright
from bitwright import _kernels
from bitwright.models.network import Network

STEP = 1e-5
Float = NDArray[Any]


class Distillation:
    """KL to a random teacher, of which a quarter of the vocabulary is known."""

    def __init__(self, rows: int, vocabulary: int, dtype: Any) -> None:
        logits = 2 * np.random.default_rng(5).standard_normal((rows, vocabulary)).astype(dtype)
        count = vocabulary // 4
        self.ids = np.empty((rows, count), np.int32)
        self.known, self.rest = np.empty((rows, count), dtype), np.empty(rows, dtype)
        _kernels.top_tokens(logits, 1.0, self.ids, self.known, self.rest)

    def __call__(self, first: int, logits: Float, gradient: Float | None) -> NDArray[np.float64]:
        rows = slice(first, first + len(logits))
        none = np.full(len(logits), -1, np.int32)
        out = np.empty_like(logits) if gradient is None else gradient
        return _kernels.distillation_loss(
            logits, self.ids[rows], self.known[rows], self.rest[rows], none, "kl", 1.0, 1.0, out
        )


class Weights:
    """All arrays of a model in float64, and what is added to them."""

    def __init__(self, model: bitwright.Model) -> None:
        self.model = model
        self.known: dict[str, Float] = {}
        self.moved: dict[str, Float] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Float:
        if name not in self.known:
            self.known[name] = self.model.weight(name, shape).astype(np.float64)
        moved = self.moved.get(name)
        return self.known[name] if moved is None else self.known[name] + moved


def all_vectors(model: bitwright.Model) -> dict[str, tuple[int, ...]]:
    names = {
        model.block_prefix(index) + name: shape
        for index, layout in enumerate(model.layouts)
        for name, shape in layout.vectors.items()
        # Biases that only choose, and what belongs to neither norms nor linears.
        if not name.endswith(("correction_bias", "sinks", "A_log", "dt_bias", ".D", "layer_scalar"))
        and len(shape) == 1
    }
    for name in model.final_operations().vectors:
        names[name] = (model.config.hidden_size,)
    return names


@pytest.mark.parametrize(
    "folder", [*OWN, *ARCH], ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_gradients_of_a_whole_model(folder: Path) -> None:
    model = bitwright.load_model(folder)
    weights = Weights(model)
    network = Network(model, weights, np.float64)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9)).astype(np.int32)
    loss = Distillation(ids.size, model.config.vocab_size, np.float64)
    # Of unit length, the gradients of norms' weights and biases included.
    vectors = {name: np.zeros(shape) for name, shape in all_vectors(model).items()}
    found: dict[str, Float] = {}

    def on_linear(name: str, inputs: Float, above: Float) -> None:
        shape = (above.shape[1], inputs.shape[1])
        _kernels.linear_backward_weight(above, inputs, found.setdefault(name, np.zeros(shape)))

    def on_embedding(rows: NDArray[np.int32], above: Float) -> None:
        shape = (model.config.vocab_size, model.config.hidden_size)
        np.add.at(found.setdefault(model.embedding_name, np.zeros(shape)), rows, above)

    losses = network.gradients(
        ids,
        loss,
        on_linear,
        on_embedding=on_embedding,
        on_head=on_linear,
        vector_gradients=vectors,
    )
    np.testing.assert_allclose(losses, network.losses(ids, loss), rtol=1e-12)
    wanted = {*model.linear_shapes(), *model.never_quantized(), model.embedding_name}
    reached = {name for name in weights.known if name in wanted or name == model.head_name}
    experts = {name for name in reached if name in model.experts}
    assert reached - experts <= set(found) <= reached  # no token may have chosen some experts

    rng = np.random.default_rng(1)
    names = sorted(found)
    groups = [names, *([name] for name in rng.choice(names, min(12, len(names)), replace=False))]
    groups += [[model.embedding_name], [model.head_name], sorted(vectors)]
    for group in groups:
        directions = {name: rng.standard_normal((found | vectors)[name].shape) for name in group}
        ends = []
        for sign in (1, -1):
            moved = Network(model, weights, np.float64)
            weights.moved = {}
            for name, direction in directions.items():
                if name in vectors:
                    start = model.vector(name, direction.shape).astype(np.float64)
                    moved.set_vector(name, start + sign * STEP * direction)
                else:
                    weights.moved[name] = sign * STEP * direction
            ends.append(moved.losses(ids, loss).sum())
        weights.moved = {}
        measured = (ends[0] - ends[1]) / (2 * STEP)
        gradient = sum(
            float(((found | vectors)[name] * direction).sum())
            for name, direction in directions.items()
        )
        size = np.sqrt(sum(float(np.square((found | vectors)[name]).sum()) for name in group))
        assert abs(measured - gradient) < 2e-5 * max(size, 1e-3), group


@pytest.mark.parametrize("folder", TINY[:3] + TINY[-4:], ids=lambda folder: folder.name)
def test_gradients_in_float32(folder: Path) -> None:
    model = bitwright.load_model(folder)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 40)).astype(np.int32)
    totals = []
    for dtype in (np.float32, np.float64):
        found: dict[str, Float] = {}

        def on_linear(name: str, inputs: Float, above: Float, found: Any = found) -> None:
            shape = (above.shape[1], inputs.shape[1])
            start = found.setdefault(name, np.zeros(shape, inputs.dtype))
            _kernels.linear_backward_weight(above, inputs, start)

        loss = Distillation(ids.size, model.config.vocab_size, dtype)
        Network(model, dtype=dtype).gradients(ids, loss, on_linear)
        totals.append(found)
    for name, exact in totals[1].items():
        error = np.abs(totals[0][name] - exact).max()
        assert error < 1e-4 * max(np.abs(exact).max(), 1e-3), name
