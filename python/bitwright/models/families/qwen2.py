"""Qwen 1.5, 2 and 2.5: biases on queries, keys and values, and windows in the upper layers."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("qwen2",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 151936,
                "intermediate_size": 22016,
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "max_window_layers": 28,
                "layer_types": None,
            },
            query_bias=True,
            harmless=("attention_bias", "qkv_bias"),  # there are biases, whatever these say
            output_bias=False,
            slides=lambda keys, layer: (
                keys.boolean("use_sliding_window")
                and layer >= keys.integer("max_window_layers", zero=True)
            ),
        ),
    ),
)
