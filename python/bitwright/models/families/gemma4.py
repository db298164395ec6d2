"""Gemma 4, dense: heads of two sizes, keys that are values, and a factor after every block."""

from typing import Any

from bitwright.models.architecture import Architecture, Attention, Wrapper, beside
from bitwright.models.keys import ConfigRules, Keys


def _slides(keys: Keys, layer: int) -> bool:
    return (layer + 1) % 6 != 0 and layer + 1 < keys.integer("num_hidden_layers")


def _sizes(keys: Keys, layer: int, full: bool) -> dict[str, Any]:
    shares = full and keys.boolean("attention_k_eq_v")
    sizes: dict[str, Any] = {"keys_are_values": True} if shares else {}
    own = keys.section("per_layer_config")
    if own is not None:  # as transformers 5 writes it
        key = next((each for each in own.values if each.isdecimal() and int(each) == layer), "")
        said = own.section(key)
        for name in () if said is None else said.values:
            if said is not None and name not in ("head_dim", "num_key_value_heads"):
                raise said.wrong(name, "only head_dim and num_key_value_heads may differ")
            sizes[name] = 0 if said is None else said.integer(name)
    elif full:
        sizes["head_dim"] = keys.integer("global_head_dim")
        if shares and keys.get("num_global_key_value_heads") is not None:
            sizes["num_key_value_heads"] = keys.integer("num_global_key_value_heads")
    return sizes


FAMILIES = (
    Architecture(
        model_types=("gemma4_text",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 262144,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 30,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "global_head_dim": 512,
                "num_global_key_value_heads": None,
                "attention_k_eq_v": False,
                "per_layer_config": None,
                "hidden_act": "gelu_pytorch_tanh",
                "max_position_embeddings": 131072,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "scaled_embedding": True,
                "attention_multiplier": 1.0,
                "sliding_window": 512,
                "layer_types": None,
                "final_logit_softcapping": None,
                "hidden_size_per_layer_input": 256,
                "num_kv_shared_layers": 0,
                "enable_moe_block": False,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "full_attention": {
                        "rope_type": "proportional",
                        "rope_theta": 1000000.0,
                        "partial_rotary_factor": 0.25,
                    },
                },
            },
            spellings={"hidden_act": "hidden_activation"},
            harmless=(
                "hidden_act",
                "vocab_size_per_layer_input",
                "use_double_wide_mlp",
                "num_experts",
                "top_k_experts",
                "moe_intermediate_size",
            ),
            uncomputed={
                "hidden_size_per_layer_input": (0,),
                "num_kv_shared_layers": (0,),
                "enable_moe_block": (False,),
            },
            refused={"use_bidirectional_attention": (False, "vision")},
            two_ropes=True,
            layer_sizes=_sizes,
            slides=_slides,
        ),
        attention=Attention(
            query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", value_norm=True
        ),
        mlp_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        layer_scale="layer_scalar",
    ),
    Wrapper(
        model_types=("gemma4",),
        texts=("gemma4_text",),
        names=(beside("model.language_model"), beside("language_model.model")),
        harmless=(
            "vision_config",
            "audio_config",
            "vision_soft_tokens_per_image",
            "image_token_id",
            "boi_token_id",
            "eoi_token_id",
            "audio_token_id",
            "boa_token_id",
            "eoa_token_id",
            "eoa_token_index",
            "video_token_id",
        ),
    ),
)
