"""DeepSeek V3 and R1: as V2, with a router that scores by sigmoid and corrects its choice by a bias."""

from bitwright.models.architecture import Architecture, Experts, LatentAttention, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("deepseek_v3",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 129280,
                "hidden_size": 7168,
                "intermediate_size": 18432,
                "num_hidden_layers": 61,
                "num_attention_heads": 128,
                "num_key_value_heads": 128,
                "max_position_embeddings": 4096,
                "attention_bias": False,
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "rope_interleave": True,
                "num_experts": 256,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 2048,
                "n_shared_experts": 1,
                "routed_scaling_factor": 2.5,
                "n_group": 8,
                "topk_group": 4,
                "topk_method": "noaux_tc",
                "norm_topk_prob": True,
                "first_k_dense_replace": 3,
            },
            interleaved="rope_interleave",
            is_sparse=lambda keys, layer: layer >= keys.integer("first_k_dense_replace", zero=True),
            harmless=("qk_head_dim",),
            disputed={"scoring_func": ("sigmoid",)},
            topk_methods=("noaux_tc",),
            router_scores="sigmoid",
            latent_attention=True,
        ),
        attention=LatentAttention(),
        experts=Experts(
            correction="mlp.gate.e_score_correction_bias",
            shared=Mlp(
                "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj",
                "mlp.shared_experts.down_proj",
            ),
        ),
    ),
)
