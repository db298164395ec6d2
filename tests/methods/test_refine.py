"""Refinement and drift correction: what they promise, and what they are worth."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damped_objective import layer, objective
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, TESTS, needs_shared

import bitwright
from bitwright.blocks.drift import FEEDBACK, OriginalStream, drift_rows
from bitwright.grids.tensor import Grid
from bitwright.models.block import ChunkStates, Rotation
from bitwright.runs.states import ChunkPlan, States

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 40),
    groups=st.integers(1, 5),
    size=st.sampled_from([8, 16, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
    grid=st.sampled_from(["affine", "zero_point", "symmetric"]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    method=st.sampled_from(["rtn", "gptq"]),
    seed=st.integers(0, 100),
)
def test_the_objective_never_rises(
    out: int, groups: int, size: int, bits: int, grid: Grid, dtype: str, method: str, seed: int
) -> None:
    weight, gram = layer(out, groups * size, seed)
    options: dict[str, Any] = {"grid": grid, "scale_dtype": DTYPES[dtype]}
    if method == "rtn":
        start = bitwright.quantize_rtn(weight, bits, size, **options)
    else:
        start = bitwright.quantize_gptq(weight, gram, bits, size, **options)
    refined, objectives = bitwright.refine(start, weight, gram, rounds=3)
    scale = objectives[0] + 1e-12
    assert (np.diff(objectives) <= 1e-6 * scale).all()
    assert objectives[0] == pytest.approx(objective(weight, start, gram, 0.01), rel=1e-3, abs=1e-9)
    assert objectives[-1] == pytest.approx(
        objective(weight, refined, gram, 0.01), rel=2e-2, abs=1e-4 * scale
    )
    assert refined.scales.dtype == start.scales.dtype
    assert refined.codes.max() < 2**bits
    if start.zeros is not None:
        assert refined.zeros.max() < 2**bits
        if grid == "symmetric":
            np.testing.assert_array_equal(refined.zeros, start.zeros)


def test_zeros_are_chosen_again() -> None:
    """Weights that lie on a grid come near it from one with other zeros and ranges, which needs codes to
    move with them: single steps cannot do that."""
    rng = np.random.default_rng(5)
    _, gram = layer(12, 64, 5)
    codes = rng.integers(0, 4, (12, 64))
    zeros = np.repeat(rng.integers(0, 4, (12, 4)), 16, axis=1)
    weight = (0.125 * (codes - zeros)).astype(np.float32)
    start = bitwright.quantize_rtn(weight + np.float32(0.25), 2, 16, grid="zero_point")
    refined, objectives = bitwright.refine(start, weight, gram, rounds=4)
    assert (refined.zeros != start.zeros).mean() > 0.3
    assert objectives[-1] < 0.04 * objectives[0]  # twice as much with the zeros that were there


@pytest.mark.parametrize("grid", ["affine", "zero_point", "symmetric"])
def test_nothing_single_is_left_to_gain(grid: Grid) -> None:
    """After many rounds no code has a better neighbour, and no scale a better value."""
    weight, gram = layer(6, 64, 3)
    start = bitwright.quantize_rtn(weight, 3, 16, grid=grid)
    refined, objectives = bitwright.refine(start, weight, gram, rounds=60, damping=0.01)
    assert objectives[-1] < 0.6 * objectives[0]
    best = objective(weight, refined, gram, 0.01)
    rng = np.random.default_rng(0)
    for _ in range(200):
        row, column = int(rng.integers(6)), int(rng.integers(64))
        for step in (-1, 1):
            codes = refined.codes.astype(int)
            codes[row, column] += step
            if 0 <= codes[row, column] < 8:
                fields = {**vars(refined), "codes": codes.astype(np.uint8)}
                moved = bitwright.QuantizedTensor(**fields)
                assert objective(weight, moved, gram, 0.01) > best * (1 - 1e-5)
    for factor in (0.999, 1.001):
        fields = {**vars(refined), "scales": refined.scales * np.float32(factor)}
        if refined.biases is not None:
            fields["biases"] = refined.biases * np.float32(factor)
        assert objective(weight, bitwright.QuantizedTensor(**fields), gram, 0.01) > best


def test_dead_channels_and_wrong_arguments() -> None:
    weight, gram = layer(4, 32, 0)
    gram[5] = gram[:, 5] = 0
    start = bitwright.quantize_gptq(weight, gram, 3, 16)
    refined, objectives = bitwright.refine(start, weight, gram, damping=0)
    assert np.isfinite(objectives).all()
    assert isinstance(refined, bitwright.GptqTensor)
    assert refined.column_losses is None
    with pytest.raises(ValueError, match=r"weight: expected shape \(4, 32\)"):
        bitwright.refine(start, weight[:2], gram)
    with pytest.raises(ValueError, match="damping"):
        bitwright.refine(start, weight, gram, damping=-1)
    with pytest.raises(bitwright.NonFiniteError):
        bitwright.refine(start, weight * np.float32(np.nan), gram)
    with pytest.raises(ValueError, match="gram"):
        bitwright.refine(start, weight, gram[:16, :16].copy())


def test_drift_gives_the_best_weights_for_the_original_outputs() -> None:
    """Ridge regression on the inputs that are there: of the original's outputs or, where these are added to
    the hidden states, of what also takes back a part of the error that these have."""
    model = bitwright.load_model(TESTS / "data" / "tiny" / "llama-biases")
    rope = Rotation(16, model.rotation(16).tables)
    rng = np.random.default_rng(0)
    original = rng.standard_normal((64, 64), dtype=np.float32)
    hidden = original + 0.3 * rng.standard_normal((64, 64), dtype=np.float32)
    block, source = model.block(0), model.block(0)
    plan = ChunkPlan(64, 64, 1, (0,))
    stream = OriginalStream(source, States(plan, iter([original.copy()])), rope)
    chunk, reference = ChunkStates(hidden), ChunkStates(original.copy())
    for stage in block.stages:
        statistics = bitwright.LayerStatistics(block.layout.linears[stage.linears[0]][1])
        drift = stream.drift(stage, statistics)
        states = block.stage_input(stage, chunk)
        statistics.add(states)
        drift.add(0, states, chunk.hidden)
        statistics.end_first_part()
        name = stage.linears[0]
        weight = block.weights[f"{name}.weight"]
        moments = statistics.gather()
        drift.gather(moments, statistics.first_tokens)
        gram = moments.gram
        found = drift.corrected(weight, gram)
        source.weights[f"{name}.weight"] = np.zeros_like(weight)  # does not matter any more
        wanted = block.stage_input(stage, reference) @ weight.T
        if stage.kind.endswith("output"):
            wanted += FEEDBACK * (reference.hidden - chunk.hidden)
        ridge = 0.1 * gram.diagonal().mean() * 64
        change = np.linalg.solve(
            states.T.astype(np.float64) @ states + ridge * np.eye(states.shape[1]),
            states.T @ (wanted - states @ weight.T),
        ).T
        assert np.abs(change).max() > 0.01
        np.testing.assert_allclose(found, weight + change, atol=2e-4)
        for each in (chunk, reference):
            block.advance(stage, block.stage_input(stage, each), each, rope)


@pytest.mark.parametrize("format", ["gptq", "awq", "gguf"])
@pytest.mark.parametrize("layer", ["gate_proj", "v_proj"])
def test_layers_that_add_next_to_nothing_do_not_take_back_the_errors_of_others(
    layer: str, format: Any, tmp_path: Path
) -> None:
    """What o_proj and down_proj would have to be for that, no scale holds."""
    folder = tmp_path / "in"
    shutil.copytree(DEMO, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if layer in name:
            tensors[name] = (tensors[name].astype(np.float32) * 1e-10).astype(tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    ids = np.random.default_rng(0).integers(3, 90, (8, 32)).astype(np.int32)
    method: Any = "awq" if format == "awq" else "gptq"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bitwright.BitwrightWarning)
        bitwright.quantize(
            folder, tmp_path / "out", method, 4, format=format, calibration=ids, progress=False
        )
        found = bitwright.evaluate(tmp_path / "out", ids, reference=folder)
    assert found.kl_divergence is not None
    assert found.kl_divergence < 0.5


def test_drift_is_estimated_on_half_of_many_tokens() -> None:
    rope = Rotation(512, {})
    assert rope.chunk_rows == 1024
    assert drift_rows(4096, rope) == 4096
    assert drift_rows(8192 + 512, rope) == 8192
    assert drift_rows(65_536, rope) == 32_768
    assert drift_rows(64 * 300, Rotation(300, {})) == 11 * 900


def divergence(folder: Path, text: Any, reference: Path) -> float:
    result = bitwright.evaluate(folder, text, reference=reference, length=128).kl_divergence
    assert result is not None
    return result


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "rtn"])
def test_each_step_pays(tmp_path: Path, method: Any) -> None:
    found = {}
    for name, options in {
        "fast": {"preset": "fast"},
        "refined": {"preset": "fast", "refine": True},
        "both": {"refine": True, "drift": True},
    }.items():
        bitwright.quantize(
            DEMO,
            tmp_path / name,
            method,
            3,
            calibration=TEXT,
            samples=32,
            length=128,
            progress=False,
            **options,  # type: ignore[arg-type]
        )
        found[name] = divergence(tmp_path / name, DEMO / "evaluation.txt", DEMO)
    assert found["refined"] < 0.97 * found["fast"]
    assert found["both"] < 0.9 * found["refined"]


@pytest.mark.parametrize("format", ["mlx", "gptq", "awq"])
def test_default_is_refined_and_corrected(tmp_path: Path, format: Any) -> None:
    options: dict[str, Any] = {
        "format": format, "calibration": TEXT, "samples": 8, "length": 64, "progress": False
    }  # fmt: skip
    bitwright.quantize(DEMO, tmp_path / "a", "gptq", 4, **options)
    bitwright.quantize(DEMO, tmp_path / "b", "gptq", 4, refine=True, drift=True, **options)
    bitwright.quantize(DEMO, tmp_path / "c", "gptq", 4, preset="fast", **options)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    with pytest.raises(ValueError, match="drift: with propagate original"):
        bitwright.quantize(DEMO, tmp_path / "d", drift=True, propagate="original", **options)
    with pytest.raises(ValueError, match="preset: expected one of fast, default, high, best"):
        bitwright.quantize(DEMO, tmp_path / "d", preset="slow", **options)  # type: ignore[arg-type]


def test_experts_are_refined_without_drift(tmp_path: Path) -> None:
    folder = TESTS / "data" / "tiny" / "qwen3_moe"
    ids = np.random.default_rng(0).integers(0, 96, (24, 40)).astype(np.int32)
    options: dict[str, Any] = {"group_size": 32, "calibration": ids, "progress": False}
    options["float_embeddings"] = True
    report = bitwright.quantize(folder, tmp_path / "q", "gptq", 3, **options)
    assert {layer.name for layer in report.layers} == set(
        bitwright.load_model(folder).linear_shapes()
    )
    result = bitwright.evaluate(tmp_path / "q", ids, reference=folder).kl_divergence
    assert result is not None
    assert np.isfinite(result)


@pytest.mark.slow
def test_best_keeps_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.presets.best.TRAINED_TOKENS", 8_000)
    options: dict[str, Any] = {
        "calibration": TEXT, "samples": 32, "length": 64, "progress": False
    }  # fmt: skip
    plain = bitwright.quantize(DEMO, tmp_path / "default", "gptq", 3, **options)
    best = bitwright.quantize(DEMO, tmp_path / "best", "gptq", 3, preset="best", **options)
    assert best.size_bytes <= plain.size_bytes
    assert len({layer.bits for layer in best.layers}) > 1
    text = DEMO / "evaluation.txt"
    assert divergence(tmp_path / "best", text, DEMO) < 0.9 * divergence(
        tmp_path / "default", text, DEMO
    )
    # Scales in float32 take twice as much, for both.
    options |= {"scale_dtype": "float32", "preset": "best", "samples": 8}
    wide = bitwright.quantize(DEMO, tmp_path / "wide", "gptq", 3, **options)
    assert wide.layer_bits_per_weight <= 4.0 + 1e-9


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("model", "bits", "size", "samples", "most"),
    [
        ("story", 3, 64, 32, 0.1033),  # the best prototypes, shared/QUALITY.md
        ("story", 2, 32, 32, 0.415),
        ("small-outliers", 3, 64, 64, 0.0148),
    ],
)
def test_default_is_at_or_below_the_prototypes(
    tmp_path: Path, model: str, bits: int, size: int, samples: int, most: float
) -> None:
    folder, name = SHARED / "models" / model, model.partition("-")[0]
    calibration = np.load(SHARED / "text" / f"{name}_calibration.npy")[:samples]
    text = np.load(SHARED / "text" / f"{name}_eval.npy")[:16]
    options: dict[str, Any] = {"calibration": calibration, "float_embeddings": True}
    bitwright.quantize(folder, tmp_path / "q", "gptq", bits, size, progress=False, **options)
    result = bitwright.evaluate(tmp_path / "q", text, reference=folder).kl_divergence
    assert result is not None
    assert result <= most
