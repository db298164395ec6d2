"""Helium: a Llama whose rotary pairs are neighbours."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("helium",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 48000,
                "hidden_size": 2560,
                "intermediate_size": 7040,
                "num_hidden_layers": 24,
                "num_attention_heads": 20,
                "num_key_value_heads": 20,
                "head_dim": 128,
                "rms_norm_eps": 1e-8,
                "max_position_embeddings": 4096,
                "rope_theta": 100000.0,
                "attention_bias": False,
                "mlp_bias": False,
            },
            interleaved=True,
            output_bias=False,
            mlp_bias="mlp_bias",
        ),
    ),
)
