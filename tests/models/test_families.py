"""Every family: hidden states and logits against transformers, folding, quantizing, reading back."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared_data import ARCH, OWN, SHARED, TESTS, TINY

import bitwright
from bitwright.blocks.scaling import AwqOptions, ScaledBlock, observe_block
from bitwright.formats.gptq import GptqFormat
from bitwright.formats.mlx import MlxFormat
from bitwright.models import ARCHITECTURES
from bitwright.models.block import ChunkStates
from bitwright.models.config import ExpertsConfig
from bitwright.models.layout import block_layout
from bitwright.models.routing import route
from bitwright.runs.states import ChunkPlan, States

pytestmark = pytest.mark.usefixtures("all_processors")

FOLDERS = [*TINY, *ARCH]
by_own_folder = pytest.mark.parametrize(
    "folder", [*OWN, *ARCH], ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
by_folder = pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
MOE = TESTS / "data" / "tiny" / "qwen3_moe"


def expected_of(folder: Path) -> Any:
    """transformers' hidden states and logits, in float32."""
    exact = folder / "expected_float32.npz"
    return np.load(exact if exact.exists() else folder / "expected.npz")


@by_folder
def test_states_and_logits_equal_transformers(folder: Path) -> None:
    expected = expected_of(folder)
    model = bitwright.load_model(folder)
    for index, hidden in enumerate(model.hidden_states(expected["input_ids"])):
        if f"hidden_{index}" in expected:
            assert np.abs(hidden - expected[f"hidden_{index}"]).max() < 5e-4
    assert np.abs(model.logits(expected["input_ids"]) - expected["logits"]).max() < 5e-4


@by_folder
def test_every_scale_group_folds(folder: Path) -> None:
    """With any scales in every declared group the float model's logits stay what they are."""
    model = bitwright.load_model(folder)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (2, 40)).astype(np.int32)
    expected = model.logits(ids)
    hidden = model.embed(ids)
    rotation = model.rotation(40)
    for index in range(model.config.num_hidden_layers):
        block = model.block(index)
        states = States(ChunkPlan(80, 80, 0, (0,)), iter([hidden.copy()]))
        facts = observe_block(block, states, rotation, AwqOptions())
        linears = block.layout.linears
        choices = {
            name: bitwright.GridChoice.check(block.weights[f"{name}.weight"], 4, None)
            for name in linears
        }
        scaled = ScaledBlock(
            block, facts, choices, lambda _: np.dtype(np.float32), rotation, AwqOptions()
        )
        assert block.layout.groups
        for group in block.layout.groups:
            before = scaled.block.weights[f"{group.layers[0]}.weight"].copy()
            outputs = len(block.weights[f"{group.previous}.weight"])
            if group.outputs is not None:
                outputs = len(group.outputs)
            scaled.fold(group, np.exp(rng.standard_normal(outputs) / 2).astype(np.float32))
            assert (scaled.block.weights[f"{group.layers[0]}.weight"] != before).any()
        scaled.block.forward(hidden, rotation)
    logits = model.head_logits(model.final_norm(hidden), model.rows(model.head_name)).reshape(
        expected.shape
    )
    assert np.abs(logits - expected).max() < 1e-4 * max(1.0, float(np.abs(expected).max()))


def test_samples_beyond_what_an_indexer_chooses_are_refused() -> None:
    model = bitwright.load_model(TESTS / "data" / "tiny" / "deepseek_v32")
    ids = np.zeros((1, 65), np.int32)
    assert np.isfinite(model.logits(ids[:, :64])).all()
    with pytest.raises(bitwright.CheckpointError, match="65 tokens.*64 .*index_topk.*shorter"):
        model.logits(ids)


def calibration(model: bitwright.Model, samples: int = 24) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (samples, 64))


@by_own_folder
@pytest.mark.slow
def test_gptq_is_closer_than_rounding_and_reads_back(folder: Path, tmp_path: Path) -> None:
    original = bitwright.load_model(folder)
    ids = np.load(folder / "expected.npz")["input_ids"]
    expected = original.logits(ids)
    errors = {}
    for method in ("rtn", "gptq"):
        report = bitwright.quantize(
            folder,
            tmp_path / method,
            method=method,
            group_size=32,
            calibration=calibration(original, 64),
            float_embeddings=True,
            progress=False,
            exclude=odd_linears(original),
        )
        quantized = bitwright.load_model(tmp_path / method)
        errors[method] = float(np.square(quantized.logits(ids) - expected).mean())
        assert {layer.name for layer in report.layers} == {
            name for name in original.linear_shapes() if quantized.quantized(name) is not None
        }
    assert errors["gptq"] < errors["rtn"]


def odd_linears(model: bitwright.Model) -> list[str]:
    """The linears that do not fit groups of 32 or the words of GPTQ, of the smallest models."""
    return [name for name, shape in model.linear_shapes().items() if any(n % 32 for n in shape)]


@by_own_folder
@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_awq_runs_and_reads_back(folder: Path, method: Any, tmp_path: Path) -> None:
    original = bitwright.load_model(folder)
    report = bitwright.quantize(
        folder,
        tmp_path / "out",
        method=method,
        group_size=32,
        calibration=calibration(original),
        float_embeddings=True,
        progress=False,
        exclude=odd_linears(original),
    )
    assert len(report.blocks) == original.config.num_hidden_layers
    quantized = bitwright.load_model(tmp_path / "out")
    ids = np.load(folder / "expected.npz")["input_ids"]
    change = quantized.logits(ids) - original.logits(ids)
    assert np.square(change).mean() < 0.3 * original.logits(ids).var()


@by_folder
@pytest.mark.parametrize("format", ["mlx", "gptq"])
def test_saved_weights_are_the_rounded_ones(folder: Path, format: Any, tmp_path: Path) -> None:
    original = bitwright.load_model(folder)
    kind = MlxFormat if format == "mlx" else GptqFormat
    exclude = odd_linears(original) + [
        name
        for name in original.linear_shapes()
        if kind.keeps_in_float(original.config.model_type, name)
    ]
    bitwright.quantize(
        folder,
        tmp_path / "out",
        method="rtn",
        group_size=32,
        format=format,
        float_embeddings=True,
        progress=False,
        exclude=exclude,
        allow_unfused=True,
    )
    saved = bitwright.load_model(tmp_path / "out")
    assert replace(saved.config, raw={}) == replace(original.config, raw={})
    for name, shape in original.linear_shapes().items():
        stored = saved.quantized(name)
        if name in exclude:
            assert stored is None
            assert (saved.weight(name, shape) == original.weight(name, shape)).all()
            continue
        assert stored is not None
        grid: Any = "affine" if format == "mlx" else "symmetric"
        half = format != "mlx" or original.dtype == np.float32
        dtype = np.float16 if half else original.dtype
        again = bitwright.quantize_rtn(
            original.weight(name, shape), 4, 32, grid=grid, scale_dtype=dtype
        )
        assert (again.dequantize() == stored.dequantize()).all()
    stacks = original.stacked_tensors()
    for name in original.checkpoint.names():
        if name not in stacks and name.removesuffix(".weight") not in original.linear_shapes():
            before, after = original.checkpoint.read(name), saved.checkpoint.read(name)
            written = kind.array_written(name, before, original.config.family)
            if written is before or before.ndim > 1:
                assert before.tobytes() == after.tobytes()
            else:  # what is read is what was written, in other words
                assert (after == written.astype(np.float32) - 1).all()


# --- mixtures of experts


def stacked_copy(folder: Path, layout: str) -> Path:
    """The tiny mixture of experts with its experts in one tensor per layer: transformers' or MLX's."""
    shutil.copytree(MOE, folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.mlp.experts"
    parts = {
        role: np.stack([tensors.pop(f"{prefix}.{e}.{role}_proj.weight") for e in range(4)])
        for role in ("gate", "up", "down")
    }
    if layout == "mlx":
        for role, array in parts.items():
            tensors[f"model.layers.1.mlp.switch_mlp.{role}_proj.weight"] = array
    else:
        tensors[f"{prefix}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        tensors[f"{prefix}.down_proj"] = parts["down"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["transformers", "mlx"])
def test_stacked_experts_are_read_and_written(layout: str, tmp_path: Path) -> None:
    stacked = bitwright.load_model(stacked_copy(tmp_path / "model", layout))
    single = bitwright.load_model(MOE)
    ids = np.load(MOE / "expected.npz")["input_ids"]
    assert (stacked.logits(ids) == single.logits(ids)).all()
    settings: Any = {
        "method": "gptq",
        "group_size": 32,
        "calibration": calibration(single),
        "progress": False,
    }
    for format in ("mlx", "gptq"):
        for model, name in ((tmp_path / "model", "a"), (MOE, "b")):
            bitwright.quantize(model, tmp_path / format / name, format=format, **settings)
        a, b = (load_file(tmp_path / format / name / "model.safetensors") for name in "ab")
        assert a.keys() == b.keys()
        assert all((a[name] == b[name]).all() for name in a)
        experts = [name for name in a if "expert" in name or "switch" in name]
        if format == "mlx":
            assert len(experts) == 3 * 3
            assert a["model.layers.1.mlp.switch_mlp.up_proj.scales"].shape == (4, 32, 2)
        else:
            assert len(experts) == 4 * 3 * 4


def test_experts_left_in_float_are_written_one_by_one(tmp_path: Path) -> None:
    model = stacked_copy(tmp_path / "model", "transformers")
    bitwright.quantize(
        model,
        tmp_path / "out",
        method="rtn",
        group_size=32,
        format="gptq",
        exclude=["*.experts.2.*"],
        allow_unfused=True,
        progress=False,
    )
    saved = bitwright.load_model(tmp_path / "out")
    name = "model.layers.1.mlp.experts.2.up_proj"
    assert saved.quantized(name) is None
    assert (saved.weight(name, (32, 64)) == bitwright.load_model(MOE).weight(name, (32, 64))).all()
    with pytest.raises(ValueError, match=r"experts\.2.*all experts of a layer in one tensor"):
        bitwright.quantize(
            model,
            tmp_path / "mlx",
            method="rtn",
            group_size=32,
            exclude=["*.experts.2.*"],
            progress=False,
        )
    assert not (tmp_path / "mlx").exists()


def test_an_experts_gram_is_that_of_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors that a run reports are those over the tokens that each expert received; experts with too
    few are judged and quantized by all tokens, and named."""
    model = bitwright.load_model(MOE)
    tokens = calibration(model, 8)
    hidden = model.embed(tokens.astype(np.int32))
    rotation = model.rotation(64)
    model.block(0).forward(hidden, rotation)
    block, chunk = model.block(1), ChunkStates(hidden)
    seen: dict[str, tuple[Any, Any]] = {}
    for stage in block.stages:
        states = block.stage_input(stage, chunk)
        if stage.expert is not None:
            every = block.as_if_routed(stage, chunk)
            for name in stage.linears:
                seen[name] = states, every
        block.advance(stage, states, chunk, rotation)
    counts = [len(seen[f"mlp.experts.{e}.up_proj"][0]) for e in range(4)]
    assert sum(counts) == 2 * len(hidden)
    few = sorted(counts)[1] + 1  # two experts have fewer
    monkeypatch.setattr(bitwright.quantization.live, "FEW_TOKENS", few)
    report = bitwright.quantize(
        MOE,
        tmp_path / "out",
        method="rtn",
        group_size=32,
        calibration=tokens,
        propagate="original",
        progress=False,
    )
    saved = bitwright.load_model(tmp_path / "out")
    found = {layer.name: layer for layer in report.layers}
    poor = set()
    for name, (routed, every) in seen.items():
        full = f"model.layers.1.{name}"
        inputs = every if len(routed) < few else routed
        if len(routed) < few:
            poor.add(full)
        shape = model.linear_shapes()[full]
        weight = model.weight(full, shape)
        change = saved.weight(full, shape) - weight
        error = np.square(inputs @ change.T).sum() / np.square(inputs @ weight.T).sum()
        assert found[full].error == pytest.approx(error, rel=1e-3)
    assert set(report.experts_with_few_tokens()) == poor
    assert len(poor) == 2 * 3


def test_awq_gathers_what_experts_see_from_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the last block, where only some tokens are needed to judge the scales."""
    tokens = calibration(bitwright.load_model(MOE), 40)
    monkeypatch.setattr(bitwright.quantization.live, "FEW_TOKENS", 400)
    settings: Any = {"group_size": 32, "calibration": tokens, "progress": False}
    for method in ("gptq", "awq"):
        report = bitwright.quantize(MOE, tmp_path / method, method=method, **settings)
        assert not report.experts_with_few_tokens()


def test_experts_without_tokens_are_quantized(tmp_path: Path) -> None:
    """One calibration token leaves two of four experts without any."""
    report = bitwright.quantize(
        MOE,
        tmp_path / "out",
        method="awq+gptq",
        group_size=32,
        calibration=np.array([[5]]),
        progress=False,
    )
    assert len(report.experts_with_few_tokens()) == 4 * 3
    assert np.isfinite(bitwright.load_model(tmp_path / "out").logits([[5, 6]])).all()


@pytest.mark.parametrize("score", ["max", "top2"])
def test_routes_by_groups(score: Any) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 12)).astype(np.float32)
    correction = rng.standard_normal(12).astype(np.float32)
    config = ExpertsConfig(12, 3, 8, 0, "sigmoid", True, 1.5, 4, 2, score)
    routes = route(logits, config, correction)
    weights = np.zeros(logits.shape)
    for expert, (rows, values) in enumerate(zip(routes.rows, routes.weights, strict=True)):
        weights[rows, expert] = values
    for row in range(50):
        scores = 1 / (1 + np.exp(-logits[row].astype(np.float64)))
        ranked = scores + correction
        best = [
            np.sort(group)[-(1 if score == "max" else 2) :].sum() for group in ranked.reshape(4, 3)
        ]
        groups = set(np.argsort(best)[-2:])
        chosen = sorted(
            (expert for expert in range(12) if expert // 3 in groups), key=lambda e: -ranked[e]
        )[:3]
        expected = np.zeros(12)
        expected[chosen] = 1.5 * scores[chosen] / scores[chosen].sum()
        np.testing.assert_allclose(weights[row], expected, atol=1e-6)


# --- what is refused


def changed_copy(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (
            "llama-yarn",
            {"model_type": "mamba"},
            "'mamba'.*supported are: .*deepseek_v2.*starcoder2",
        ),
        ("llama-yarn", {"model_type": "qwen3_omni"}, "supported are:.*nearest.* is qwen3"),
        (
            "qwen3_vl",
            {"text_config": {"model_type": "qwen4"}},
            "text_config.model_type.*qwen3_vl_text",
        ),
        (
            "llama-yarn",
            {"hidden_act": "swish7"},
            "'swish7'.*supported are: silu, gelu_pytorch_tanh",
        ),
        ("llama-yarn", {"rope_parameters": {"rope_type": "ntk"}}, "'ntk'.*default, linear"),
        (
            "llama-yarn",
            {"num_attention_heads": 2},
            r"q_proj.weight has shape \[64, 64\].*\[32, 64\]",
        ),
        ("llama-yarn", {"num_hidden_layers": 3}, r"no tensor .*layers\.2\."),
        ("qwen3_moe", {"num_experts_per_tok": 9}, '"num_experts_per_tok" is 9.*at most 4'),
        ("qwen3_moe", {"num_local_experts": 3, "num_experts": 3}, r"gate.weight has.*\[3, 64\]"),
        ("deepseek_v3", {"topk_method": "best"}, "'best'.*supported are: noaux_tc"),
        ("deepseek_v3", {"topk_group": 9}, '"topk_group"'),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, '"n_group".* best two in each'),
        ("deepseek_v3", {"n_group": 8, "topk_group": 8}, '"n_group"'),
        (
            "gemma2",
            {"layer_types": ["chunked_attention"] * 2},
            "'chunked_attention'.*full_attention",
        ),
        ("gemma2", {"sliding_window": None}, '"sliding_window".*"layer_types" asks for it'),
        ("glm4", {"head_dim": 12}, r"q_proj.bias has shape \[64\].*\[48\]"),
    ],
)
def test_contradictions_are_found_before_any_work(
    source: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed_copy(TESTS / "data" / "tiny" / source, tmp_path / "model", **changes)
    with pytest.raises(bitwright.CheckpointError, match=f"(?s){message}"):
        bitwright.load_model(folder)


def test_a_description_is_needed_by_its_family_alone(tmp_path: Path) -> None:
    package = Path(bitwright.__file__).parent
    shutil.copytree(
        package, tmp_path / "bitwright", ignore=shutil.ignore_patterns("__pycache__", "demo_data")
    )
    script = """
import sys
from pathlib import Path
import bitwright.models.families as families
every = families.known_families()

def entries(stem):
    return sys.modules["bitwright.models.families." + stem].FAMILIES

each = [entry for file in Path(families.__file__).parent.glob("[a-z]*.py") for entry in entries(file.stem)]
of = {kind: entry.of for entry in each if hasattr(entry, "of") for kind in entry.model_types}

def needs(kind):
    found = {kind.partition("/")[2] or kind}
    while more := {of[each] for each in found if each in of} - found:
        found |= more
    return found

for file in sorted(Path(families.__file__).parent.glob("[a-z]*.py")):
    text, own_module = file.read_text(), sys.modules["bitwright.models.families." + file.stem]
    file.unlink()
    for name in [name for name in sys.modules if name.startswith("bitwright.models.families.")]:
        del sys.modules[name]
    left = families.known_families()
    sys.modules["bitwright.models.families." + file.stem] = own_module
    missing = sorted(set(every) - set(left))
    own = {kind for entry in entries(file.stem) for kind in entry.model_types}
    kin = {kind for kind in every if kind.partition("/")[0] in own or needs(kind) & own}
    assert missing and set(missing) <= kin, (file, missing)
    file.write_text(text)
print(len(every))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert int(done.stdout) == len(ARCHITECTURES)


def test_every_family_has_a_reference() -> None:
    """In tests/data or in shared/; both are there in CI."""
    if not ARCH:
        pytest.skip(f"{SHARED} with models is not beside the project")
    covered = {bitwright.load_model(folder).config.family for folder in FOLDERS}
    # What is another family in other words or inside a wrapper needs none of its own.
    texts = {family.partition("/")[2] for family in covered}
    others = set(ARCHITECTURES) - covered - texts - {"kimi_k2"}
    assert {family.partition("/")[2] for family in others} <= covered


def test_layouts_name_every_tensor() -> None:
    for folder in FOLDERS:
        model = bitwright.load_model(folder)
        for index, layout in enumerate(model.layouts):
            prefix = model.block_prefix(index)
            stored = {n for n in model.checkpoint.names() if n.startswith(prefix)}
            named = {f"{n}.weight" for n in (*layout.linears, *layout.floats)} | {*layout.vectors}
            for stack, layers in model.stacked_tensors().items():
                if stack.startswith(prefix):
                    named -= {f"{layer.removeprefix(prefix)}.weight" for layer in layers}
                    named.add(stack.removeprefix(prefix))
            for name in {*named}:  # biases of stacked experts
                place = model.experts.get(prefix + name.removesuffix(".bias"))
                if place is not None and name.endswith(".bias"):
                    named -= {name}
                    named.add(f"{place.stacked_name}.bias".removeprefix(prefix))
            assert stored == {prefix + name for name in named}
            assert layout == block_layout(model.architecture, model.config, index)
