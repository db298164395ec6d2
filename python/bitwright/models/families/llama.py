"""Llama 1, 2, 3 and whatever else declares ``model_type: llama``: the pattern itself."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("llama",),
        rules=ConfigRules(
            defaults={"attention_bias": False, "mlp_bias": False}, mlp_bias="mlp_bias"
        ),
    ),
)
