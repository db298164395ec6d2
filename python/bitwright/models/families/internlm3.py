"""InternLM 3: a Llama with one key for the biases of attention, another for those of the MLP."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("internlm3",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 128512,
                "intermediate_size": 10240,
                "num_hidden_layers": 48,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 32768,
                "attention_bias": False,
                "mlp_bias": False,
            },
            spellings={
                "attention_bias": ("attention_bias", "qkv_bias"),
                "mlp_bias": ("mlp_bias", "bias"),
            },
            mlp_bias="mlp_bias",
        ),
    ),
)
