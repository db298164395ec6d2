"""Gemma: scaled embeddings, norms that multiply by 1 + weight, and GELU."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("gemma",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 256000,
                "hidden_size": 3072,
                "intermediate_size": 24576,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "head_dim": 256,
                "hidden_act": "gelu_pytorch_tanh",
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "scaled_embedding": True,
            },
            # The first releases say gelu and mean its approximation by tanh.
            disputed={"hidden_activation": ("gelu", "gelu_pytorch_tanh")},
            meanings={"hidden_act": {"gelu": "gelu_pytorch_tanh"}},
        ),
        norm_kind="offset_rms_norm",
    ),
)
