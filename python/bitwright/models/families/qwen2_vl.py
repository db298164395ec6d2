"""Qwen 2 VL: a Qwen 2 that sees images; for text alone its three rotations are one."""

from bitwright.models.architecture import Relative, Wrapper, beside

FAMILIES = (
    Relative(
        model_types=("qwen2_vl_text",),
        of="qwen2",
        rules={
            "defaults": {
                "vocab_size": 152064,
                "hidden_size": 8192,
                "intermediate_size": 29568,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
                "max_window_layers": 80,
            },
            "meanings": {"rope_type": {"mrope": "default"}},
        },
    ),
    Wrapper(
        model_types=("qwen2_vl",),
        texts=("qwen2_vl_text",),
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
