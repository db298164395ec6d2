"""Ministral: a Mistral whose layers say one by one whether they have windows."""

from bitwright.models.architecture import Relative

FAMILIES = (Relative(model_types=("ministral",), of="mistral"),)
