"""Qwen 3: norms of queries and keys."""

from bitwright.models.architecture import Architecture, Attention
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("qwen3",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 151936,
                "intermediate_size": 22016,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "max_position_embeddings": 32768,
                "attention_bias": False,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "max_window_layers": 28,
                "layer_types": None,
            },
            slides=lambda keys, layer: (
                keys.boolean("use_sliding_window")
                and layer >= keys.integer("max_window_layers", zero=True)
            ),
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    ),
)
