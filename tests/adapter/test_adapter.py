"""The way through transformers: the grams of the native path, and architectures that it does not know."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, TESTS, needs_shared
from tokenizers import Tokenizer, processors

import bitwright
from bitwright.adapter import quantize as adapter
from bitwright.formats import detect_format
from bitwright.quantization.output import relative_error

REASON = 'needs pip install ".[transformers]"'
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

# What the libraries warn of among themselves is not ours to mend.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::UserWarning:bitwright"),
]

ARCH = SHARED / "models" / "arch"
METHODS = ["rtn", "gptq", "awq", "awq+gptq"]
Grams = dict[str, NDArray[Any]]


def tokens(
    vocabulary: int, samples: int = 24, length: int = 64, seed: int = 0
) -> NDArray[np.int64]:
    """Tokens of very different frequencies, so that activations are far from white."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, vocabulary + 1)
    return rng.choice(vocabulary, (samples, length), p=shares / shares.sum())


def random_model(folder: Path, config: Any, dtype: Any) -> Path:
    """Save a model of random weights, with norms that differ from one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            shift = 1.0 if name.endswith("weight") else 0.0
            parameter.data.normal_(shift, 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_stablelm(folder: Path) -> Path:
    config = transformers.StableLmConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        use_qkv_bias=True,
    )
    return random_model(folder, config, torch.float32)


def make_phi(folder: Path) -> Path:
    """One norm before both attention and MLP, biases everywhere, stored in bfloat16."""
    config = transformers.PhiConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    return random_model(folder, config, torch.bfloat16)


def make_gpt_neox(folder: Path) -> Path:
    """Other names: gpt_neox.layers, embed_out, one matrix for query, key and value."""
    config = transformers.GPTNeoXConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    return random_model(folder, config, torch.float16)


def make_opt(folder: Path) -> Path:
    """A family that is not computed natively."""
    config = transformers.OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        vocab_size=96,
        max_position_embeddings=64,
    )
    return random_model(folder, config, torch.float32)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "stablelm": make_stablelm,
    "phi": make_phi,
    "gpt_neox": make_gpt_neox,
}
DENSE = ["llama-biases", pytest.param("llama", marks=needs_shared), *MAKERS]
MODELS = [
    *DENSE,
    pytest.param("qwen3_moe", marks=needs_shared),
    pytest.param("mixtral", marks=needs_shared),
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a model by name."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name in MAKERS:
            if name not in made:
                made[name] = MAKERS[name](tmp_path_factory.mktemp("models") / name)
            return made[name]
        local = TESTS / "data" / "tiny" / name
        return local if local.is_dir() else ARCH / name.removeprefix("arch/")

    return find


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def run(model: Path, out: Path, **options: Any) -> bitwright.QuantizationReport:
    settings: dict[str, Any] = {
        "bits": 3,
        "group_size": 32,
        "calibration": tokens(vocabulary(model)),
        "progress": False,
    }
    return bitwright.quantize_with_transformers(model, out, **{**settings, **options})


def dequantized(out: Path) -> dict[str, NDArray[Any]]:
    """Return all tensors of a quantized folder, the quantized layers in float32."""
    with bitwright.Checkpoint(out) as checkpoint:
        form = detect_format(checkpoint)
        assert form is not None
        tensors = {}
        for name in checkpoint.names():
            stem, _, part = name.rpartition(".")
            tensor = form.read(checkpoint, stem)
            if tensor is None or part == "bias":
                tensors[name] = checkpoint.read(name)
            elif part in ("weight", "qweight"):
                tensors[f"{stem}.weight"] = tensor.dequantize()
    return tensors


def logits(folder: Path, ids: NDArray[Any], tensors: dict[str, NDArray[Any]] | None = None) -> Any:
    """Run a float model in transformers, with the tensors of another where they are given."""
    if tensors is not None:
        folder = shutil.copytree(folder, folder.parent / f"{folder.name}-float")
        try:
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            arrays = {name: array.astype(np.float32) for name, array in tensors.items()}
            save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
            return logits(folder, ids)
        finally:
            shutil.rmtree(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()


def copied(model: Path, to: Path, **tensors: NDArray[Any]) -> Path:
    """Copy a model with some tensors replaced."""
    shutil.copytree(model, to)
    arrays = load_file(to / "model.safetensors")
    for part, array in tensors.items():
        arrays[next(name for name in arrays if part in name)] = array
    save_file(arrays, to / "model.safetensors", metadata={"format": "pt"})
    return to


def assert_same_grams(found: Grams, expected: Grams) -> None:
    assert found.keys() == expected.keys()
    for name, gram in expected.items():
        assert np.linalg.norm(found[name] - gram) <= 1e-4 * np.linalg.norm(gram), name


@needs_shared
@pytest.mark.parametrize("name", [folder.name for folder in sorted(ARCH.glob("*"))])
def test_native_states_are_what_transformers_computes(name: str) -> None:
    """From the stored weights, in float32; the expected.npz of folders in 16 bits is something else."""
    ids = np.load(ARCH / name / "expected.npz")["input_ids"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(ARCH / name, dtype=torch.float32)
    with torch.no_grad():
        expected = loaded.eval()(torch.tensor(ids), output_hidden_states=True)
    model = bitwright.load_model(ARCH / name)
    for states, wanted in zip(model.hidden_states(ids), expected.hidden_states, strict=True):
        assert np.abs(states - wanted.numpy()).max() < 1e-4
    assert np.abs(model.logits(ids) - expected.logits.numpy()).max() < 1e-4


def native_grams(folder: Path, ids: NDArray[Any]) -> Grams:
    model = bitwright.load_model(folder)
    hidden = model.embed(ids.astype(np.int32))
    rope = model.rotation(ids.shape[1])
    grams: Grams = {}
    for index in range(model.config.num_hidden_layers):
        inputs: dict[str, list[NDArray[Any]]] = {}

        def observe(_: int, stage: Any, states: NDArray[Any], seen: Any = inputs) -> None:
            for name in stage.linears:
                seen.setdefault(name, []).append(states.copy())

        model.block(index).forward(hidden, rope, observe)
        for name, chunks in inputs.items():
            rows = np.concatenate(chunks)
            grams[model.block_prefix(index) + name] = rows.T @ rows / max(len(rows), 1)
    return grams


@pytest.mark.parametrize(
    "name",
    [
        "llama-biases",
        "llama-llama3",
        "llama-yarn",
        "qwen3_moe",
        "deepseek_v3-qlora",
        *(
            pytest.param(f"arch/{name}", marks=needs_shared)
            for name in (
                "llama",
                "qwen3_moe",
                "qwen2_moe",
                "mixtral",
                "deepseek_v2",
                "phi3",
                "gemma2",
            )
        ),
    ],
)
def test_grams_are_those_of_the_native_path(folders: Callable[[str], Path], name: str) -> None:
    folder = folders(name)
    # Token 0 pads: its embedding is zero, so that all experts tie for it.
    ids = 1 + tokens(vocabulary(folder) - 1, 40, 48)
    assert_same_grams(bitwright.collect_grams(folder, ids), native_grams(folder, ids))


@pytest.mark.parametrize(
    "name",
    [
        *MAKERS,
        *(
            pytest.param(name, marks=needs_shared)
            for name in (
                *("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "phi3"),
                *("gemma2", "gemma3_text"),  # whose masks and positions differ from block to block
            )
        ),
    ],
)
def test_grams_are_those_of_the_whole_model(folders: Callable[[str], Path], name: str) -> None:
    """Against float64 in NumPy, from what plain hooks see while the model runs as a whole; those of experts
    are over the tokens routed to them."""
    folder = folders(name)
    parts = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    ids = tokens(vocabulary(folder), 20, 40)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = load_file(folder / "model.safetensors")
    grams: Grams = {}

    def second_moments(rows: NDArray[Any]) -> NDArray[Any]:
        rows = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
        return rows.T @ rows / max(len(rows), 1)

    def on_linear(module: Any, name: str) -> None:
        def hook(_: Any, args: Any) -> None:
            grams[name] = second_moments(args[0].numpy())

        module.register_forward_pre_hook(hook)

    def on_experts(module: Any, name: str) -> None:
        stem = name.replace(".mlp.", ".block_sparse_moe.") if "w1" in parts else name

        def hook(_: Any, args: Any) -> None:
            states, chosen = (each.numpy() for each in args[:2])
            for expert in range(module.num_experts):
                rows = states[(chosen == expert).any(axis=1)].astype(np.float64)
                gate, up = (
                    rows @ weights[f"{stem}.{expert}.{part}.weight"].astype(np.float64).T
                    for part in parts[:2]
                )
                product = gate / (1 + np.exp(-gate)) * up
                for part, seen in zip(parts, (rows, rows, product), strict=True):
                    grams[f"{stem}.{expert}.{part}"] = second_moments(seen)

        module.register_forward_pre_hook(hook)

    for path, module in model.named_modules():
        router = path.endswith("gate")
        if isinstance(module, torch.nn.Linear) and ".layers." in path and not router:
            on_linear(module, path)
        elif path.endswith(".experts"):
            on_experts(module, path)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids))
    assert_same_grams(bitwright.collect_grams(folder, ids), grams)


# Of mixtures test_structure.py compares the stacks with those of a run without transformers.
@pytest.mark.parametrize("name", DENSE)
def test_every_method_beats_rounding(
    tmp_path: Path, folders: Callable[[str], Path], name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders(name), folder)
    ids = tokens(vocabulary(folder), seed=1)
    reference = logits(folder, ids)
    errors, sizes = {}, {}
    for method in METHODS:
        report = run(folder, tmp_path / method, method=method)
        tensors = dequantized(tmp_path / method)
        assert tensors.keys() == load_file(folder / "model.safetensors").keys()
        change = logits(folder, ids, tensors) - reference
        errors[method] = float(np.square(change).mean())
        sizes[method] = report.size_bytes
        assert all(0 < layer.error < 0.5 for layer in report.layers)
        assert bool(report.blocks) == method.startswith("awq")
        if method == "awq":  # after GPTQ, which does most of it, scales need not help
            assert all(block.searches for block in report.blocks)
            assert 2 * sum(block.scaled for block in report.blocks) > len(report.blocks)
    assert len(set(sizes.values())) == 1
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["awq"] < errors["rtn"]
    assert errors["awq+gptq"] < errors["rtn"]


@pytest.mark.parametrize("name", ["llama-biases", "llama-linear"])
@pytest.mark.parametrize("format", ["mlx", "gptq", "awq"])
def test_rounding_is_that_of_the_native_path_to_the_bit(
    tmp_path: Path, folders: Callable[[str], Path], name: str, format: str
) -> None:
    options: dict[str, Any] = {
        "method": "rtn",
        "bits": 4,
        "group_size": 32,
        "format": format,
        "progress": False,
        "exclude": ["*.k_proj", "*.v_proj"],
        "allow_unfused": True,
    }
    folder = folders(name)
    bitwright.quantize_with_transformers(folder, tmp_path / "adapter", **options)
    bitwright.quantize(folder, tmp_path / "native", float_embeddings=True, **options)
    ours, native = (
        load_file(tmp_path / each / "model.safetensors") for each in ("adapter", "native")
    )
    assert ours.keys() == native.keys()
    assert all(ours[name].tobytes() == native[name].tobytes() for name in native)
    configs = [(tmp_path / each / "config.json").read_text() for each in ("adapter", "native")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_names_that_transformers_changes_are_those_of_the_files(tmp_path: Path, name: str) -> None:
    """It loads the text parts of models that see under other names than it stores them."""
    folder = TESTS / "data" / "tiny" / name
    options: dict[str, Any] = {"format": "compressed-tensors", "allow_unfused": True}
    options |= {"method": "rtn", "group_size": 32, "progress": False}
    bitwright.quantize_with_transformers(folder, tmp_path / "adapter", **options)
    bitwright.quantize(folder, tmp_path / "native", float_embeddings=True, **options)
    ours, native = (
        load_file(tmp_path / each / "model.safetensors") for each in ("adapter", "native")
    )
    assert ours.keys() == native.keys()
    assert all(ours[name].tobytes() == native[name].tobytes() for name in native)


def test_models_that_only_see_are_quantized(tmp_path: Path) -> None:
    """Of which transformers has no class for text alone."""
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
    text |= {"model_type": "cohere2", "head_dim": 16, "pad_token_id": 0}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.AutoConfig.for_model(
        "cohere2_vision", text_config=text, vision_config=vision
    )
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    report = bitwright.quantize_with_transformers(
        tmp_path / "model",
        tmp_path / "out",
        "gptq",
        group_size=32,
        calibration=tokens(96),
        format="compressed-tensors",
        progress=False,
    )
    assert len(report.layers) == 2 * 7
    assert all("language_model" in layer.name for layer in report.layers)


@pytest.mark.parametrize("method", METHODS)
def test_saved_weights_are_those_that_were_measured(
    tmp_path: Path, folders: Callable[[str], Path], method: str
) -> None:
    """The reported errors of the first block, once more from the files and the float model's grams."""
    folder = folders("llama-biases")
    ids = tokens(96)
    report = run(folder, tmp_path / "out", method=method, calibration=ids)
    grams = bitwright.collect_grams(folder, ids)
    original, saved = bitwright.load_model(folder), bitwright.load_model(tmp_path / "out")
    result = bitwright.evaluate(saved, ids, reference=original)
    assert result.kl_divergence is not None
    assert result.kl_divergence < 0.5
    shapes = original.linear_shapes()
    for layer in report.layers[:7]:
        if method.startswith("awq") and "o_proj" not in layer.name and "down" not in layer.name:
            continue  # these are measured on scaled weights
        weight, stored = (each.weight(layer.name, shapes[layer.name]) for each in (original, saved))
        error = relative_error(weight, stored, grams[layer.name])
        assert layer.error == pytest.approx(error, rel=1e-3), layer.name


def test_what_is_not_quantized_is_carried_over(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    folder = copied(folders("gpt_neox"), tmp_path / "model")
    beside = (
        "tokenizer.json",
        "modeling_own.py",
        "own/layers.py",
        "video_preprocessor_config.json",
    )
    for name in beside:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    run(folder, tmp_path / "out", include=["*.dense*"], exclude=["*.1.*"])
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    quantized = {name.removesuffix(".scales") for name in after if name.endswith(".scales")}
    assert len(quantized) == 3
    for name, array in before.items():
        if name.removesuffix(".weight") not in quantized:
            assert array.tobytes() == after[name].tobytes()
    for name in beside:
        assert (tmp_path / "out" / name).read_text() == "{}"


def test_norms_are_rounded_to_what_they_are_stored_in(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    """phi has one norm for attention and MLP; readers left in float are scaled along, in bfloat16."""
    folder = folders("phi")
    report = run(folder, tmp_path / "out", method="awq", exclude=["*.fc1", "*.v_proj"])
    assert all(block.scaled for block in report.blocks)
    assert all(block.loss_after < block.loss_before for block in report.blocks)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("input_layernorm.weight", "input_layernorm.bias", "mlp.fc1.weight"):
        name = f"model.layers.0.{part}"
        assert after[name].dtype == before[name].dtype == ml_dtypes.bfloat16
        assert after[name].tobytes() != before[name].tobytes()


@needs_shared
def test_gptq_folders_name_the_routers_that_stay_in_float(tmp_path: Path) -> None:
    report = run(ARCH / "qwen3_moe", tmp_path / "out", bits=4, format="gptq")
    assert any(".experts." in layer.name for layer in report.layers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any("gate$" in rule for rule in config["dynamic"])
    assert not any(layer.name.endswith(".gate") for layer in report.layers)


def test_same_inputs_give_same_bytes(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    for out in ("a", "b"):
        run(folders("stablelm"), tmp_path / out, method="awq+gptq", samples=10)
    one, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("a", "b"))
    assert one == other


def test_a_norm_with_another_reader_is_left_alone(
    tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) + torch.tanh(x))
    report = run(folders("llama-biases"), tmp_path / "out", method="awq")
    # Where the best ratio is 0 there is nothing to undo.
    found = [block.searches.get("gate_proj") for block in report.blocks]
    assert all(search is None or search.ratio == 0 for search in found)
    assert any("q_proj" in block.searches for block in report.blocks)
    before = load_file(folders("llama-biases") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in before:
        if "post_attention_layernorm" in name:
            assert before[name].tobytes() == after[name].tobytes()


def test_without_a_norm_before_linears_awq_says_so(tmp_path: Path) -> None:
    config = transformers.Olmo2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    folder = random_model(tmp_path / "olmo2", config, torch.float32)
    with pytest.raises(ValueError, match="nothing to scale; use gptq"):
        run(folder, tmp_path / "out", method="awq")
    assert run(folder, tmp_path / "out").layers


def test_model_of_other_modules_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    folder = random_model(tmp_path / "gpt2", config, torch.float32)
    with pytest.raises(bitwright.UnsupportedModelError, match=r"no list of decoder blocks"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "salient"}, "method: expected one of awq, awq\\+gptq, gptq, rtn"),
        ({"format": "gguf"}, "format: gguf needs"),
        ({"calibration": np.full((2, 8), 96)}, "token id 96"),
        ({"n_grid": 0}, "n_grid"),
        ({"exclude": ["*.nothing"]}, "matches no layer"),
        ({"bits": 7}, "mlx format stores"),
        ({"group_size": 48}, "group"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, folders: Callable[[str], Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(folders("llama-biases"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_are_named(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    whole = folders("stablelm")
    weight = np.zeros((128, 64), np.float32)
    weight[3, 5] = np.nan
    folder = copied(whole, tmp_path / "weights", **{"layers.1.mlp.up_proj.weight": weight})
    with pytest.raises(
        bitwright.NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight.*\[3, 5\]"
    ):
        run(folder, tmp_path / "out")
    norm = np.full(64, np.inf, np.float32)
    folder = copied(whole, tmp_path / "norm", **{"layers.1.post_attention_layernorm.weight": norm})
    with pytest.raises(bitwright.NonFiniteError, match=r"layers\.1\.mlp\.\w+ \(block 1\)"):
        run(folder, tmp_path / "out")
    with pytest.raises(bitwright.NonFiniteError, match=r"layers\.1\.mlp\.\w+ \(block 1\)"):
        bitwright.collect_grams(folder, tokens(96))


def test_layers_of_other_kinds_are_named_and_stay_in_float(tmp_path: Path) -> None:
    """Jamba mixes attention with Mamba, whose dt_proj is never called as a layer."""
    config = transformers.JambaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=8,
        expert_layer_offset=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_mamba_kernels=False,
        mamba_dt_rank=32,
        pad_token_id=0,
    )
    folder = random_model(tmp_path / "jamba", config, torch.float32)
    with (
        pytest.warns(UserWarning, match=r"layers\.0\.mamba\.conv1d\.weight stay in float"),
        pytest.warns(UserWarning, match=r"reached 1 layers, such as .*dt_proj; they were rounded"),
    ):
        report = run(folder, tmp_path / "out")
    assert len(report.layers) == 4 + 4 + 2 * 3


def test_a_model_that_does_not_run_is_refused(
    tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.stablelm.modeling_stablelm import StableLmMLP, StableLmModel

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("sizes differ")

    with monkeypatch.context() as patch:
        patch.setattr(StableLmMLP, "forward", broken)
        with pytest.raises(bitwright.UnsupportedModelError, match="sizes differ"):
            run(folders("stablelm"), tmp_path / "out")
    plain = StableLmModel.forward

    def skipping(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers, self.layers = self.layers, torch.nn.ModuleList(reversed(self.layers))
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.layers = layers

    monkeypatch.setattr(StableLmModel, "forward", skipping)
    with pytest.raises(bitwright.UnsupportedModelError, match="do not run one after the other"):
        run(folders("stablelm"), tmp_path / "out")


def test_incomplete_quantized_and_unknown_models_are_refused(
    tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    folder = copied(folders("stablelm"), tmp_path / "incomplete")
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.layers.1.mlp.up_proj.weight"]
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(bitwright.UnsupportedModelError, match=r"no weights for .*up_proj"):
        run(folder, tmp_path / "out")
    run(folders("stablelm"), tmp_path / "quantized", method="rtn")
    with pytest.raises(ValueError, match="is quantized already"):
        run(tmp_path / "quantized", tmp_path / "out")
    folder = copied(folders("stablelm"), tmp_path / "unknown")
    (folder / "config.json").write_text('{"model_type": "no_such_model", "vocab_size": 96}')
    with pytest.raises(bitwright.UnsupportedModelError, match="cannot load this model"):
        run(folder, tmp_path / "out")


@needs_shared
def test_experts_without_tokens_are_rounded_with_a_warning(tmp_path: Path) -> None:
    ids = np.zeros((1, 2), np.int64)
    with pytest.warns(
        UserWarning, match=r"reached .* layers, such as .*experts.*rounded to nearest"
    ):
        report = run(ARCH / "qwen3_moe", tmp_path / "out", calibration=ids)
    grams = bitwright.collect_grams(ARCH / "qwen3_moe", ids)
    assert grams.keys() == {layer.name for layer in report.layers}
    assert sum(not gram.any() for gram in grams.values()) >= 3


def test_old_transformers_are_refused(
    tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers replaces its own module while it loads.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.2")
    with pytest.raises(bitwright.MissingExtraError, match="4.56.2 is too old"):
        run(folders("llama-biases"), tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", tokens(96))
    command = [
        *(sys.executable, "-m", "bitwright", "quantize", str(make_opt(tmp_path / "model"))),
        *("--out", str(tmp_path / "out"), "--calibration", str(tmp_path / "tokens.npy")),
        *("--group-size", "32", "--threads", "1"),
    ]
    native = subprocess.run(command, capture_output=True, text=True, check=False)
    assert native.returncode == 1
    assert "--backend transformers" in native.stderr
    command += ["--backend", "transformers"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert (tmp_path / "out" / "config.json").exists()


def contradicted(
    model: Path, to: Path, config: dict[str, Any], tensors: Callable[..., Any]
) -> Path:
    """Copy a model with some keys of config.json replaced and its tensors changed."""
    shutil.copytree(model, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    arrays = load_file(to / "model.safetensors")
    save_file(tensors(arrays) or arrays, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("name", ["llama-biases", "stablelm", "qwen2"])
def test_tensors_decide_here_too(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Saved without prefixes, called tied and FP8, with a layer too many and a classifier."""

    def change(arrays: dict[str, Any]) -> dict[str, Any]:
        embedding = arrays["model.embed_tokens.weight"]
        arrays["lm_head.weight"] = embedding[::-1].copy()
        layers = [each for each in arrays if each.startswith("model.layers.1.")]
        arrays |= {each.replace("layers.1", "layers.9"): arrays[each] for each in layers}
        arrays["score.weight"] = embedding[:2].copy()
        return {each.removeprefix("model."): array for each, array in arrays.items()}

    said = {"tie_word_embeddings": True, "quantization_config": {"quant_method": "fp8"}}
    model = contradicted(folders(name), tmp_path / "model", said, change)
    messages = [
        "all of them are floats",
        "lm_head.weight is stored and differs",
        "nothing computes",
    ]
    options: dict[str, Any] = {"method": "rtn", "calibration": None, "bits": 4}
    options["exclude"] = ["*self_attn*"]
    for format in ("mlx", "gptq"):
        with pytest.warns(bitwright.BitwrightWarning, match="nothing computes"):
            report = run(model, tmp_path / format, format=format, **options)
        for message, warning in zip(messages, report.warnings, strict=True):
            assert message in warning
        config = json.loads((tmp_path / format / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert config["quantization_config"].get("quant_method") != "fp8"
        names = set(bitwright.Checkpoint(tmp_path / format).names())
        extra = {each for each in names if "layers.9" in each or each.startswith("score")}
        assert bool(extra) == (format == "gptq")  # mlx-lm refuses what it does not know
        assert {each for each in names - extra if each.startswith("model.")} == names - extra - {
            "lm_head.weight"
        }
        head = bitwright.Checkpoint(tmp_path / format).read("lm_head.weight")
        whole = bitwright.Checkpoint(folders(name)).read("model.embed_tokens.weight")
        assert np.array_equal(head, whole[::-1])


def test_heads_that_mlx_lm_does_not_have_are_refused(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """As without transformers."""

    def change(arrays: dict[str, Any]) -> None:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"][::-1].copy()

    model = contradicted(folders("gemma2"), tmp_path / "model", {}, change)
    options: dict[str, Any] = {"method": "rtn", "calibration": None, "bits": 4}
    with (
        pytest.warns(bitwright.BitwrightWarning, match="is stored and differs"),
        pytest.raises(ValueError, match="mlx-lm knows gemma2 only without a head of its own"),
    ):
        run(model, tmp_path / "out", format="mlx", **options)
    assert not (tmp_path / "out").exists()


def test_config_is_spelled_for_engines(folders: Callable[[str], Path], tmp_path: Path) -> None:
    said = {"hidden_act": "swish"}
    model = contradicted(folders("llama-biases"), tmp_path / "model", said, dict)
    run(model, tmp_path / "out", method="rtn", calibration=None, format="mlx", bits=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_act"] == "silu"


def test_mlx_keeps_the_matrix_of_latent_keys_and_values_in_float(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """As without transformers: mlx-lm would round it again."""
    options: dict[str, Any] = {"method": "rtn", "calibration": None, "bits": 4}
    options["exclude"] = ["*.o_proj"]
    quantized = {}
    for format in ("mlx", "compressed-tensors"):
        report = run(folders("deepseek_v3"), tmp_path / format, format=format, **options)
        quantized[format] = {layer.name for layer in report.layers}
    left = quantized["compressed-tensors"] - quantized["mlx"]
    assert left == {f"model.layers.{i}.self_attn.kv_b_proj" for i in (0, 1)}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_small_weights_are_multiplied_and_their_norms_divided(tmp_path: Path, method: Any) -> None:
    usual = make_stablelm(tmp_path / "usual")
    small = tmp_path / "small"
    shutil.copytree(usual, small)
    tensors = load_file(small / "model.safetensors")
    for name, array in tensors.items():
        power = 0
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            power = -24
        elif "post_attention_layernorm" in name:
            power = 24
        tensors[name] = np.ldexp(array.astype(np.float32), power).astype(array.dtype)
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    errors = []
    for model in (usual, small):
        options: dict[str, Any] = {"calibration": tokens(96, 8), "progress": False}
        if model is small:
            with pytest.warns(bitwright.BitwrightWarning, match="too small for float16 scales"):
                report = bitwright.quantize_with_transformers(
                    model, tmp_path / "out-small", method, 4, 32, "gptq", **options
                )
        else:
            report = bitwright.quantize_with_transformers(
                model, tmp_path / "out-usual", method, 4, 32, "gptq", **options
            )
        errors.append([layer.error for layer in report.layers])
        moved = {layer.name.rpartition(".")[2] for layer in report.layers if layer.power > 0}
        assert moved == ({"gate_proj", "up_proj"} if model is small else set())
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.2)


def test_small_weights_without_a_norm_are_refused(tmp_path: Path) -> None:
    model = make_stablelm(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, array in tensors.items():
        if name.endswith("down_proj.weight"):
            tensors[name] = np.ldexp(array.astype(np.float32), -60).astype(array.dtype)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj: .*float16 scales lose"):
        bitwright.quantize_with_transformers(
            model, tmp_path / "out", "rtn", 4, 32, "gptq", progress=False
        )
    assert not (tmp_path / "out").exists()


def test_text_begins_with_what_the_tokenizer_puts_first(tmp_path: Path) -> None:
    """As ids of the same samples do, in quantization and in grams; and long samples are warned of."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(bitwright.demo_folder(), model)
    made = Tokenizer.from_file(str(model / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    made.save(str(model / "tokenizer.json"))
    text.write_text((model / "calibration.txt").read_text(encoding="utf-8")[:1500])
    grams = []
    for bos in (True, False):
        ids = bitwright.load_tokens(text, tokenizer=model, length=32, bos=bos)
        assert (ids[:, 0] == 0).all() == bos
        folders = [tmp_path / f"{bos} {name}" for name in ("text", "ids")]
        options: dict[str, Any] = {"bits": 3, "progress": False}
        report = bitwright.quantize_with_transformers(
            model, folders[0], calibration=text, length=32, bos=bos, **options
        )
        bitwright.quantize_with_transformers(model, folders[1], calibration=ids, **options)
        stored = [(folder / "model.safetensors").read_bytes() for folder in folders]
        assert stored[0] == stored[1]
        assert report.calibration_tokens == ids.size
        grams.append(bitwright.collect_grams(model, [text.read_text()], bos=bos))
    name = "model.layers.0.mlp.down_proj"
    assert not np.array_equal(grams[0][name], grams[1][name])
    with pytest.warns(bitwright.BitwrightWarning, match="260 tokens are longer than the 256"):
        bitwright.quantize_with_transformers(
            model, tmp_path / "long", calibration=np.zeros((1, 260), int), progress=False
        )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_model_that_changes_meanwhile_is_named(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever is still to be read of it then."""
    model = Path(shutil.copytree(folders("llama-biases"), tmp_path / "model"))
    path = model / name
    if not path.exists():
        path.write_text("{}")
    original = adapter._Run.go

    def go(run: Any, progress: bool) -> None:
        original(run, progress)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(adapter._Run, "go", go)
    with pytest.raises(bitwright.CheckpointError, match=f"{name}: was changed or touched while"):
        run(model, tmp_path / "out", method="rtn", calibration=None)
    assert not (tmp_path / "out").exists()
