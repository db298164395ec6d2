"""MiniMax M2: Mixtral's experts with a sigmoid router, and norms over whole queries and keys."""

from bitwright.models.architecture import Architecture, Attention, Experts, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("minimax_m2",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 200064,
                "hidden_size": 3072,
                "intermediate_size": 1536,
                "num_hidden_layers": 62,
                "num_attention_heads": 48,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 196608,
                "rope_theta": 5000000.0,
                "rotates_in_part": True,
                "rotary_dim": None,
                "num_experts": 256,
                "num_experts_per_tok": 8,
            },
            query_bias=False,
            output_bias=False,
            is_sparse=lambda _keys, _layer: True,
            harmless=("num_mtp_modules", "mtp_transformer_layers", "use_mtp", "qk_norm_type"),
            disputed={
                "use_qk_norm": (True,),
                "use_routing_bias": (True,),
                "scoring_func": ("sigmoid",),
                "shared_intermediate_size": (0,),
            },
            router_scores="sigmoid",
            always_normalized=True,
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", whole=True),
        experts=Experts(
            router="block_sparse_moe.gate",
            correction="block_sparse_moe.e_score_correction_bias",
            prefix="block_sparse_moe.experts",
            mlp=Mlp("w1", "w3", "w2"),
            stacked="block_sparse_moe.switch_mlp",
        ),
    ),
)
