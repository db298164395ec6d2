"""Decoder families over the C++ kernels."""

from bitwright.models.architecture import Architecture
from bitwright.models.llama import LLAMA

ARCHITECTURES: dict[str, Architecture] = {family.model_type: family for family in (LLAMA,)}

__all__ = ["ARCHITECTURES", "Architecture"]
