"""Qwen 3 with mixtures of experts."""

from bitwright.models.architecture import Architecture, Attention, Experts
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("qwen3_moe",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 24,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "attention_bias": False,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": None,
            },
            disputed={"routed_scaling_factor": (1,)},
            slides=lambda keys, _layer: keys.boolean("use_sliding_window"),
            is_sparse=lambda keys, layer: (
                layer not in keys.integers("mlp_only_layers")
                and (layer + 1) % keys.integer("decoder_sparse_step") == 0
            ),
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        experts=Experts(),
    ),
)
