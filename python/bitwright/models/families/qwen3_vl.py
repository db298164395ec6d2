"""The text part of Qwen 3 VL: Qwen 3."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("qwen3_vl_text",),
        of="qwen3",
        rules={
            "defaults": {
                "max_position_embeddings": 128000,
                "rope_theta": 500000.0,
                "sliding_window": None,
            },
        },
    ),
)
