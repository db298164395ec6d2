"""Gemma 2: norms on both sides of attention and MLP, soft caps, and windows in every other layer."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("gemma2",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 256000,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "hidden_act": "gelu_pytorch_tanh",
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "scaled_embedding": True,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "layer_types": None,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            spellings={"hidden_act": "hidden_activation"},
            harmless=("hidden_act",),
            slides=lambda _keys, layer: layer % 2 == 0,
        ),
        mlp_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        norm_kind="offset_rms_norm",
    ),
)
