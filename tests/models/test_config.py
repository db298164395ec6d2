"""config.json: both spellings mean the same, and wrong values are named."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import SHARED, TINY

from bitwright.checkpoint.reader import read_json_object
from bitwright.errors import BitwrightError, CheckpointError, UnsupportedModelError
from bitwright.models import ARCHITECTURES
from bitwright.models.config import ModelConfig, RopeConfig, plainly_spelled

SOURCE = Path("folder/config.json")
RULES = {name: family.rules for name, family in ARCHITECTURES.items()}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def parse(**raw: Any) -> ModelConfig:
    return ModelConfig.from_dict({"model_type": "llama", **raw}, SOURCE, RULES)


def test_defaults_are_those_of_llama() -> None:
    config = parse(unknown=1)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (4096, 11008, 32000)
    assert (config.num_hidden_layers, config.num_attention_heads) == (32, 32)
    assert (config.num_key_value_heads, config.head_dim) == (32, 128)
    assert (config.norm_eps, config.max_position_embeddings) == (1e-6, 2048)
    assert not any([config.tie_word_embeddings, config.query_bias, config.output_bias])
    assert not config.mlp_bias
    assert (config.hidden_act, config.dtype, config.rope) == ("silu", None, RopeConfig())
    assert config.raw == {"model_type": "llama", "unknown": 1}


def test_null_means_absent() -> None:
    config = parse(hidden_size=64, num_attention_heads=4, head_dim=None, num_key_value_heads=None)
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)


def test_head_dim_may_differ_from_the_share_of_hidden_size() -> None:
    assert parse(hidden_size=100, num_attention_heads=3, head_dim=64).head_dim == 64


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_theta": 500000, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {**LLAMA3, "rope_theta": 5e5}),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0}},
            {"rope_type": "yarn", "factor": 4, "mscale": 0.7, "mscale_all_dim": 0.0},
        ),
    ],
)
def test_old_and_new_spelling(old: dict[str, Any], new: dict[str, Any]) -> None:
    before, after = (
        parse(torch_dtype="bfloat16", **old),
        parse(dtype="bfloat16", rope_parameters=new),
    )
    assert before.rope == after.rope
    assert before.dtype == after.dtype == ml_dtypes.bfloat16


def test_rope_fields() -> None:
    assert parse(rope_parameters={**LLAMA3, "rope_theta": 5e4}).rope == RopeConfig(
        "llama3", 5e4, 8.0, 1.0, 4.0, 64
    )
    yarn = {"rope_type": "yarn", "factor": 2, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    yarn |= {"attention_factor": 0.5, "original_max_position_embeddings": 1024}
    assert parse(rope_parameters=yarn).rope == RopeConfig(
        rope_type="yarn",
        factor=2.0,
        original_max_position_embeddings=1024,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=0.5,
        truncate=False,
    )


def test_rope_lengths_and_factors_that_follow_from_others() -> None:
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
    original = parse(rope_parameters=yarn).rope.original_max_position_embeddings
    assert original == 2048
    rope = parse(rope_parameters=yarn, original_max_position_embeddings=128).rope
    assert rope.original_max_position_embeddings == 128
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    assert parse(rope_parameters=yarn).rope.factor == 4.0


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtypes(name: str) -> None:
    assert parse(dtype=name, torch_dtype="float64").dtype == np.dtype(name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 64.5),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", 10**30),
        ("hidden_size", 4097),
        ("vocab_size", [1]),
        ("num_key_value_heads", 5),
        ("head_dim", 63),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", 10**400),
        ("rms_norm_eps", True),
        ("tie_word_embeddings", "true"),
        ("attention_bias", 0),
        ("hidden_act", 3),
        ("dtype", 32),
        ("model_type", None),
        ("model_type", 7),
        ("rope_theta", "10000"),
        ("rope_theta", 0),
        ("rope_theta", 1.0),
        ("rope_scaling", "linear"),
        ("rope_parameters", ["linear"]),
        ("original_max_position_embeddings", {}),
    ],
)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    kind = LLAMA3 if key.startswith("original") else None
    with pytest.raises(CheckpointError) as caught:
        parse(**{"rope_parameters": kind, key: value})
    message = str(caught.value)
    assert not isinstance(caught.value, UnsupportedModelError)
    assert message.startswith(f'{SOURCE}: "')
    assert f'"{key}"' in message
    assert repr(value)[:15] in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": None}, 'factor" is None'),
        ({"factor": float("inf")}, 'factor" is inf'),
        ({"low_freq_factor": 0}, 'low_freq_factor" is 0'),
        ({"high_freq_factor": 1.0}, 'low_freq_factor" is 1.0'),
        ({"original_max_position_embeddings": 8.5}, 'original_max_position_embeddings" is 8.5'),
        ({"rope_type": "yarn", "beta_fast": -1}, 'beta_fast" is -1'),
        ({"rope_type": "yarn", "truncate": 1}, 'truncate" is 1'),
        ({"rope_type": "yarn", "mscale": "1"}, "mscale\" is '1'"),
        ({"rope_type": 3}, 'rope_type" is 3'),
        ({"rope_type": "longrope"}, 'short_factor" is absent, but must be a list of 64'),
        ({"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [0]}, "long_factor"),
    ],
)
def test_wrong_rope_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(rope_parameters={**LLAMA3, **change})
    assert '"rope_parameters.' in str(caught.value)
    with pytest.raises(CheckpointError, match=r'"rope_scaling\.factor" is absent'):
        parse(rope_scaling={"type": "linear"})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "mamba"}, "'mamba', which is not supported; supported are: .*deepseek_v2"),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu'.*supported are: silu"),
        ({"dtype": "float8_e8m0fnu"}, "'float8_e8m0fnu'.*float32, float16, bfloat16"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "'mrope'.*default, linear, dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "layer to layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ],
)
def test_unsupported_choices_list_the_supported(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        parse(**raw)
    assert str(SOURCE) in str(caught.value)


KEYS = sorted({key for rules in RULES.values() for key in rules.defaults})
KEYS += ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"]
KEYS += ["torch_dtype", "dtype", "partial_rotary_factor", "original_max_position_embeddings"]
KEYS += ["num_local_experts", "text_config", "hidden_activation", "norm_epsilon"]
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1, 64)
    | st.floats()
    | st.lists(st.integers(0, 9), max_size=3)
    | st.sampled_from(["silu", "float16", "linear", "llama3", "yarn", "default", "greedy"])
)
ROPE = st.dictionaries(
    st.sampled_from([*RopeConfig.__dataclass_fields__, "type"]), SCALAR | st.text()
)


@pytest.mark.filterwarnings("ignore::bitwright.BitwrightWarning")
@settings(deadline=None, max_examples=300)
@given(
    model_type=st.sampled_from(sorted(RULES)),
    raw=st.dictionaries(st.sampled_from(KEYS), SCALAR),
    rope=st.dictionaries(st.sampled_from(["rope_scaling", "rope_parameters"]), SCALAR | ROPE),
)
def test_strange_values_never_surprise(
    model_type: str, raw: dict[str, Any], rope: dict[str, Any]
) -> None:
    with suppress(BitwrightError):
        config = parse(**{"model_type": model_type, **raw, **rope})
        assert config.rotary_dim % 2 == 0
        assert config.num_attention_heads % config.num_key_value_heads == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the test models in {SHARED}")
def test_shared_models() -> None:
    paths = sorted(SHARED.glob("models/**/config.json"))
    assert paths
    for path in paths:
        raw = read_json_object(path)
        config = ModelConfig.from_dict(raw, path, RULES)
        assert config.hidden_size == raw["hidden_size"]
        assert str(config.dtype) == raw.get("dtype", raw.get("torch_dtype"))
        rope = raw.get("rope_parameters") or raw
        assert config.rope.theta == rope.get("full_attention", rope)["rope_theta"]


OLD_AND_NEW: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "gemma3_text",
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            "layer_types": ["sliding_attention", "full_attention"] * 13,
        },
    ),
    (
        "gemma2",
        {"sliding_window": 100},
        {
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention"] * 13,
        },
    ),
    (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 0},
        {
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 32,
        },
    ),
    (
        "phi3",
        {
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
            },
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 131072,
        },
    ),
    (
        "glm4",
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
    ),
    ("qwen3_moe", {"num_experts": 16}, {"num_local_experts": 16}),
    ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
    (
        "mixtral",
        {"rope_theta": 1e6, "torch_dtype": "bfloat16"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16"},
    ),
]


@pytest.mark.parametrize(("model_type", "old", "new"), OLD_AND_NEW)
def test_old_and_new_spelling_of_families(
    model_type: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    before, after = (parse(model_type=model_type, **raw) for raw in (old, new))
    if before.sliding_window != after.sliding_window:
        assert "sliding_attention" not in before.layer_types
        before = replace(before, sliding_window=after.sliding_window)
    assert replace(before, raw={}) == replace(after, raw={})


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ({"hidden_size": 64.0}, {"hidden_size": 64}),
        ({"vocab_size": 96.0, "head_dim": 16.0}, {"vocab_size": 96, "head_dim": 16}),
        ({"hidden_act": "swish"}, {"hidden_act": "silu"}),
        ({"torch_dtype": "auto"}, {}),
        ({"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"dtype": None, "torch_dtype": "half"}, {"dtype": "float16"}),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64.0}}, {"rope_scaling": LLAMA3}),
    ],
)  # fmt: skip
def test_spellings_of_the_same(spelled: dict[str, Any], plain: dict[str, Any]) -> None:
    assert replace(parse(**spelled), raw={}) == replace(parse(**plain), raw={})
    written = plainly_spelled(spelled)
    assert replace(parse(**written), raw={}) == replace(parse(**plain), raw={})
    assert not {"swish", "auto", "torch.bfloat16", "torch.float16"} & {*map(str, written.values())}
    assert not any(type(each) is float for each in written.values())


@pytest.mark.parametrize(
    ("model_type", "key", "spelled", "plain"),
    [
        ("qwen3_moe", "mlp_only_layers", [0.0, 2.0], [0, 2]),
        ("qwen2", "max_window_layers", 3.0, 3),
        ("gemma2", "hidden_activation", "swish", "silu"),
    ],
)
def test_spellings_of_the_same_in_families(
    model_type: str, key: str, spelled: Any, plain: Any
) -> None:
    found = parse(model_type=model_type, **{key: spelled})
    assert replace(found, raw={}) == replace(parse(model_type=model_type, **{key: plain}), raw={})


def test_plain_spelling_leaves_others_alone() -> None:
    assert plainly_spelled({"text_config": {"hidden_size": 64.0}}) == {
        "text_config": {"hidden_size": 64}
    }
    for path in TINY:
        raw = read_json_object(path / "config.json")
        assert json.dumps(plainly_spelled(raw)) == json.dumps(raw)


def test_null_means_none_where_transformers_says_so() -> None:
    config = parse(model_type="gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert config.attention_softcap is None
    assert config.final_softcap is None
    config = parse(model_type="deepseek_v3", q_lora_rank=None)
    assert config.latent is not None
    assert config.latent.query_rank is None
    config = parse(model_type="mistral", sliding_window=None)
    assert set(config.layer_types) == {"full_attention"}
    assert set(parse(model_type="mistral").layer_types) == {"sliding_attention"}


def test_text_section_of_multimodal_configs() -> None:
    config = parse(model_type="gemma3", dtype="bfloat16", text_config={"hidden_size": 128})
    assert (config.hidden_size, config.dtype) == (128, ml_dtypes.bfloat16)
    with pytest.raises(CheckpointError, match=r'"text_config.hidden_size" is 0'):
        parse(model_type="gemma3", text_config={"hidden_size": 0})


@pytest.mark.parametrize("whole", [True, False, None])
@pytest.mark.parametrize("part", [True, False, None])
def test_the_whole_says_whether_its_head_is_the_embedding(
    whole: bool | None, part: bool | None
) -> None:
    """As in transformers, whose text part has no head; what the part says of one is overlooked."""
    said = {} if whole is None else {"tie_word_embeddings": whole}
    text = {"hidden_size": 128} | ({} if part is None else {"tie_word_embeddings": part})
    config = parse(model_type="gemma3", text_config=text, **said)
    assert config.tie_word_embeddings is (whole is not False)


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (  # Qwen 2.5 VL, before its text part had an object of its own
            {
                "model_type": "qwen2_5_vl",
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
                "vision_config": {"hidden_size": 8},
                "vision_token_id": 5,
            },
            {"family": "qwen2_5_vl/qwen2_5_vl_text", "hidden_size": 64, "query_bias": True},
        ),
        (  # Mistral Small 3.1
            {
                "model_type": "mistral3",
                "text_config": {"model_type": "mistral", "head_dim": 128, "sliding_window": None},
                "vision_config": {},
                "spatial_merge_size": 2,
            },
            {"family": "mistral3/mistral", "head_dim": 128, "layer_types": (FULL,) * 32},
        ),
        (  # Granite 4 H Micro
            {
                "model_type": "granitemoehybrid",
                "num_hidden_layers": 2,
                "layer_types": ["mamba", "attention"],
                "position_embedding_type": "nope",
                "num_local_experts": 0,
                "num_experts_per_tok": 0,
                "shared_intermediate_size": 80,
                "normalization_function": "rmsnorm",
            },
            {
                "layer_types": ("linear_attention", FULL),
                "rotates": (False, False),
                "experts": None,
                "intermediate_size": 80,
            },
        ),
        (  # LFM 2
            {
                "model_type": "lfm2",
                "num_hidden_layers": 3,
                "full_attn_idxs": [1],
                "block_ff_dim": 6656,
                "block_ffn_dim_multiplier": 1.0,
                "tie_embedding": True,
                "conv_L_cache": 3,
            },
            {"layer_types": ("conv", FULL, "conv"), "intermediate_size": 4608, "convolved": 3},
        ),
        (  # Qwen 3 Next
            {"model_type": "qwen3_next", "num_hidden_layers": 4, "full_attention_interval": 4},
            {"layer_types": ("linear_attention",) * 3 + (FULL,), "rotary_dim": 64},
        ),
        (  # MiniMax M2
            {"model_type": "minimax_m2", "rotary_dim": 64, "use_qk_norm": True},
            {"rotary_dim": 64, "head_dim": 128, "interleaved": False},
        ),
        (  # Gemma 4 31B
            {
                "model_type": "gemma4_text",
                "num_hidden_layers": 6,
                "hidden_size_per_layer_input": 0,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 2,
                "use_bidirectional_attention": "vision",
            },
            {"layer_types": (SLIDING,) * 5 + (FULL,), "attention_scale": 1.0},
        ),
    ],
    ids=lambda each: str(each.get("model_type", "")),
)
def test_released_files_are_understood(raw: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw, SOURCE, RULES)
    assert {key: getattr(config, key) for key in wanted} == wanted


def test_sizes_of_single_layers() -> None:
    raw = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_hidden_layers": 6}
    config = ModelConfig.from_dict(raw, SOURCE, RULES)
    assert [config.at(layer).head_dim for layer in range(6)] == [256] * 5 + [512]
    assert config.rope.rotary_dim == 512
    own = {**raw, "per_layer_config": {"05": {"head_dim": 128, "num_key_value_heads": 1}}}
    config = ModelConfig.from_dict(own, SOURCE, RULES)
    assert (config.at(5).head_dim, config.at(5).num_key_value_heads) == (128, 1)
    assert config.at(0) is not config.at(5)
    for wrong in ({"05": {"hidden_size": 3}}, {"05": {"head_dim": "8"}}, {"05": 3}):
        with pytest.raises(CheckpointError, match="head_dim|hidden_size|05"):
            ModelConfig.from_dict({**raw, "per_layer_config": wrong}, SOURCE, RULES)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, '"hidden_size_per_layer_input" is 256'),  # the default
        (
            {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2},
            '"num_kv_shared_layers" is 2',
        ),
        (
            {"hidden_size_per_layer_input": 0, "enable_moe_block": True},
            '"enable_moe_block" is True',
        ),
    ],
)
def test_what_is_not_computed_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{named}.*--backend transformers"):
        ModelConfig.from_dict({"model_type": "gemma4_text", **changes}, SOURCE, RULES)
