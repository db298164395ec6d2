"""Qwen 3.5 and 3.6, dense: Qwen 3 Next with a linear for each input of the delta-nets."""

from bitwright.models.architecture import GatedDelta, Relative, Wrapper, beside

FAMILIES = (
    Relative(
        model_types=("qwen3_5_text",),
        of="qwen3_next",
        rules={
            "defaults": {
                "vocab_size": 248320,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 32,
                "num_key_value_heads": 4,
                **dict.fromkeys(
                    (
                        "num_experts",
                        "num_experts_per_tok",
                        "moe_intermediate_size",
                        "shared_expert_intermediate_size",
                        "norm_topk_prob",
                        "decoder_sparse_step",
                        "mlp_only_layers",
                    ),
                    ...,
                ),
            },
            "is_sparse": lambda _keys, _layer: False,
            "harmless": (
                "mtp_num_hidden_layers",
                "mtp_use_dedicated_embeddings",
                "mamba_ssm_dtype",
            ),
            "disputed": {"attn_output_gate": (True,)},
        },
        parts={"mixers": {"linear_attention": GatedDelta()}, "experts": None},
    ),
    Wrapper(
        model_types=("qwen3_5",),
        texts=("qwen3_5_text",),
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
