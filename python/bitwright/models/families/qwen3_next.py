"""Qwen 3 Next: three gated delta-nets to one attention, whose output has a gate."""

from bitwright.models.architecture import Architecture, Attention, Experts, GatedDelta, Mlp
from bitwright.models.keys import ConfigRules, Keys


def _kind(keys: Keys, layer: int) -> str | None:
    return "linear_attention" if (layer + 1) % keys.integer("full_attention_interval") else None


FAMILIES = (
    Architecture(
        model_types=("qwen3_next",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 256,
                "max_position_embeddings": 32768,
                "partial_rotary_factor": 0.25,
                "rotates_in_part": True,
                "attention_bias": False,
                "layer_types": None,
                "full_attention_interval": 4,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                "num_experts": 512,
                "num_experts_per_tok": 10,
                "moe_intermediate_size": 512,
                "shared_expert_intermediate_size": 512,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": None,
            },
            layer_kind=_kind,
            layer_kinds=("linear_attention",),
            is_sparse=lambda keys, layer: (
                layer not in keys.integers("mlp_only_layers")
                and (layer + 1) % keys.integer("decoder_sparse_step") == 0
            ),
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", gated=True),
        mixers={
            "linear_attention": GatedDelta(
                inputs=("linear_attn.in_proj_qkvz",), controls=("linear_attn.in_proj_ba",)
            )
        },
        experts=Experts(
            shared=Mlp(
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.shared_expert.down_proj",
            ),
            shared_gate="mlp.shared_expert_gate",
        ),
        norm_kind="offset_rms_norm",
    ),
)
