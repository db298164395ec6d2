"""Command R7B and Command A: Command R with windows and rotation in three of four layers."""

from bitwright.models.architecture import Relative
from bitwright.models.keys import Keys


def _slides(keys: Keys, layer: int) -> bool:
    types = keys.values.get("layer_types")
    if isinstance(types, list):
        return bool(types[layer] == "sliding_attention")
    return (layer + 1) % keys.integer("sliding_window_pattern") != 0


FAMILIES = (
    Relative(
        model_types=("cohere2",),
        of="cohere",
        rules={
            "defaults": {
                "head_dim": 128,
                "rope_theta": 10000.0,
                "sliding_window": 4096,
                "sliding_window_pattern": 4,
                "layer_types": None,
            },
            "harmless": (
                "_sliding_window_pattern",
                "order_of_interleaved_layers",
                "cache_implementation",
            ),
            "slides": _slides,
            "rotates": _slides,
        },
    ),
)
