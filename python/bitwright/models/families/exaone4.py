"""EXAONE 4: norms after attention and MLP, and rotation in layers with windows only."""

from bitwright.models.architecture import Architecture, Attention
from bitwright.models.keys import ConfigRules, Keys


def _slides(keys: Keys, layer: int) -> bool:
    types, pattern = keys.values.get("layer_types"), keys.get("sliding_window_pattern")
    if isinstance(types, list):
        return bool(types[layer] == "sliding_attention")
    if isinstance(pattern, str) and pattern:
        return pattern[layer % len(pattern)] == "L"
    return (layer + 1) % keys.integer("sliding_window_pattern") != 0


FAMILIES = (
    Architecture(
        model_types=("exaone4",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 102400,
                "intermediate_size": 16384,
                "num_key_value_heads": 32,
                "rms_norm_eps": 1e-5,
                "sliding_window": 4096,
                "sliding_window_pattern": 4,
                "layer_types": None,
            },
            query_bias=False,
            output_bias=False,
            slides=_slides,
            rotates=lambda keys, layer: (
                keys.optional_integer("sliding_window") is None or _slides(keys, layer)
            ),
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        attention_norm=None,
        mlp_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
)
