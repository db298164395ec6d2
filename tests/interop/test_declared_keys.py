"""Every key that a configuration class declares is read, harmless or refused, as transformers has it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import run_client

import bitwright
from bitwright import BitwrightWarning, UnsupportedModelError
from bitwright.checkpoint import gguf_metadata
from bitwright.formats import awq, compressed_tensors, declared, gptq, mlx
from bitwright.models import ARCHITECTURES, config_keys
from bitwright.models.config import understood_keys

pytestmark = pytest.mark.slow
Variant = tuple[str, dict[str, Any], dict[str, Any]]


@cache
def client_keys() -> dict[str, Any]:
    kinds = sorted({family.partition("/")[0] for family in ARCHITECTURES})
    printed = run_client("gptqmodel", "print_declared_keys.py", *kinds)
    found: dict[str, Any] = json.loads(printed.partition("DECLARED\n")[2])
    return found


def test_families_know_the_keys_of_their_classes() -> None:
    known_to_all = config_keys.HARMLESS | {*config_keys.REFUSED, *config_keys.DISPUTED}
    missing = {}
    for model_type, keys in client_keys()["models"].items():
        rules = next(
            family.rules
            for name, family in ARCHITECTURES.items()
            if name.partition("/")[0] == model_type
        )
        own = {*rules.harmless, *rules.refused, *rules.disputed, *rules.overlooked}
        missing[model_type] = {*keys} - known_to_all - own - understood_keys(rules)
    assert {kind: keys for kind, keys in missing.items() if keys} == {}
    assert {*client_keys()["rope"]} <= config_keys.ROPE_KEYS


def test_no_key_is_both_read_and_overlooked() -> None:
    for family in ARCHITECTURES.values():
        rules = family.rules
        own = {*rules.harmless, *rules.refused, *rules.disputed, *rules.overlooked}
        assert not own & understood_keys(rules)
        assert not config_keys.HARMLESS - {"model_type", "dtype", "torch_dtype"} & understood_keys(
            rules
        )


def test_the_lists_were_compared_with_this_transformers() -> None:
    said = client_keys()["versions"]["transformers"].split(".")
    assert tuple(map(int, said[:2])) == config_keys.COMPARED_WITH


@pytest.mark.parametrize(
    ("tool", "settings"),
    [
        ("gptq", gptq.SETTINGS),
        ("gptqmodel", gptq.SETTINGS),
        ("awq", awq.SETTINGS),
        ("auto-round", declared.AUTO_ROUND),
        ("compressed-tensors", compressed_tensors.SETTINGS),
        ("scheme", compressed_tensors.SCHEME),
        ("weights", compressed_tensors.WEIGHTS),
    ],
)
def test_formats_know_the_keys_of_their_classes(tool: str, settings: declared.Settings) -> None:
    assert {*client_keys()[tool]} - settings.keys() == set()


def test_mlx_layers_have_no_other_keys() -> None:
    taken = {*json.loads(run_client("mlx", "print_mlx_keys.py"))}
    assert taken - mlx.SETTINGS.keys() == set()


def test_gguf_keys_are_spelled_as_there() -> None:
    lists = [gguf_metadata._READ, gguf_metadata._HARMLESS, *gguf_metadata._READ_BY.values()]
    ours = {key for each in lists for key in each.split()} | {*gguf_metadata._NEUTRAL}
    assert ours - {*client_keys()["gguf"]} == {"rope.scale_linear"}  # of files from 2023


SLIDING, FULL = "sliding_attention", "full_attention"
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
WINDOWS = {"head_dim": 16, "sliding_window": 7, "use_sliding_window": True}
COMPUTED: dict[str, Variant] = {
    "mistral-layers": (
        "ministral",
        {"head_dim": 16, "sliding_window": 7, "layer_types": [SLIDING, FULL]},
        {"model_type": "mistral"},
    ),
    "mistral-old-words": (
        "ministral",
        {"head_dim": 16, "sliding_window": 7, "layer_types": [FULL, SLIDING]},
        {"model_type": "mistral", "layer_types": ["attention", SLIDING]},
    ),
    "mistral-null": ("mistral", {"sliding_window": 7, "head_dim": 16}, {"layer_types": None}),
    "qwen3-layers": ("qwen3", {**WINDOWS, "layer_types": [SLIDING, FULL]}, {}),
    "qwen2_moe-layers": (
        "qwen2_moe",
        {**WINDOWS, **MOE, "layer_types": [FULL, SLIDING], "mlp_only_layers": [0]},
        {},
    ),
    "smollm3-layers": (
        "smollm3",
        {**WINDOWS, "layer_types": [SLIDING, FULL], "no_rope_layers": [0, 1]},
        {},
    ),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 70}, {}),
    "qwen3-dynamic": ("qwen3", {"head_dim": 16, "rope_parameters": DYNAMIC}, {}),
    "olmo2-dynamic": ("olmo2", {}, {"rope_scaling": {"type": "dynamic", "factor": 3}}),
    "gemma3-capped": (
        "gemma3_text",
        {"head_dim": 16, "num_hidden_layers": 3, "final_logit_softcapping": 3.0},
        {"attn_logit_softcapping": 0.5},
    ),
    "llama-swish": ("llama", {"hidden_act": "swish"}, {}),
    "llama-half": ("llama", {}, {"dtype": "half", "torch_dtype": "float32"}),
    "gemma-gelu": ("gemma", {"head_dim": 16}, {"hidden_act": "gelu", "hidden_activation": None}),
    "qwen2-denied": ("qwen2", {}, {"attention_bias": False, "qkv_bias": False}),
    "llama-window": ("llama", {}, {"sliding_window": 5}),
    "deepseek_v2": ("deepseek_v2", LATENT, {"norm_topk_prob": False, "scoring_func": "softmax"}),
}
REFUSED: dict[str, Variant] = {
    "llama-bidirectional": ("llama", {}, {"is_causal": False}),
    "qwen3-bidirectional": ("qwen3", {"head_dim": 16}, {"is_causal": False}),
    "mixtral-bidirectional": ("mixtral", {"num_local_experts": 4}, {"is_causal": False}),
    "gemma3-bidirectional": (
        "gemma3_text",
        {"head_dim": 16, "num_hidden_layers": 3},
        {"use_bidirectional_attention": True},
    ),
}
OVERLOOKED: dict[str, Variant] = {  # by transformers, not by every engine
    "llama-layers": ("llama", {}, {"layer_types": [SLIDING, FULL], "sliding_window": 5}),
    "mistral-biases": ("mistral", {}, {"attention_bias": True}),
    "gemma2-bidirectional": ("gemma2", {"head_dim": 16}, {"use_bidirectional_attention": True}),
    "deepseek_v2-normalized": ("deepseek_v2", LATENT, {"norm_topk_prob": True}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    (out / "variants.json").write_text(json.dumps(COMPUTED | REFUSED | OVERLOOKED))
    print(run_client("gptqmodel", "make_with_transformers.py", out / "variants.json", out))
    return out


@pytest.mark.filterwarnings("ignore::bitwright.BitwrightWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_logits_are_those_of_transformers(made: Path, name: str) -> None:
    expected = np.load(made / name / "expected.npz")
    logits = bitwright.load_model(made / name).logits(expected["input_ids"])
    np.testing.assert_allclose(logits, expected["after"], atol=2e-4 * expected["after"].std())


def test_overlooked_keys_are_named(made: Path) -> None:
    for name, key in (("gemma3-capped", "attn_logit_soft"), ("llama-window", "sliding_window")):
        with pytest.warns(BitwrightWarning, match=f"{key}.*transformers overlooks"):
            bitwright.load_model(made / name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_computes_otherwise_is_refused(made: Path, name: str) -> None:
    expected = np.load(made / name / "expected.npz")
    assert np.abs(expected["after"] - expected["before"]).max() > expected["before"].std()
    with pytest.raises(UnsupportedModelError, match=r"is (True|False), .*--backend transformers"):
        bitwright.load_model(made / name)


@pytest.mark.filterwarnings("ignore::bitwright.BitwrightWarning")
@pytest.mark.parametrize("name", OVERLOOKED)
def test_what_transformers_overlooks_is_refused(made: Path, name: str) -> None:
    expected = np.load(made / name / "expected.npz")
    np.testing.assert_array_equal(expected["after"], expected["before"])
    with pytest.raises(UnsupportedModelError, match=r"delete the key from config\.json"):
        bitwright.load_model(made / name)
