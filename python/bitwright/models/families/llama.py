"""Llama 1, 2, 3 and whatever else declares ``model_type: llama``: the pattern itself."""

from bitwright.checkpoint import ConfigRules
from bitwright.models.architecture import Architecture

FAMILIES = (
    Architecture(
        model_types=("llama",),
        rules=ConfigRules(
            defaults={"attention_bias": False, "mlp_bias": False}, mlp_bias="mlp_bias"
        ),
    ),
)
