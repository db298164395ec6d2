"""Mixtral: a Mistral whose MLPs are mixtures of experts."""

from bitwright.models.architecture import Architecture, Experts, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("mixtral",),
        rules=ConfigRules(
            defaults={
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "rope_theta": 1000000.0,
                "sliding_window": None,
                "num_experts": 8,
                "num_experts_per_tok": 2,
            },
            query_bias=False,
            output_bias=False,
            slides=lambda _keys, _layer: True,
            is_sparse=lambda _keys, _layer: True,
            disputed={"norm_topk_prob": (True,), "routed_scaling_factor": (1,)},
            always_normalized=True,
        ),
        experts=Experts(
            router="block_sparse_moe.gate",
            prefix="block_sparse_moe.experts",
            mlp=Mlp("w1", "w3", "w2"),
            stacked="block_sparse_moe.switch_mlp",
        ),
    ),
)
