"""Qwen 3.5 and 3.6 with mixtures of experts: Qwen 3 Next with a linear for each input."""

from bitwright.models.architecture import GatedDelta, Relative, Wrapper, beside

FAMILIES = (
    Relative(
        model_types=("qwen3_5_moe_text",),
        of="qwen3_next",
        rules={
            "defaults": {
                "vocab_size": 248320,
                "num_hidden_layers": 40,
                "num_experts": 256,
                "num_experts_per_tok": 8,
            },
            "is_sparse": lambda _keys, _layer: True,
            "always_normalized": True,
            "harmless": (
                "mtp_num_hidden_layers",
                "mtp_use_dedicated_embeddings",
                "mamba_ssm_dtype",
            ),
            "disputed": {"attn_output_gate": (True,)},
        },
        parts={"mixers": {"linear_attention": GatedDelta()}},
    ),
    Wrapper(
        model_types=("qwen3_5_moe",),
        texts=("qwen3_5_moe_text",),
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
        ),
    ),
)
