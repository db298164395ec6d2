"""GLM 4.5 to 4.7: DeepSeek V3's router and experts behind plain attention, half of each head rotated."""

from bitwright.models.architecture import Architecture, Attention, Experts, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("glm4_moe",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 151552,
                "intermediate_size": 10944,
                "num_hidden_layers": 46,
                "num_attention_heads": 96,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "partial_rotary_factor": 0.5,
                "rotates_in_part": True,
                "attention_bias": False,
                "use_qk_norm": False,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 1408,
                "n_shared_experts": 1,
                "routed_scaling_factor": 1.0,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "first_k_dense_replace": 1,
            },
            head_norms="use_qk_norm",
            output_bias=False,
            is_sparse=lambda keys, layer: layer >= keys.integer("first_k_dense_replace", zero=True),
            disputed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
            topk_methods=("noaux_tc",),
            router_scores="sigmoid",
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
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
