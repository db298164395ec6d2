"""Keys of config.json that change the mathematics are honoured or refused, with their names."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import TESTS

import bitwright
from bitwright import BitwrightWarning, CheckpointError, UnsupportedModelError
from bitwright.models import ARCHITECTURES, config_keys
from bitwright.models.config import ModelConfig

TINY = TESTS / "data" / "tiny"
SOURCE = Path("folder/config.json")
RULES = {name: family.rules for name, family in ARCHITECTURES.items()}
SLIDING, FULL = "sliding_attention", "full_attention"


def parse(model_type: str, **raw: Any) -> ModelConfig:
    experts = {"num_experts_per_tok": 2} if model_type == "deepseek_v2" else {}
    if model_type == "glm4_moe":  # 96 heads do not divide its width
        experts = {"head_dim": 128}
    outer, _, text = model_type.partition("/")
    if "gemma4" in model_type:  # per-layer embeddings, which transformers has by default
        experts = {"hidden_size_per_layer_input": 0}
    raw = {"model_type": outer, **experts, **raw}
    if text:
        raw["text_config"] = {"model_type": text}
    return ModelConfig.from_dict(raw, SOURCE, RULES)


def changed(name: str, folder: Path, **changes: Any) -> Path:
    """Copy a tiny model with other values in its config.json; `...` deletes a key."""
    shutil.copytree(TINY / name, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def logits(folder: Path, length: int = 24) -> Any:
    ids = np.random.default_rng(0).integers(3, 90, (1, length))
    return bitwright.load_model(folder).logits(ids)


@pytest.mark.parametrize("model_type", sorted(RULES))
@pytest.mark.parametrize("key", ["is_causal", "per_layer_config", "clip_qkv", "qk_layernorm"])
def test_every_family_refuses(model_type: str, key: str) -> None:
    if key == "per_layer_config" and "gemma4" in model_type:
        return  # which computes with it
    value: Any = {"is_causal": False, "qk_layernorm": True}.get(key, {"0": 8})
    with pytest.raises(
        UnsupportedModelError, match=rf'"(text_config\.)?{key}" is .*{model_type.partition("/")[0]}'
    ) as caught:
        parse(model_type, **{key: value})
    assert str(caught.value).startswith(f"{SOURCE}: ")
    assert "\n" not in str(caught.value)
    neutral = {**config_keys.REFUSED, **config_keys.DISPUTED}[key]
    for harmless in (None, *neutral):
        assert parse(model_type, **{key: harmless}).raw[key] == harmless


@pytest.mark.parametrize(
    ("model_type", "key", "value", "neutral"),
    [
        ("llama", "use_bidirectional_attention", True, False),
        ("gemma", "use_bidirectional_attention", True, False),
        ("gemma2", "use_bidirectional_attention", True, None),
        ("gemma3_text", "use_bidirectional_attention", "all", False),
        ("llama", "attn_logit_softcapping", 50.0, None),
        ("qwen3", "final_logit_softcapping", 30.0, None),
        ("mistral", "attention_bias", True, False),
        ("phi3", "attention_bias", True, False),
        ("gemma2", "mlp_bias", True, False),
        ("phi3", "lm_head_bias", True, False),
        ("llama", "logit_scale", 0.0625, 1.0),
        ("llama", "embedding_multiplier", 12.0, 1),
        ("llama", "use_parallel_residual", True, False),
        ("llama", "no_rope_layers", [1, 1, 0], []),
        ("llama", "attn_temperature_tuning", True, False),
        ("starcoder2", "norm_type", "rms_norm", "layer_norm"),
        ("starcoder2", "mlp_type", "gated", "default"),
        ("gemma", "hidden_activation", "silu", "gelu_pytorch_tanh"),
        ("deepseek_v2", "norm_topk_prob", True, False),
        ("deepseek_v2", "scoring_func", "sigmoid", "softmax"),
        ("deepseek_v3", "scoring_func", "softmax", "sigmoid"),
        ("deepseek_v3", "moe_layer_freq", 2, 1),
        ("mixtral", "norm_topk_prob", False, True),
        ("qwen3_moe", "routed_scaling_factor", 2.5, 1.0),
    ],
)  # fmt: skip
def test_families_refuse(model_type: str, key: str, value: Any, neutral: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f'{key}" is .*{model_type}'):
        parse(model_type, **{key: value})
    parse(model_type, **{key: neutral})


@pytest.mark.parametrize(
    "rope",
    [
        {"alpha": 1000.0},
        {"short_mscale": 1.2},
        {"rope_type": "yarn", "factor": 2, "attn_factor": 2},
    ],
)
def test_rope_keys_that_no_rotation_has(rope: dict[str, Any]) -> None:
    key = [*rope][-1]
    for section in ("rope_scaling", "rope_parameters"):
        with pytest.raises(UnsupportedModelError, match=rf'"{section}\.{key}" is'):
            parse("llama", **{section: rope})
    parse("llama", rope_scaling={"mrope_section": [16, 24, 24], "type": "default"})


def test_gemma3_needs_both_rotations() -> None:
    flat = {"rope_type": "default", "rope_theta": 5000.0}
    with pytest.raises(UnsupportedModelError, match='must hold "full_attention"'):
        parse("gemma3_text", rope_parameters=flat)
    part = {"full_attention": {"partial_rotary_factor": 0.5}, SLIDING: {}}
    with pytest.raises(UnsupportedModelError, match=r"full_attention\.partial_rotary_factor"):
        parse("gemma3_text", rope_parameters=part)
    assert parse("gemma3_text", rope_theta=5000.0).rope.theta == 5000


def test_layer_types_of_mistral_are_those_of_ministral(tmp_path: Path) -> None:
    sliding, full = (
        logits(TINY / "mistral"),
        logits(changed("mistral", tmp_path, sliding_window=None)),
    )
    assert np.abs(sliding - full).max() > 0.1
    for types, expected in (
        ([SLIDING] * 2, sliding),
        ([FULL] * 2, full),
        (["attention"] * 2, full),
    ):
        found = logits(changed("mistral", tmp_path, sliding_window=7, layer_types=types))
        np.testing.assert_array_equal(found, expected)
    mixed = logits(changed("mistral", tmp_path, layer_types=[FULL, SLIDING]))
    assert np.abs(mixed - full).max() > 0.1
    assert np.abs(mixed - sliding).max() > 0.1


@pytest.mark.parametrize("model_type", ["llama", "granite", "mixtral", "starcoder2", "qwen3_moe"])
def test_layer_types_that_transformers_overlooks_must_agree(model_type: str) -> None:
    layers = {"num_hidden_layers": 2, "sliding_window": None}
    parse(model_type, **layers, layer_types=[FULL] * 2)
    with pytest.raises(UnsupportedModelError, match=r'"layer_types" asks for other windows'):
        parse(model_type, **layers, layer_types=[FULL, SLIDING])


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3", "qwen2_moe"])
def test_windows_that_are_switched_off_are_no_windows(model_type: str) -> None:
    layers = {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": [FULL, SLIDING]}
    with pytest.raises(CheckpointError, match='"use_sliding_window" is False, but must be true'):
        parse(model_type, **layers, use_sliding_window=False)
    assert parse(model_type, **layers, use_sliding_window=True).layer_types == (FULL, SLIDING)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("llama", "sliding_window", 4096),
        ("olmo2", "sliding_window", 1024),
    ],
)
def test_what_transformers_overlooks_is_named(model_type: str, key: str, value: Any) -> None:
    with pytest.warns(BitwrightWarning, match=f'"{key}" is {value}.*overlooks for {model_type}'):
        config = parse(model_type, **{key: value})
    assert config.attention_softcap is None
    assert {*config.layer_types} == {FULL} or model_type == "gemma3_text"
    parse(model_type, **{key: None})
    parse("llama", sliding_window=4096, use_sliding_window=False)


@pytest.mark.parametrize(("version", "warns"), [("5.30.0.dev0", True), ("6.0", True), ("5.23.1", False),
                                                ("4.57.1", False), ("", False), ([5], False)])  # fmt: skip
def test_keys_of_newer_classes_are_named(version: Any, warns: bool) -> None:
    raw = {"transformers_version": version, "attention_sinks": 4, "bos_token_id": 1, "top_k": 3}
    if warns:
        with pytest.warns(BitwrightWarning, match=r"transformers .*\['attention_sinks'\]"):
            parse("llama", **raw)
    else:
        parse("llama", **raw)


@pytest.mark.parametrize("name", ["llama-biases", "mistral", "olmo2", "granite"])
def test_dynamic_rope_is_the_default_up_to_the_models_length(name: str, tmp_path: Path) -> None:
    plain = changed(name, tmp_path / "plain", max_position_embeddings=24)
    expected = logits(plain)
    for rope in ({"type": "dynamic", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2}):
        folder = changed(name, tmp_path / "dynamic", max_position_embeddings=24, rope_scaling=rope)
        np.testing.assert_array_equal(logits(folder), expected)
        with pytest.raises(UnsupportedModelError, match="25 tokens: dynamic RoPE.*at most 24"):
            logits(folder, 25)


def test_dynamic_rope_is_refused_beyond_by_every_command(tmp_path: Path) -> None:
    rope = {"type": "dynamic", "factor": 4.0}
    folder = changed("llama-biases", tmp_path / "a", max_position_embeddings=24, rope_scaling=rope)
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, 90, (4, 32)))
    with pytest.raises(UnsupportedModelError, match="choose a length of at most 24"):
        bitwright.evaluate(folder, ids, length=32)
    with pytest.raises(UnsupportedModelError, match="choose a length of at most 24"):
        bitwright.quantize(
            folder, tmp_path / "out", bits=4, group_size=32, calibration=ids, length=32
        )
    assert not [*tmp_path.glob("*out*")]
    report = bitwright.quantize(
        folder, tmp_path / "out", bits=4, group_size=32, calibration=ids, length=24
    )
    assert report.warnings == ()


def test_what_is_written_is_spelled_for_engines(tmp_path: Path) -> None:
    folder = changed(
        "llama-biases",
        tmp_path / "a",
        hidden_size=64.0,
        hidden_act="swish",
        dtype=...,
        torch_dtype="torch.float32",
    )
    np.testing.assert_array_equal(logits(folder), logits(TINY / "llama-biases"))
    bitwright.quantize(folder, tmp_path / "out", bits=4, group_size=32, format="awq", method="rtn")
    bitwright.convert(tmp_path / "out", tmp_path / "mlx", "mlx")
    for out in ("out", "mlx"):
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert config["hidden_act"] == "silu"
        assert (config["torch_dtype"], config["hidden_size"]) == ("float32", 64)
        assert type(config["hidden_size"]) is int
