"""Precisions by the names that engines and other tools know them by."""

from typing import Any

SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"format": "compressed-tensors", "bits": 4, "group_size": 128, "grid": "symmetric"},
    "W4A16_ASYM": {
        "format": "compressed-tensors",
        "bits": 4,
        "group_size": 128,
        "grid": "zero_point",
    },
    "W8A16": {"format": "compressed-tensors", "bits": 8, "group_size": -1, "grid": "symmetric"},
}
"""Keyword arguments of `bitwright.quantize` by the names of compressed-tensors' presets."""
