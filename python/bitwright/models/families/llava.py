"""LLaVA and what is built like it: a decoder of another family beside a tower for images. Text alone is
computed as that family does."""

from bitwright.models.architecture import Wrapper, beside

NAMES = (
    beside("language_model.model", "language_model.lm_head"),
    beside("model.language_model"),
)
_OF_IMAGES = (
    *("vision_config", "projector_hidden_act", "multimodal_projector_bias"),
    *("vision_feature_layer", "vision_feature_select_strategy", "image_seq_length"),
    *("image_token_index", "image_token_id", "video_token_index", "video_token_id"),
    *(
        "image_grid_pinpoints",
        "image_newline",
        "use_image_newline_parameter",
        "vision_aspect_ratio",
    ),
    *("downsample_ratio", "spatial_pool_mode", "spatial_pool_stride", "video_seq_length"),
    *("projector_layernorm_eps", "adapter_layer_norm_eps", "alignment_intermediate_size"),
    *("downsample_factor", "spatial_merge_size", "visual_indicator_token_ids"),
    *("vision_feature_layers", "projector_pooling_ratio", "vision_use_cls_token"),
)


def _around(model_types: tuple[str, ...], texts: tuple[str, ...]) -> Wrapper:
    return Wrapper(model_types=model_types, texts=texts, names=NAMES, harmless=_OF_IMAGES)


# Not Gemma 2: transformers leaves out the soft cap of its logits here, and other engines do not.
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
_QWENS = ("qwen2", "qwen3", "llama", "qwen3_moe", "gpt_oss")

FAMILIES = (
    _around(("llava", "llava_next", "llava_next_video", "vipllava", "video_llava"), _LLAMAS),
    _around(
        ("llava_onevision", "internvl", "got_ocr2", "ovis2", "video_llama_3", "fast_vlm"),
        _QWENS,
    ),
    _around(("lighton_ocr",), ("qwen3", "qwen2")),
)
