"""The text parts of Qwen 3.5 and 3.6: Qwen 3 Next with a linear for each input of the delta-nets, dense or
with mixtures of experts."""

from bitwright.models.architecture import GatedDelta, Relative

_BOTH = {
    "harmless": ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"),
    "disputed": {"attn_output_gate": (True,)},
}
_MIXERS = {"linear_attention": GatedDelta()}

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
            **_BOTH,
        },
        parts={"mixers": _MIXERS, "experts": None},
    ),
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
            **_BOTH,
        },
        parts={"mixers": _MIXERS},
    ),
)
