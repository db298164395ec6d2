"""DeepSeek V2: latent attention, and mixtures of many small experts above the first layers."""

from bitwright.models.architecture import Architecture, Experts, LatentAttention, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("deepseek_v2",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 102400,
                "attention_bias": False,
                "mlp_bias": False,
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "num_experts": 64,
                "num_experts_per_tok": None,
                "moe_intermediate_size": 1407,
                "n_shared_experts": 2,
                "routed_scaling_factor": 1.0,
                "n_group": None,
                "topk_group": None,
                "topk_method": "greedy",
                "first_k_dense_replace": 0,
            },
            mlp_bias="mlp_bias",
            interleaved=True,
            is_sparse=lambda keys, layer: layer >= keys.integer("first_k_dense_replace", zero=True),
            harmless=("qk_head_dim",),
            disputed={"norm_topk_prob": (False,), "rope_interleave": (True,)},
            topk_methods=("greedy", "group_limited_greedy"),
            latent_attention=True,
        ),
        attention=LatentAttention(),
        experts=Experts(
            shared=Mlp(
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
                "mlp.shared_experts.down_proj",
            )
        ),
    ),
)
