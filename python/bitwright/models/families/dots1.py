"""dots.llm1: DeepSeek V3's router and experts behind Qwen 3's attention."""

from bitwright.models.architecture import Experts, Mlp, Relative

FAMILIES = (
    Relative(
        model_types=("dots1",),
        of="glm4_moe",
        rules={
            "defaults": {
                "vocab_size": 152064,
                "hidden_size": 4608,
                "num_hidden_layers": 62,
                "num_attention_heads": 32,
                "num_key_value_heads": None,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
                "partial_rotary_factor": 1.0,
                "num_experts": 128,
                "num_experts_per_tok": 6,
                "n_shared_experts": None,
                "norm_topk_prob": False,
                "first_k_dense_replace": 0,
                "sliding_window": 4096,
                "max_window_layers": 62,
                "layer_types": None,
            },
            "head_norms": True,
            "output_bias": "attention_bias",
            "slides": lambda keys, layer: layer >= keys.integer("max_window_layers", zero=True),
        },
        parts={
            "experts": Experts(
                correction="mlp.gate.e_score_correction_bias",
                shared=Mlp(
                    "mlp.shared_experts.gate_proj",
                    "mlp.shared_experts.up_proj",
                    "mlp.shared_experts.down_proj",
                ),
                stacked="mlp.experts",
            )
        },
    ),
)
