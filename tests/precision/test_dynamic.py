"""Sensitivities, and the precisions that follow from them."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shared_data import SHARED, TESTS, needs_shared

import bitwright
from bitwright import _kernels
from bitwright.distill.losses import DistillationLoss, TopTokens, next_tokens
from bitwright.models.network import Network

TINY = TESTS / "data" / "tiny"
DEMO = bitwright.demo_folder()
CANDIDATES = [(3, 64), (4, 64), (5, 64)]


@pytest.fixture(scope="module")
def found() -> bitwright.Sensitivities:
    return bitwright.estimate_sensitivities(
        DEMO, DEMO / "calibration.txt", samples=6, length=64, batch_size=4, progress=False
    )


@settings(deadline=None, max_examples=60)
@given(
    items=st.integers(1, 6),
    candidates=st.integers(1, 4),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
)
def test_allocation_is_near_the_best(items: int, candidates: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 20, (items, 1))
    sizes = weights * np.sort(rng.integers(2, 9, candidates))
    costs = rng.random((items, 1)) * np.sort(rng.random((items, candidates)))[:, ::-1]
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    budget = least + share * (most - least)
    chosen = bitwright.allocate(costs, sizes, budget)
    rows = np.arange(items)
    spent, cost = sizes[rows, chosen].sum(), costs[rows, chosen].sum()
    assert spent <= budget * (1 + 1e-9)
    # No single step up that gains anything still fits.
    more = sizes - sizes[rows, chosen][:, None]
    gain = costs[rows, chosen][:, None] - costs
    assert not ((more > 0) & (gain > 0) & (more <= budget - spent)).any()
    best = min(
        costs[rows, list(picks)].sum()
        for picks in itertools.product(range(candidates), repeat=items)
        if sizes[rows, list(picks)].sum() <= budget
    )
    # Lagrangian relaxation misses the optimum by at most what one item's step is worth.
    assert cost <= best + np.ptp(costs, axis=1).max() + 1e-9


def test_allocation_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="budget: the smallest candidates take 4, not 3"):
        bitwright.allocate([[1, 0], [1, 0]], [[2, 3], [2, 3]], 3)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 12), seed=st.integers(0, 100), share=st.floats(0, 1))
def test_threshold(count: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    names = [f"layer{index}" for index in range(count)]
    values = dict(zip(names, rng.standard_normal(count).tolist(), strict=True))
    parameters = dict(zip(names, rng.integers(1, 50, count).tolist(), strict=True))
    target = 3.5 + 2 * share

    def size(threshold: float) -> float:
        high = sum(parameters[name] for name in names if values[name] > threshold)
        return 3.5 + 2 * high / sum(parameters.values())

    threshold = bitwright.estimate_threshold(values, parameters, 3.5, 5.5, target)
    assert size(threshold) <= target + 1e-9
    below = [value for value in values.values() if value <= threshold]
    if below:  # the next layer would be too much
        assert size(np.nextafter(max(below), -np.inf)) > target
    with pytest.raises(ValueError, match=r"target_bpw: 5.6 .* from 3.5 to 5.5"):
        bitwright.estimate_threshold(values, parameters, 3.5, 5.5, 5.6)


def test_sensitivities_are_alignments_with_the_gradient() -> None:
    """By the definition, with the dense gradient of every layer."""
    folder = TINY / "qwen2"
    ids = np.random.default_rng(0).integers(0, 96, (3, 20)).astype(np.int32)
    found = bitwright.estimate_sensitivities(
        folder, ids, 3, 32, 8, 16, batch_size=2, seed=0, progress=False
    )
    model = bitwright.load_model(folder)
    shapes = model.linear_shapes()

    def rounded(name: str, bits: int, size: int) -> NDArray[np.float32]:
        return bitwright.quantize_rtn(model.weight(name, shapes[name]), bits, size).dequantize()

    def low(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return rounded(name, 3, 32) if name in shapes else model.weight(name, shape)

    logits = model.logits(ids).reshape(-1, 96)
    loss = DistillationLoss(TopTokens.of(logits, 96).rows, next_tokens(ids), "kl", 1, 1 / ids.size)
    dense = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def on_linear(name: str, inputs: Any, above: Any) -> None:
        _kernels.linear_backward_weight(above, inputs, dense[name])

    losses = Network(model, low).gradients(ids, loss, on_linear)
    assert found.kl_divergence == pytest.approx(losses.mean(), rel=1e-5)
    for name, gradient in dense.items():
        change = rounded(name, 3, 32) - rounded(name, 8, 16)
        wanted = float((gradient * change).sum())
        assert found.alignments[name] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        assert found.per_million[name] == pytest.approx(1e6 * wanted / change.size, rel=1e-3, abs=1)


def test_sensitivities_do_not_depend_on_the_batch(found: bitwright.Sensitivities) -> None:
    other = bitwright.estimate_sensitivities(
        DEMO, DEMO / "calibration.txt", samples=6, length=64, batch_size=1, progress=False
    )
    for name, value in found.alignments.items():
        assert other.alignments[name] == pytest.approx(value, rel=1e-3, abs=1e-7)


def test_sensitivities_of_experts() -> None:
    model = bitwright.load_model(TINY / "qwen3_moe")
    ids = np.random.default_rng(0).integers(0, 96, (2, 30)).astype(np.int32)
    found = bitwright.estimate_sensitivities(model, ids, 2, 32, 8, 32, progress=False)
    assert set(found.alignments) == set(model.linear_shapes())
    recipe = bitwright.choose_precisions(model, found, 5.0, [(2, 32), (4, 32), (8, 32)])
    by_stack: dict[str, set[Any]] = {}
    for name, place in model.experts.items():
        by_stack.setdefault(place.stacked_name, set()).add(recipe.layers[name])
    assert by_stack  # MLX stores a stack in one precision
    assert all(len(each) == 1 for each in by_stack.values())


def test_layers_that_engines_fuse_move_together(found: bitwright.Sensitivities) -> None:
    recipe = bitwright.choose_precisions(DEMO, found, 3.7, [(3, 64), (4, 64)], format="gptq")
    assert len(set(recipe.layers.values())) == 2
    for index in range(3):
        block = f"model.layers.{index}."
        for group in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                      ["mlp.gate_proj", "mlp.up_proj"]):  # fmt: skip
            assert len({recipe.layers[block + name] for name in group}) == 1


def test_recipe_keeps_within_the_target(found: bitwright.Sensitivities) -> None:
    model = bitwright.load_model(DEMO)
    shapes = model.linear_shapes()
    total = sum(map(math.prod, shapes.values()))
    step = min(map(math.prod, shapes.values())) / total  # one bit of the smallest layer
    seen = []
    for target in np.linspace(3.6, 5.4, 7):
        recipe = bitwright.choose_precisions(model, found, target, CANDIDATES)
        overhead = 2 * model.dtype.itemsize * 8 / 64
        bits = sum(
            math.prod(shapes[name]) * (each[0] + overhead) for name, each in recipe.layers.items()
        )
        assert recipe.bits_per_weight == pytest.approx(bits / total)
        assert target - step <= recipe.bits_per_weight <= target + 1e-9
        seen.append(recipe.bits_per_weight)
    assert seen == sorted(seen)


def test_wrong_targets_and_candidates(found: bitwright.Sensitivities) -> None:
    with pytest.raises(ValueError, match="out of reach; the candidates reach from 3.5 to 5.5"):
        bitwright.choose_precisions(DEMO, found, 3.0, CANDIDATES)
    with pytest.raises(ValueError, match="one precision for all layers"):
        bitwright.choose_precisions(DEMO, found, 4.5, CANDIDATES, format="awq")
    with pytest.raises(ValueError, match=r"gptq format stores 2, 3, 4 or 8 bits, not 5"):
        bitwright.choose_precisions(DEMO, found, 4.5, CANDIDATES, format="gptq")
    with pytest.raises(bitwright.SensitivityError, match="not those of"):
        bitwright.choose_precisions(TINY / "qwen2", found, 4.5, CANDIDATES)
    with pytest.raises(ValueError, match=r"groups of 48 do not divide .* such as 3:32"):
        bitwright.estimate_sensitivities(
            DEMO, DEMO / "calibration.txt", 3, 48, samples=1, length=32, progress=False
        )


@pytest.mark.slow
def test_dynamic_quantize_reuses_sensitivities(tmp_path: Path, monkeypatch: Any) -> None:
    text, file = DEMO / "calibration.txt", tmp_path / "sensitivities.json"
    options: dict[str, Any] = {"sensitivities": file, "length": 64, "progress": False}
    options["float_embeddings"] = True
    first = bitwright.dynamic_quantize(
        DEMO, tmp_path / "a", 4.5, CANDIDATES, "gptq", "mlx", text, sensitivity_samples=4, samples=8,
        evaluation=DEMO / "evaluation.txt", **options,
    )  # fmt: skip
    assert first.before is not None
    assert first.after is not None
    assert first.after.kl_divergence is not None
    assert first.after.kl_divergence > 0
    assert first.quantization.layer_bits_per_weight == pytest.approx(first.recipe.bits_per_weight)
    stored = {layer.name: (layer.bits, layer.group_size) for layer in first.quantization.layers}
    assert stored == first.recipe.layers
    monkeypatch.setattr("bitwright.presets.dynamic.estimate_sensitivities", None)  # no new pass
    second = bitwright.dynamic_quantize(
        DEMO, tmp_path / "b", 4.0, CANDIDATES, "rtn", "mlx", **options
    )
    assert second.recipe.bits_per_weight < first.recipe.bits_per_weight


def test_recipe_is_for_any_method(tmp_path: Path, found: bitwright.Sensitivities) -> None:
    recipe = bitwright.choose_precisions(DEMO, found, 4.5, CANDIDATES)
    recipe.save(tmp_path / "recipe.json")
    assert bitwright.Recipe.load(tmp_path / "recipe.json") == recipe
    for method in ("rtn", "awq"):
        report = bitwright.quantize(
            DEMO,
            tmp_path / method,
            method,  # type: ignore[arg-type]
            calibration=DEMO / "calibration.txt",
            samples=4,
            length=64,
            recipe=tmp_path / "recipe.json",
            float_embeddings=True,
            progress=False,
        )
        stored = {layer.name: (layer.bits, layer.group_size) for layer in report.layers}
        assert stored == recipe.layers
    model = bitwright.load_model(tmp_path / "awq")
    assert {name: model.quantized(name).bits for name in recipe.layers} == {  # type: ignore[union-attr]
        name: bits for name, (bits, _) in recipe.layers.items()
    }


@pytest.mark.slow
@needs_shared
def test_sensitivities_beat_chance_and_uniform_bits(tmp_path: Path) -> None:
    folder = SHARED / "models" / "small"
    calibration = np.load(SHARED / "text" / "small_calibration.npy")
    text = np.load(SHARED / "text" / "small_eval.npy")[:3]
    found = bitwright.estimate_sensitivities(folder, calibration, samples=8, progress=False)
    model = bitwright.load_model(folder)
    weights = np.array([math.prod(shape) for shape in model.linear_shapes().values()])

    def divergence(recipe: bitwright.Recipe | None, method: Any) -> float:
        bitwright.quantize(
            folder,
            tmp_path / "q",
            method,
            4,
            calibration=None if method == "rtn" else calibration,
            samples=None if method == "rtn" else 6,
            recipe=recipe,
            float_embeddings=True,
            overwrite=True,
            progress=False,
        )
        result = bitwright.evaluate(tmp_path / "q", text, reference=folder).kl_divergence
        assert result is not None
        return result

    two = [(3, 64), (5, 64)]
    chosen = bitwright.choose_precisions(model, found, 4.5, two)
    three = bitwright.choose_precisions(model, found, 4.5, CANDIDATES)
    for method, seeds in (("rtn", range(5)), ("gptq", range(2))):
        assert divergence(three, method) < 0.9 * divergence(None, method)
        ours = divergence(chosen, method)
        for seed in seeds:
            costs = weights * np.random.default_rng(seed).random(len(weights))
            sizes = weights[:, None] * [3.5, 5.5]
            picks = bitwright.allocate(
                np.stack([costs, 0 * costs], axis=1), sizes, 4.5 * weights.sum()
            )
            layers = {
                name: two[pick] for name, pick in zip(model.linear_shapes(), picks, strict=True)
            }
            assert ours < divergence(bitwright.Recipe(layers, 4.5, 4.5), method)
