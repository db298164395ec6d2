"""Which modules of transformers' models are text decoders and routers, and what stays in float."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import bitwright

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


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_routers_stay_in_float_and_other_gates_do_not(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    more = {"moe_intermediate_size": [32, 32], "moe_topk": [2, 2], "num_experts": 4}
    config = transformers.HunYuanMoEV1Config(**{**SMALL, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(96, (8, 32)).numpy()
    report = bitwright.quantize_with_transformers(
        tmp_path / "model",
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
