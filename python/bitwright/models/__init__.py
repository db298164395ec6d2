"""Decoder families over the C++ kernels."""

from bitwright.models.architecture import Architecture
from bitwright.models.families import known_families

ARCHITECTURES: dict[str, Architecture] = known_families()

__all__ = ["ARCHITECTURES", "Architecture"]
