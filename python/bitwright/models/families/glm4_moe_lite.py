"""GLM 4.7 Flash: DeepSeek V3 in other sizes."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("glm4_moe_lite",),
        of="deepseek_v3",
        rules={
            "defaults": {
                "vocab_size": 154880,
                "hidden_size": 2048,
                "intermediate_size": 10240,
                "moe_intermediate_size": 1536,
                "num_hidden_layers": 47,
                "num_attention_heads": 20,
                "num_key_value_heads": 20,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 202752,
                "num_experts": 64,
                "num_experts_per_tok": 4,
                "routed_scaling_factor": 1.8,
                "q_lora_rank": 768,
                "qk_nope_head_dim": 192,
                "v_head_dim": 256,
                "n_group": 1,
                "topk_group": 1,
                "mlp_layer_types": None,
                "first_k_dense_replace": 1,
            },
        },
    ),
)
