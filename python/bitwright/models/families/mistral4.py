"""Mistral Small 4: DeepSeek V3's latent attention and experts with a softmax router that nothing corrects,
and queries that grow beyond the original length."""

from bitwright.models.architecture import Experts, Mlp, Relative

FAMILIES = (
    Relative(
        model_types=("mistral4",),
        of="deepseek_v3",
        rules={
            "defaults": {
                "vocab_size": 131072,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "moe_intermediate_size": 2048,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "num_experts": 128,
                "num_experts_per_tok": 4,
                "routed_scaling_factor": 1.0,
                "q_lora_rank": 1024,
                "kv_lora_rank": 256,
                "qk_nope_head_dim": 64,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 0,
                "max_position_embeddings": 1048576,
            },
            "disputed": {"scoring_func": ("softmax",)},
            "router_scores": "softmax",
            "rope_keys": ("llama_4_scaling_beta",),
        },
        parts={
            "experts": Experts(
                shared=Mlp(
                    "mlp.shared_experts.gate_proj",
                    "mlp.shared_experts.up_proj",
                    "mlp.shared_experts.down_proj",
                ),
            )
        },
    ),
)
