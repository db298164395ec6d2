"""Seed OSS: a Llama with biases on queries, keys and values."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("seed_oss",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 155136,
                "intermediate_size": 27648,
                "num_hidden_layers": 64,
                "num_attention_heads": 80,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 524288,
                "attention_bias": True,
                "attention_out_bias": False,
                "mlp_bias": False,
            },
            output_bias="attention_out_bias",
            mlp_bias="mlp_bias",
        ),
    ),
)
