"""ERNIE 4.5: a Llama whose rotary pairs are neighbours."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("ernie4_5",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 103424,
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 18,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "rope_theta": 500000.0,
                "tie_word_embeddings": True,
                "use_bias": False,
            },
            query_bias="use_bias",
            output_bias="use_bias",
            mlp_bias="use_bias",
            interleaved=True,
        ),
    ),
)
