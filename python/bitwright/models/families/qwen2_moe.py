"""Qwen 1.5 and 2 with mixtures of experts, one of them shared by all tokens and weighted by a gate."""

from bitwright.models.architecture import Architecture, Experts, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("qwen2_moe",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "max_position_embeddings": 32768,
                "qkv_bias": True,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "max_window_layers": 28,
                "layer_types": None,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": None,
            },
            disputed={"routed_scaling_factor": (1,)},
            query_bias="qkv_bias",
            output_bias=False,
            slides=lambda keys, layer: (
                keys.boolean("use_sliding_window")
                and layer % 2 == 0
                and layer < keys.integer("max_window_layers", zero=True)
            ),
            is_sparse=lambda keys, layer: (
                layer not in keys.integers("mlp_only_layers")
                and (layer + 1) % keys.integer("decoder_sparse_step") == 0
            ),
        ),
        experts=Experts(
            shared=Mlp(
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.shared_expert.down_proj",
            ),
            shared_gate="mlp.shared_expert_gate",
        ),
    ),
)
