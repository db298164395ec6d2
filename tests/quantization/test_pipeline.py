"""The main job on the demo model: what is written, what is reported, what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from demo_runs import DEMO, EVALUATION, TEXT, copy_of_demo, divergence, run
from safetensors.numpy import load_file
from shared_data import SHARED, TESTS, needs_shared

import bitwright


@pytest.mark.parametrize(
    ("format", "grid"), [("mlx", None), ("gptq", None), ("gptq", "zero_point")]
)
def test_gptq_beats_rounding_at_equal_size(tmp_path: Path, format: str, grid: str | None) -> None:
    gptq = run(tmp_path / "gptq", format=format, grid=grid)
    rtn = run(tmp_path / "rtn", format=format, grid=grid, method="rtn")
    assert gptq.size_bytes == rtn.size_bytes
    assert divergence(tmp_path / "gptq") < 0.7 * divergence(tmp_path / "rtn")
    assert all(layer.error < 0.2 for layer in gptq.layers)
    assert len(gptq.layers) == 7 * 3
    assert gptq.calibration_tokens == 12 * 128


def test_saved_weights_are_those_that_were_measured(tmp_path: Path) -> None:
    """The report's errors come from memory; the same figure from the files must be equal to the bit."""
    report = run(tmp_path / "out", method="rtn", calibration=None, samples=None, length=None)
    original, saved = bitwright.load_model(DEMO), bitwright.load_model(tmp_path / "out")
    shapes = original.linear_shapes()
    for layer in report.layers:
        weight, stored = (m.weight(layer.name, shapes[layer.name]) for m in (original, saved))
        step = -(-len(weight) // 64)
        change = (stored - weight)[::step]
        error = float(np.vdot(change, change)) / float(np.vdot(weight[::step], weight[::step]))
        assert layer.error == pytest.approx(error, rel=1e-6)
        direct = bitwright.quantize_rtn(weight, 3, 64, scale_dtype=ml_dtypes.bfloat16)
        assert (direct.dequantize() == stored).all()


def test_same_inputs_give_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        run(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).digest())
    run(tmp_path / "c", seed=1)
    digests.add(hashlib.sha256((tmp_path / "c" / "model.safetensors").read_bytes()).digest())
    assert len(digests) == 2


def test_what_is_not_quantized_is_carried_over(tmp_path: Path) -> None:
    run(tmp_path / "out", exclude=["*.down_proj"], include=["model.layers.[01].*"])
    before = load_file(DEMO / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    quantized = {name.removesuffix(".scales") for name in after if name.endswith(".scales")}
    assert len(quantized) == 2 * 6
    for name, array in before.items():
        if name.removesuffix(".weight") not in quantized:
            assert array.tobytes() == after[name].tobytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (DEMO / name).read_bytes()


def test_overrides_embedding_and_head(tmp_path: Path) -> None:
    report = run(
        tmp_path / "out",
        bits=4,
        overrides={"*.down_proj": {"bits": 6, "group_size": 32}, "*.1.mlp.down_proj": {"bits": 8}},
        embedding_bits=8,
    )
    bits = {layer.name: (layer.bits, layer.group_size) for layer in report.layers}
    assert bits["model.layers.0.mlp.down_proj"] == (6, 32)
    assert bits["model.layers.1.mlp.down_proj"] == (8, 64)
    assert bits["model.layers.1.mlp.up_proj"] == (4, 64)
    assert bits["model.embed_tokens"] == (8, 64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert config["bits"] == 4
    assert config["model.embed_tokens"] == {"group_size": 64, "bits": 8}
    assert divergence(tmp_path / "out") < 0.1


def test_untied_head_is_quantized(tmp_path: Path) -> None:
    tiny = TESTS / "data" / "tiny" / "llama-llama3"
    tokens = np.load(tiny / "expected.npz")["input_ids"]
    report = run(
        tmp_path / "out",
        tiny,
        calibration=tokens,
        samples=None,
        length=None,
        group_size=32,
        head_bits=6,
    )
    assert report.layers[-1].name == "lm_head"
    assert bitwright.load_model(tmp_path / "out").quantized("lm_head") is not None
    with pytest.raises(ValueError, match="head_bits"):
        run(tmp_path / "tied", head_bits=6)


def test_propagation_of_the_original_differs(tmp_path: Path) -> None:
    first = run(tmp_path / "a", preset="fast")
    second = run(tmp_path / "b", propagate="original", preset="fast")
    assert first.layers[0].error == second.layers[0].error
    assert first.layers[-1].error != second.layers[-1].error


def test_calibration_sources_agree(tmp_path: Path) -> None:
    tokens = bitwright.load_tokens(TEXT, tokenizer=DEMO, length=128)
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT.read_text()}) + "\n")
    digests = set()
    for index, source in enumerate(
        (TEXT, tokens, tmp_path / "tokens.npy", tmp_path / "text.jsonl", [TEXT.read_text()])
    ):
        run(tmp_path / str(index), calibration=source)
        digests.add((tmp_path / str(index) / "model.safetensors").read_bytes())
    assert len(digests) == 1


@needs_shared
def test_story_comes_out_under_the_usual_name(tmp_path: Path) -> None:
    run(
        tmp_path / "out",
        SHARED / "models" / "story",
        calibration=SHARED / "text" / "story_calibration.npy",
        length=256,
    )
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@needs_shared
@pytest.mark.slow
def test_small_reaches_the_prototype(tmp_path: Path) -> None:
    """shared/QUALITY.md: GPTQ with act-order gives 0.0180 there."""
    model = SHARED / "models" / "small"
    run(
        tmp_path / "out",
        model,
        calibration=SHARED / "text" / "small_calibration.npy",
        samples=None,
        length=None,
        preset="fast",
    )
    result = bitwright.evaluate(
        tmp_path / "out", SHARED / "text" / "small_eval.npy", reference=model
    )
    assert result.kl_divergence is not None
    assert result.kl_divergence < 0.0180


def nan_in(name: str) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = load_file(DEMO / "model.safetensors")[name].copy()
    array.reshape(-1)[5] = np.nan
    return array


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({UP: nan_in(UP)}, {}, [UP, "NaN"]),
        ({UP: nan_in(UP)}, {"method": "rtn", "calibration": None}, [UP, "NaN"]),
        ({NORM: nan_in(NORM)}, {"method": "rtn", "calibration": None}, [NORM]),
        (
            {NORM: np.full(64, 3e38, ml_dtypes.bfloat16)},
            {},
            ["model.layers.1.mlp", "block 1", "infinite"],
        ),
        ({"model_type": "gpt2"}, {}, ["model_type", "gpt2", "llama"]),
        ({"hidden_size": 128}, {}, ["128"]),
        ({}, {"group_size": 48}, ["group", "48"]),
        ({}, {"group_size": 128}, ["group", "128"]),
        ({}, {"bits": 7}, ["bits", "7"]),
        ({}, {"bits": 5, "format": "gptq"}, ["gptq", "5"]),
        ({}, {"grid": "symmetric"}, ["mlx", "symmetric"]),
        ({}, {"format": "gptq", "embedding_bits": 4}, ["embedding_bits"]),
        ({}, {"scale_dtype": "float64"}, ["scale_dtype"]),
        ({}, {"method": "magic"}, ["method", "magic"]),
        ({}, {"samples": 100000}, ["100000"]),
        ({}, {"calibration": ["too short"], "samples": None}, ["too few"]),
        ({}, {"exclude": ["*.dawn_proj"]}, ["dawn_proj"]),
        ({}, {"exclude": ["*"]}, ["no layer"]),
        ({}, {"overrides": {"*": {"bots": 3}}}, ["bots"]),
        ({}, {"damping": -1.0}, ["damping"]),
        ({}, {"block_size": 0}, ["block_size"]),
        ({}, {"calibration": np.full((4, 128), 512), "samples": None}, ["512"]),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], words: list[str]
) -> None:
    model = copy_of_demo(tmp_path / "model", **changes)
    with pytest.raises((ValueError, TypeError)) as caught:
        run(tmp_path / "out", model, **options)
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_quantized_source_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "out", method="rtn")
    with pytest.raises(ValueError, match="quantized already"):
        run(tmp_path / "again", tmp_path / "out")


def test_existing_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    run(tmp_path / "out", method="rtn")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(bitwright.OutputExistsError):
        run(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    run(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    with pytest.raises(bitwright.OutputError, match="overlaps"):
        run(DEMO / "out")


def test_float16_scales_that_overflow_are_refused(tmp_path: Path) -> None:
    weight = load_file(DEMO / "model.safetensors")[UP].astype(np.float32) * 1e6
    model = copy_of_demo(tmp_path / "model", **{UP: weight.astype(ml_dtypes.bfloat16)})
    with pytest.raises(ValueError, match="float16") as caught:
        run(tmp_path / "out", model, format="gptq", method="rtn", calibration=None)
    assert UP.removesuffix(".weight") in str(caught.value)


def test_evaluation_of_a_model_against_itself() -> None:
    result = bitwright.evaluate(DEMO, EVALUATION, reference=DEMO, length=64, samples=8)
    assert result.kl_divergence == 0.0
    assert result.top1_agreement == 1.0
    assert result.bits_per_weight == pytest.approx(16.0)
    assert result.tokens == 8 * 64
    assert result.tokens_per_second > 0


def test_perplexity_and_divergence_equal_numpy(tmp_path: Path) -> None:
    run(tmp_path / "out", method="rtn", calibration=None, samples=None, length=None)
    ids = bitwright.load_tokens(EVALUATION, tokenizer=DEMO, length=40, samples=3)
    result = bitwright.evaluate(tmp_path / "out", ids, reference=DEMO)

    def log_probabilities(folder: Path) -> np.ndarray[Any, Any]:
        logits = bitwright.load_model(folder).logits(ids).astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        normal: np.ndarray[Any, Any] = np.log(np.exp(shifted).sum(-1, keepdims=True))
        return shifted - normal

    p, q = log_probabilities(DEMO), log_probabilities(tmp_path / "out")
    loss = -np.take_along_axis(q[:, :-1], ids[:, 1:, None], -1).mean()
    assert result.perplexity == pytest.approx(np.exp(loss), rel=1e-6)
    assert result.kl_divergence == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert result.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()


def test_evaluate_names_different_vocabularies() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        bitwright.evaluate(DEMO, EVALUATION, reference=TESTS / "data" / "tiny" / "llama-yarn")
