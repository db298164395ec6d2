"""Which modules of transformers' models are text decoders and routers, and what stays in float."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from shared_data import TESTS

import bitwright
from bitwright.grids.tensor import unpack
from bitwright.quantization.output import relative_error

REASON = 'needs pip install ".[transformers]"'
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from bitwright.adapter.structure import decoder_blocks, routers  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::UserWarning:bitwright"),
]

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MIXTURE: dict[str, Any] = {
    **SMALL,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


def on_meta(model_type: str, **settings: Any) -> Any:
    """Return a model of which only the shapes are known."""
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "more", "expected"),
    [
        ("qwen2_moe", {}, {"mlp.gate", "mlp.shared_expert_gate"}),
        ("deepseek_v3", {}, {"mlp.gate"}),
        ("gpt_oss", {}, {"mlp.router"}),
        # Named otherwise.
        ("hunyuan_v1_moe", {}, {"mlp.gate.wg"}),
        ("jetmoe", {}, {"mlp.router.layer", "self_attention.experts.router.layer"}),
        ("longcat_flash", {"zero_expert_num": 3}, {"mlp.router.classifier"}),
        (
            "gemma4_text",
            {
                "enable_moe_block": True,
                "top_k_experts": 2,
                "vocab_size_per_layer_input": 96,
                "hidden_size_per_layer_input": 16,
                "num_kv_shared_layers": 0,
            },
            {"router.proj"},
        ),
        ("doge", {"is_moe": True, "num_experts": 36}, {"mlp.router_gate"}),
        # Gates that choose nothing, or stand beside a router.
        ("minimax", {}, {"mlp.gate"}),
        ("afmoe", {}, {"mlp.router.gate"}),
        ("nemotron_h", {"moe_latent_size": 32}, {"mixer.gate"}),
        (
            "gemma4_text",
            {
                "vocab_size_per_layer_input": 96,
                "hidden_size_per_layer_input": 16,
                "num_kv_shared_layers": 0,
            },
            set(),
        ),
    ],
)
def test_routers_are_known_by_their_shape(
    model_type: str, more: dict[str, Any], expected: set[str]
) -> None:
    model = on_meta(model_type, **{**MIXTURE, **more})
    found = decoder_blocks(model, torch.nn)
    assert found is not None
    paths = set()
    for block in found[1]:
        chosen = routers(block, torch.nn)
        paths |= {path for path, module in block.named_modules() if module in chosen}
    assert paths == expected


def test_of_towers_and_text_only_text_is_quantized(tmp_path: Path) -> None:
    """Where the tower has more blocks than the text decoder; the report names what stays in float."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {
        **SMALL,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config={**tower, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16},
        audio_config=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    report = bitwright.quantize_with_transformers(
        tmp_path / "model",
        tmp_path / "out",
        "rtn",
        4,
        32,
        format="compressed-tensors",
        exclude=["*.1.mlp.*"],
        allow_unfused=True,
        progress=False,
    )
    names = {layer.name for layer in report.layers}
    assert len(names) == 2 * 4 + 3
    assert all(name.startswith("model.language_model.layers.") for name in names)
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out")
    )
    assert {f"model.language_model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")} < {
        *report.in_float
    }
    assert "model.embed_vision.embedding_projection" in report.in_float
    in_tower = {name for name in report.in_float if name.startswith("model.vision_tower.")}
    assert len(in_tower) == 4 * 7 + 1
    assert names.isdisjoint(report.in_float)
    assert f"{len(report.in_float)} matrices stay in float" in str(report)
    for name, array in before.items():
        if name.removesuffix(".weight") not in names:
            assert after[name].tobytes() == array.tobytes()


def save_hunyuan(folder: Path) -> Path:
    """Save a mixture of a family that only transformers knows."""
    torch.manual_seed(0)
    more = {"moe_intermediate_size": [32, 32], "moe_topk": [2, 2], "num_experts": 4}
    config = transformers.HunYuanMoEV1Config(**{**SMALL, **more, "pad_id": 0})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_routers_stay_in_float_and_other_gates_do_not(tmp_path: Path, method: str) -> None:
    ids = torch.randint(96, (8, 32)).numpy()
    report = bitwright.quantize_with_transformers(
        save_hunyuan(tmp_path / "model"),
        tmp_path / "out",
        method,
        4,
        32,
        format="gptq",
        calibration=None if method == "rtn" else ids,
        progress=False,
    )
    chosen = {f"model.layers.{index}.mlp.gate.wg" for index in (0, 1)}
    assert chosen == set(report.in_float)
    assert chosen.isdisjoint(layer.name for layer in report.layers)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"{name}.weight" for name in chosen} < after.keys()


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("qwen3_moe", "mlp.switch_mlp"),
        ("qwen3_next", "mlp.switch_mlp"),
        ("ernie4_5_moe", "mlp.switch_mlp"),
        ("lfm2_moe", "feed_forward.switch_mlp"),
        ("minimax_m2", "block_sparse_moe.switch_mlp"),
        ("dots1", "mlp.experts"),
    ],
)
def test_mlx_has_stacked_experts_as_without_transformers(
    tmp_path: Path, name: str, stack: str
) -> None:
    model = TESTS / "data" / "tiny" / name
    options: dict[str, Any] = {"format": "mlx", "progress": False}
    if name == "qwen3_next":
        options["exclude"] = ["*.in_proj_ba"]  # which is always in float without transformers
    some = {**options, "exclude": [*options.get("exclude", ()), "*.experts.0.*"]}
    with pytest.raises(ValueError, match="must treat them alike"):
        bitwright.quantize_with_transformers(model, tmp_path / "some", "rtn", 4, 32, **some)
    bitwright.quantize_with_transformers(model, tmp_path / "ours", "rtn", 4, 32, **options)
    options.pop("exclude", None)
    bitwright.quantize(model, tmp_path / "native", "rtn", 4, 32, float_embeddings=True, **options)
    ours, native = (load_file(tmp_path / each / "model.safetensors") for each in ("ours", "native"))
    assert any(f".{stack}.down_proj.scales" in each for each in ours)
    assert ours.keys() == native.keys()
    assert all(ours[each].tobytes() == native[each].tobytes() for each in native)
    ours_says, native_says = (
        json.loads((tmp_path / each / "config.json").read_text()) for each in ("ours", "native")
    )
    assert ours_says == native_says


def test_mlx_has_stacked_experts_of_other_families(tmp_path: Path) -> None:
    """One after the other, each near what it was."""
    model = save_hunyuan(tmp_path / "model")
    options: dict[str, Any] = {"format": "mlx", "progress": False}
    bitwright.quantize_with_transformers(model, tmp_path / "out", "rtn", 4, 32, **options)
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(".experts." in name for name in after)
    for part in ("gate_proj", "up_proj", "down_proj"):
        stack = f"model.layers.1.mlp.switch_mlp.{part}"
        words, scales, biases = (
            after[f"{stack}.{each}"] for each in ("weight", "scales", "biases")
        )
        assert len(words) == len(scales) == len(biases) == 4
        for expert in range(4):
            weight = before[f"model.layers.1.mlp.experts.{expert}.{part}.weight"]
            codes = unpack(words[expert], 4).reshape(*scales[expert].shape, 32)
            stored = codes * scales[expert][..., None] + biases[expert][..., None]
            assert relative_error(weight, stored.reshape(weight.shape), None) < 0.02


@pytest.mark.parametrize("format", ["mlx", "compressed-tensors"])
def test_towers_and_rotary_scaling_are_declared_as_without_transformers(
    tmp_path: Path, format: str
) -> None:
    """Gemma 4's proportional scaling has no older spelling, and its towers are no layers to quantize."""
    model = TESTS / "data" / "tiny" / "gemma4"
    options: dict[str, Any] = {"format": format, "progress": False}
    bitwright.quantize_with_transformers(model, tmp_path / "ours", "rtn", 4, 32, **options)
    bitwright.quantize(model, tmp_path / "native", "rtn", 4, 32, float_embeddings=True, **options)
    ours, native = (
        json.loads((tmp_path / each / "config.json").read_text()) for each in ("ours", "native")
    )
    assert ours == native
    assert "rope_scaling" not in ours["text_config"]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours").get_text_config()
    assert config.rope_parameters["full_attention"]["rope_type"] == "proportional"
    weights = [load_file(tmp_path / each / "model.safetensors") for each in ("ours", "native")]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].tobytes() == weights[1][name].tobytes() for name in weights[1])


def save_stablelm(folder: Path, **settings: int) -> Path:
    torch.manual_seed(0)
    config = transformers.StableLmConfig(**{**SMALL, **settings})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "format", "in_float"),
    [
        ({"intermediate_size": 100}, "mlx", {"down_proj"}),  # rows of no whole groups
        ({"intermediate_size": 100}, "gptq", {"gate_proj", "up_proj", "down_proj"}),
        # Two heads of 8 are too small, and vLLM computes them in one module with the queries.
        (
            {"num_key_value_heads": 2, "num_attention_heads": 8},
            "gptq",
            {"q_proj", "k_proj", "v_proj"},
        ),
    ],
)
def test_what_no_groups_do_for_stays_in_float(
    tmp_path: Path, settings: dict[str, int], format: Any, in_float: set[str]
) -> None:
    model = save_stablelm(tmp_path / "model", **settings)
    with pytest.warns(bitwright.BitwrightWarning, match=f"stay in float: the {format} format"):
        report = bitwright.quantize_with_transformers(
            model, tmp_path / "out", "rtn", 4, 32, format=format, progress=False
        )
    assert {name.rpartition(".")[2] for name in report.in_float} == in_float
    assert len(report.layers) == 2 * (7 - len(in_float))
    with pytest.raises(ValueError, match="helps: --group-size 64"):  # which another size does for
        bitwright.quantize_with_transformers(
            model, tmp_path / "other", "rtn", 4, 128, format=format, progress=False
        )
