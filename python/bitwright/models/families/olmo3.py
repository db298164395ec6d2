"""OLMo 3: OLMo 2 with windows in three of four layers, whose rotation no scaling changes."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("olmo3",),
        of="olmo2",
        rules={
            "defaults": {
                "rope_theta": 500000.0,
                "sliding_window": 4096,
                "layer_types": None,
            },
            "two_ropes": True,
            "slides": lambda _keys, layer: (layer + 1) % 4 != 0,
        },
    ),
)
