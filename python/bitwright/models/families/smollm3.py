"""SmolLM 3: a Llama without RoPE in every fourth layer."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules, Keys


def _rotates(keys: Keys, layer: int) -> bool:
    said = keys.integers("no_rope_layers")
    if layer < len(said):
        return bool(said[layer])
    return (layer + 1) % keys.integer("no_rope_layer_interval") != 0


FAMILIES = (
    Architecture(
        model_types=("smollm3",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 128256,
                "hidden_size": 2048,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2000000.0,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "mlp_bias": False,
                "no_rope_layers": None,
                "no_rope_layer_interval": 4,
                "sliding_window": None,
                "use_sliding_window": False,
                "layer_types": None,
            },
            mlp_bias="mlp_bias",
            slides=lambda keys, layer: (
                keys.boolean("use_sliding_window") and not _rotates(keys, layer)
            ),
            rotates=_rotates,
        ),
    ),
)
