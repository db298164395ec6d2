"""Mistral: a Llama with sliding-window attention."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("mistral",),
        rules=ConfigRules(
            defaults={
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
                "layer_types": None,  # with them transformers calls it Ministral
            },
            slides=lambda _keys, _layer: True,
        ),
    ),
)
