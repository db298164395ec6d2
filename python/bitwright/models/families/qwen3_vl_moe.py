"""Qwen 3 VL with mixtures of experts, which its files stack with inputs before outputs."""

from bitwright.models.architecture import Experts, Relative, Stack

FAMILIES = (
    Relative(
        model_types=("qwen3_vl_moe_text",),
        of="qwen3_moe",
        rules={
            "defaults": {
                "intermediate_size": 5632,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "max_position_embeddings": 128000,
                "rope_theta": 500000.0,
                "tie_word_embeddings": True,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "sliding_window": None,
            },
            "always_normalized": True,
        },
        parts={
            "experts": Experts(
                stack=Stack("mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True)
            )
        },
    ),
)
