"""Granite 3: a Llama with multipliers on embeddings, scores, residuals and logits."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("granite",),
        rules=ConfigRules(
            defaults={
                "attention_bias": False,
                "mlp_bias": False,
                "embedding_multiplier": 1.0,
                "attention_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            },
            mlp_bias="mlp_bias",
        ),
    ),
)
