"""Qwen's models that see: a decoder of one of its families beside a tower for images."""

from bitwright.models.architecture import Wrapper, beside

_OF_IMAGES = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)


def _seeing(model_type: str, other: str, *more: str) -> Wrapper:
    """Describe a model whose decoder is also found under another prefix."""
    return Wrapper(
        model_types=(model_type,),
        texts=(f"{model_type}_text",),
        names=(beside("model.language_model", tower="model.visual"), beside(other)),
        harmless=(*_OF_IMAGES, *more),
    )


FAMILIES = (
    _seeing("qwen2_vl", "model", "vision_token_id"),
    _seeing("qwen2_5_vl", "model", "vision_token_id"),
    _seeing("qwen3_vl", "language_model.model", "vision_token_id"),
    _seeing("qwen3_vl_moe", "language_model.model", "vision_token_id"),
    _seeing("qwen3_5", "language_model.model"),
    _seeing("qwen3_5_moe", "language_model.model"),
)
