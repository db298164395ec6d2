"""Layers with small weights behind what is large: the same function, which is to be quantized as well."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_models import k_model
from numpy.typing import NDArray
from reference import DTYPES, SMALLEST
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, TESTS, needs_shared

import bitwright
from bitwright.blocks.equalizing import gain_is_exact, moves_exactly
from bitwright.grids.choice import rounded_scales, smallest_scale
from bitwright.grids.superblocks import expanded, fit_superblocks
from bitwright.grids.tensor import GRIDS, K_GRIDS, Grid
from bitwright.quantization.output import groups_below_floor, relative_error

Array = NDArray[Any]
Powers = Mapping[str, int]  # of two, by a pattern of tensor names

DEMO = Path(str(bitwright.demo_folder()))
TINY = TESTS / "data" / "tiny"
IDS = np.random.default_rng(0).integers(1, 96, (16, 32)).astype(np.int32)

# Each leaves the function as it is.
MLP = {"(gate|up)_proj.weight": -1, "post_attention_layernorm.weight": 1}
ATTENTION = {"(q|k|v)_proj.weight": -1, "input_layernorm.weight": 1}
VALUES = {"v_proj.(weight|bias)": -1, "o_proj.weight": 1}
DOWN = {"down_proj.weight": -1, "up_proj.(weight|bias)": 1}
UP = {"up_proj.(weight|bias)": -1, "down_proj.weight": 1}
KEYS = {"k_proj.(weight|bias)": -1, "q_proj.(weight|bias)": 1}
PAIRS = {
    "mlp": MLP,
    "attention": ATTENTION,
    "values": VALUES,
    "down": DOWN,
    "up": UP,
    "keys": KEYS,
}


def scaled(source: Path, folder: Path, powers: Powers, times: int = 1, dtype: Any = None) -> Path:
    """Copy a model, its tensors multiplied by powers of two and, where asked for, in another dtype."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
            continue
        tensors = load_file(file)
        for name, array in tensors.items():
            wide = array.astype(np.float32)
            for pattern, power in powers.items():
                if re.search(pattern + "$", name):
                    wide = np.ldexp(wide, power * times)
            tensors[name] = wide.astype(dtype or array.dtype)
            assert np.isfinite(tensors[name].astype(np.float32)).all()
        save_file(tensors, folder / file.name, {"format": "pt"})
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        for key in ("dtype", "torch_dtype"):
            config.pop(key, None)
        config["dtype"] = np.dtype(dtype).name
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def kl(model: Path, original: Path) -> float:
    """Return the mean divergence of what a quantized model says from what the original does."""
    wanted, found = (
        np.asarray(bitwright.load_model(each).logits(IDS), np.float64) for each in (original, model)
    )
    logs = []
    for logits in (wanted, found):
        logits -= logits.max(axis=-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean())


def quantized(model: Path, out: Path, **options: Any) -> bitwright.QuantizationReport:
    asked: dict[str, Any] = {"method": "rtn", "format": "gptq", "group_size": 32, "progress": False}
    return bitwright.quantize(model, out, **asked | options)


def quantized_small(model: Path, out: Path, **options: Any) -> bitwright.QuantizationReport:
    with pytest.warns(bitwright.BitwrightWarning, match="too small for float16 scales"):
        report = quantized(model, out, **options)
    assert len(report.warnings) == 1
    assert any(layer.power > 0 for layer in report.layers)
    return report


def as_good(tmp_path: Path, source: Path, powers: Powers, times: int, **options: Any) -> None:
    """Check that a model with small weights is quantized as well as the same function with usual ones."""
    small = scaled(source, tmp_path / "small", powers, times)
    logits = [bitwright.load_model(each).logits(IDS) for each in (source, small)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-3)
    quantized(source, tmp_path / "usual-quantized", **options)
    quantized_small(small, tmp_path / "small-quantized", **options)
    usual = kl(tmp_path / "usual-quantized", source)
    assert kl(tmp_path / "small-quantized", small) == pytest.approx(usual, rel=0.05, abs=1e-6)


# models


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_of_layers(tmp_path: Path, pair: str) -> None:
    as_good(tmp_path, DEMO, PAIRS[pair], 19 if pair == "mlp" else 27)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "awq"},
        {"format": "gguf", "grid": "symmetric", "bits": 5},
        {"format": "gguf", "grid": "affine", "bits": 4},
        {"format": "gguf", "grid": "symmetric", "bits": 8},
        {"format": "gptq", "grid": "zero_point", "bits": 8},
        {"format": "gptq", "bits": 2},
        {"format": "mlx", "scale_dtype": "float16"},
        {"format": "compressed-tensors", "scale_dtype": "float16"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_formats_with_float16_scales(tmp_path: Path, options: dict[str, Any]) -> None:
    as_good(tmp_path, DEMO, MLP, 22, **options)


@pytest.mark.parametrize("bits", K_GRIDS)
def test_k_grids(tmp_path: Path, bits: int) -> None:
    source = k_model(tmp_path / "source")
    options = {"format": "gguf", "grid": "k", "bits": bits, "group_size": "auto"}
    as_good(tmp_path, source, MLP, 22, **options)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "salient"])
def test_methods(tmp_path: Path, method: str) -> None:
    as_good(tmp_path, DEMO, MLP, 22, method=method, calibration=IDS)


def test_statistics_and_activations_are_those_of_the_model_as_it_was(tmp_path: Path) -> None:
    small = scaled(DEMO, tmp_path / "small", MLP, 22)
    for name, model in (("usual", DEMO), ("small", small)):
        quantizes = quantized if name == "usual" else quantized_small
        statistics, activations = tmp_path / f"{name}-statistics", tmp_path / f"{name}.npz"
        bitwright.collect_statistics(model, statistics, IDS, progress=False)
        bitwright.collect_activations(model, activations, IDS)
        for method, options in (
            ("gptq", {"statistics": statistics}),
            ("awq", {"statistics": statistics}),
            ("gptq", {"activations": activations}),
        ):
            out = tmp_path / f"{name}-{method}-{next(iter(options))}"
            quantizes(model, out, method=method, preset="fast", **options)
    for kind in ("gptq-statistics", "awq-statistics", "gptq-activations"):
        usual = kl(tmp_path / f"usual-{kind}", DEMO)
        assert kl(tmp_path / f"small-{kind}", small) == pytest.approx(usual, rel=0.05)


@pytest.mark.parametrize("family", ["llama-linear", "smollm3"])
def test_sources_of_other_families(tmp_path: Path, family: str) -> None:
    as_good(tmp_path, TINY / family, UP, 14)


def test_sources_in_float16(tmp_path: Path) -> None:
    """Small weights have few bits in the source itself, and norms room for few powers."""
    small = scaled(TINY / "qwen2", tmp_path / "small", MLP, 14)
    report = quantized_small(small, tmp_path / "out")
    quantized(small, tmp_path / "float32", format="compressed-tensors", scale_dtype="float32")
    assert kl(tmp_path / "out", small) == pytest.approx(kl(tmp_path / "float32", small), rel=0.02)
    powers = {layer.name.rpartition(".")[2]: layer.power for layer in report.layers}
    assert powers["up_proj"] == powers["gate_proj"] > 4
    assert powers["q_proj"] == powers["down_proj"] == 0


def test_layer_norms_with_biases(tmp_path: Path) -> None:
    powers = {"(q|k|v)_proj.weight": -1, r"input_layernorm.(weight|bias)": 1}
    source = scaled(TINY / "starcoder2", tmp_path / "wide", {}, dtype=np.float32)
    as_good(tmp_path, source, powers, 24)


def test_experts_and_their_router(tmp_path: Path) -> None:
    powers = {
        "(gate|up)_proj.weight": -1,
        "mlp.gate.weight": -1,
        "post_attention_layernorm.weight": 1,
    }
    as_good(tmp_path, TINY / "qwen3_moe", powers, 22, method="gptq", calibration=IDS)


def test_latents(tmp_path: Path) -> None:
    powers = {"kv_b_proj.weight": -1, "kv_a_layernorm.weight": 1}
    options = {
        "format": "compressed-tensors",
        "scale_dtype": "float16",
        "include": ["*kv_b_proj"],
    }
    as_good(tmp_path, TINY / "deepseek_v3", powers, 22, **options)


def test_norms_are_divided_by_powers_of_two_and_nothing_else_changes(tmp_path: Path) -> None:
    small = scaled(DEMO, tmp_path / "small", MLP, 22)
    report = quantized_small(small, tmp_path / "out")
    before, after = (load_file(each / "model.safetensors") for each in (small, tmp_path / "out"))
    powers = {layer.name: layer.power for layer in report.layers}
    for name, array in after.items():
        if name not in before:
            continue
        reader = name.replace("post_attention_layernorm.weight", "mlp.up_proj")
        power = powers[reader] if reader != name else 0
        assert array.dtype == before[name].dtype
        wide = array.astype(np.float32)
        np.testing.assert_array_equal(np.ldexp(wide, power), before[name].astype(np.float32))
    moved = {name.rpartition(".")[2] for name, power in powers.items() if power}
    assert moved == {"gate_proj", "up_proj"}


def test_usual_models_stay_as_they_are(tmp_path: Path) -> None:
    for bits in (2, 8):
        report = quantized(DEMO, tmp_path / f"{bits}", bits=bits)
        assert report.warnings == ()
        assert all(layer.power == 0 and not layer.coarse for layer in report.layers)


def test_a_tiny_group_in_a_usual_layer(tmp_path: Path) -> None:
    """Nothing is moved for it, and it keeps what subnormal scales can say."""
    small = scaled(DEMO, tmp_path / "small", {})
    tensors = load_file(small / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][3, :32] = np.ldexp(
        tensors[f"{name}.weight"][3, :32].astype(np.float32), -15
    )
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    report = quantized(small, tmp_path / "out")
    assert report.warnings == ()
    tensor = bitwright.load_model(tmp_path / "out").quantized(name)
    assert tensor is not None
    kept = tensor.dequantize()[3:4, :32]
    wanted = tensors[f"{name}.weight"][3:4, :32].astype(np.float32)
    assert relative_error(wanted, kept, None) < 0.05


# what cannot be helped


def test_layers_that_cannot_be_helped_are_refused(tmp_path: Path) -> None:
    small = scaled(TINY / "gemma2", tmp_path / "small", {"gate_proj.weight": -40})
    for options in ({}, {"method": "gptq", "calibration": IDS}):
        with pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.gate_proj: .*float16.* lose"
        ) as caught:
            quantized(small, tmp_path / "out", **options)
        assert "compressed-tensors" in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--scale-dtype float32"):
        quantized(small, tmp_path / "out", format="mlx", scale_dtype="float16")
    quantized(small, tmp_path / "float32", format="mlx", scale_dtype="float32")


@pytest.mark.parametrize("name", ["o_proj", "down_proj"])
def test_layers_with_nothing_before_them_that_could_be_divided(tmp_path: Path, name: str) -> None:
    small = scaled(TINY / "granite", tmp_path / "small", {f"{name}.weight": -60})
    with pytest.raises(ValueError, match=f"{name}: its weights, .* at most, .*lose 100%"):
        quantized(small, tmp_path / "out")


def test_embeddings_are_refused(tmp_path: Path) -> None:
    small = scaled(DEMO, tmp_path / "small", {"embed_tokens.weight": -40})
    options = {"format": "gguf", "grid": "symmetric", "embedding_bits": 4}
    with pytest.raises(ValueError, match=r"embed_tokens: .*float16 scales lose"):
        quantized(small, tmp_path / "out", **options)


def test_heads_are_multiplied(tmp_path: Path) -> None:
    powers = {"lm_head.weight": -1, "model.norm.weight": 1}
    options = {"format": "mlx", "scale_dtype": "float16", "head_bits": 4}
    as_good(tmp_path, TINY / "llama-linear", powers, 27, **options)


def test_conversion_refuses_what_rounding_would_empty(tmp_path: Path) -> None:
    small = scaled(DEMO, tmp_path / "small", MLP, 40)
    quantized(small, tmp_path / "mlx", format="mlx", scale_dtype="float32")
    with pytest.raises(ValueError, match=r"gate_proj: its weights, .*float16 scales lose"):
        bitwright.convert(
            tmp_path / "mlx", tmp_path / "out", "gptq", allow_requantize=True, progress=False
        )
    assert not (tmp_path / "out").exists()


# MLX's floor


def test_below_mlx_floor_smaller_scales_are_used_and_counted(tmp_path: Path) -> None:
    usual = quantized(DEMO, tmp_path / "usual", format="mlx")
    assert all(layer.below_floor == 0 for layer in usual.layers)
    small = scaled(DEMO, tmp_path / "small", MLP, 40)
    report = quantized(small, tmp_path / "out", format="mlx")
    for layer in report.layers:
        assert (layer.below_floor > 0) == layer.name.endswith(("gate_proj", "up_proj"))
    assert kl(tmp_path / "out", small) == pytest.approx(kl(tmp_path / "usual", DEMO), rel=0.01)


def test_groups_that_keep_half_of_their_energy_stay_mlx_s() -> None:
    """A group that is all but constant, whose range is below the floor, but not its weights."""
    weight = np.float32(0.5) + np.ldexp(np.arange(64, dtype=np.float32), -26)[None]
    tensor = bitwright.quantize_rtn(weight, 4, 64)
    assert abs(float(tensor.scales[0, 0])) == pytest.approx(1e-7, rel=0.1)
    assert groups_below_floor(tensor) <= 1
    small = np.ldexp(weight - np.float32(0.5), -10)
    tensor = bitwright.quantize_rtn(small, 4, 64)
    assert relative_error(small, tensor.dequantize(), None) < 0.02
    assert groups_below_floor(tensor) == 1


# grids


@settings(deadline=None, max_examples=60)
@given(
    grid=st.sampled_from(GRIDS),
    bits=st.sampled_from([2, 3, 4, 8]),
    scale_dtype=st.sampled_from(list(DTYPES)),
    steps=st.floats(1, 100),
    search=st.booleans(),
    seed=st.integers(0, 100),
)
@example("affine", 8, "bfloat16", 1.5, False, 0)
@example("affine", 8, "bfloat16", 3.5, True, 1)
@example("affine", 8, "bfloat16", 7.5, False, 2)
@example("affine", 4, "float32", 2.5, True, 3)
def test_scales_of_a_few_smallest_numbers(
    grid: Grid, bits: int, scale_dtype: str, steps: float, search: bool, seed: int
) -> None:
    """The scale is at worst the next multiple, in which the range fits: the error is of its size."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-1, 1, (4, 64))
    weight[:, 0], weight[:, 1] = -1, 1
    exact = steps * SMALLEST[scale_dtype]
    weight = (weight * exact * (2**bits - 1) / 2).astype(np.float32)
    tensor = bitwright.quantize_rtn(
        weight, bits, 64, grid=grid, scale_dtype=DTYPES[scale_dtype], grid_search=search
    )
    assert (tensor.scales != 0).all()
    change = (tensor.dequantize().astype(np.float64) - weight) / exact
    largest = np.sqrt(np.square(change).mean(axis=1)).max()
    if grid == "affine" and not search and exact < 1e-7:  # MLX's, or what is better than that
        energy = np.square(weight.astype(np.float64) / exact).mean(axis=1)
        assert (np.square(change).mean(axis=1) <= 0.5 * energy).all()
    else:
        assert largest <= 0.8 * (1 + 1 / steps)


@pytest.mark.parametrize("bits", K_GRIDS)
@pytest.mark.parametrize("steps", [1.1, 3, 20])
def test_superblocks_of_a_few_smallest_numbers(bits: int, steps: float) -> None:
    kind = K_GRIDS[bits]
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 1, (4, 256 // kind.group_size)).astype(np.float32)
    scales *= np.float32(steps * 2.0**-24 * kind.scale_codes[1])
    offsets = np.zeros_like(scales)
    if kind.grid == "affine":
        offsets = -scales * np.float32(2**bits // 2)
    blocks = fit_superblocks(scales, offsets, np.ones(256, np.float32), bits)
    found, biases = expanded(blocks, bits)
    np.testing.assert_allclose(found, scales, rtol=0.1)
    if kind.grid == "affine":
        np.testing.assert_allclose(biases, offsets, rtol=0.15)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [100, 400])
def test_refinement_moves_subnormal_scales(grid: Grid, steps: int) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((256, 64), dtype=np.float32) @ rng.random((64, 64), np.float32)
    weight = rng.standard_normal((16, 64), dtype=np.float32)
    weight *= np.float32(steps * 2.0**-24 * 7 / 3)
    start = bitwright.quantize_rtn(weight, 4, 32, grid=grid, scale_dtype=np.float16)
    found, errors = bitwright.refine(start, weight, bitwright.gram(inputs))
    assert errors[-1] < 0.8 * errors[0]
    assert (found.scales != start.scales).any()
    assert (found.scales != 0).all()


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_scales_are_not_rounded_to_zero(dtype: Any) -> None:
    least = smallest_scale(dtype)
    assert float(np.array(least, np.float64).astype(dtype)) == least
    if dtype != np.float32:
        scales = np.array([0, least / 4, -least / 4, 1.2 * least, 3], np.float32)
        wanted = [0, least, -least, least, 3]
        assert rounded_scales(scales, np.dtype(dtype)).astype(np.float64).tolist() == wanted


def test_what_is_exact() -> None:
    ones = np.array([1, 1.5, 3e-5], np.float32)
    half, brain = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
    assert moves_exactly(ones[:2], -14, half)
    assert not moves_exactly(ones[:2], -24, half)  # 1.5 is between two subnormal numbers then
    assert not moves_exactly(ones[:2], 16, half)  # infinite
    assert not moves_exactly(np.ldexp(ones[:2], -126), -23, np.dtype(np.float32))
    assert gain_is_exact("rms_norm", ones[:2], 20, brain)
    assert gain_is_exact("offset_rms_norm", ones[:2] - 1, 1, brain)
    assert not gain_is_exact("offset_rms_norm", ones[:2] - 1, 12, brain)


def test_single_layers_are_lifted_by_the_scale_of_their_outputs() -> None:
    rng = np.random.default_rng(0)
    weights, inputs = rng.standard_normal((64, 16)), rng.standard_normal((128, 64))
    errors = []
    for power in (0, -18, -24):
        small = np.ldexp(weights, power).astype(np.float32)
        result = bitwright.awq_quantize(small, inputs, group_size=32)
        restored = bitwright.awq_dequantize(
            result.Q, result.scales, result.zeros, result.q_scale, result.meta
        )
        errors.append(relative_error(small, restored, None))
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=0.15)
    with pytest.raises(ValueError, match="weights: .* float16 scales lose"):
        bitwright.awq_quantize(np.ldexp(weights, -50), inputs, group_size=32)


# the models of the project's own measurements


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("format", ["gptq", "awq", "gguf"])
@pytest.mark.parametrize("times", [13, 17, 27])
def test_story(tmp_path: Path, format: Any, times: int) -> None:
    source = SHARED / "models" / "story"
    small = scaled(source, tmp_path / "small", MLP, times)
    text, found = SHARED / "text", []
    for name, model in (("usual", source), ("small", small)):
        options = {"format": format, "group_size": "auto" if format == "gguf" else 32}
        quantizes = quantized_small if name == "small" and times > 13 else quantized
        quantizes(
            model,
            tmp_path / f"out-{name}",
            method="gptq",
            calibration=text / "story_calibration.npy",
            samples=8,
            **options,
        )
        found.append(
            bitwright.evaluate(
                tmp_path / f"out-{name}", text / "story_eval.npy", samples=8, reference=model
            ).kl_divergence
        )
    assert found[1] == pytest.approx(found[0], rel=0.15)
