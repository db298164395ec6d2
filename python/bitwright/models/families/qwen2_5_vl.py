"""Qwen 2.5 VL: the text part of Qwen 2 VL."""

from bitwright.models.architecture import Relative, Wrapper, beside

FAMILIES = (
    Relative(model_types=("qwen2_5_vl_text",), of="qwen2_vl_text"),
    Wrapper(
        model_types=("qwen2_5_vl",),
        texts=("qwen2_5_vl_text",),
        names=(beside("model.language_model", tower="model.visual"), beside("model")),
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
