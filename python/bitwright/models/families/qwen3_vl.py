"""Qwen 3 VL: a Qwen 3 that sees images."""

from bitwright.models.architecture import Relative, Wrapper, beside

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
    Wrapper(
        model_types=("qwen3_vl",),
        texts=("qwen3_vl_text",),
        names=(
            beside("model.language_model", tower="model.visual"),
            beside("language_model.model"),
        ),
        harmless=(
            "vision_config",
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "vision_token_id",
        ),
    ),
)
