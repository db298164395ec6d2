"""LFM 2 with mixtures of experts, whose choice a bias corrects."""

from bitwright.models.architecture import Experts, Mlp, Relative

FAMILIES = (
    Relative(
        model_types=("lfm2_moe",),
        of="lfm2",
        rules={
            "defaults": {
                "hidden_size": 2048,
                "intermediate_size": 7168,
                "block_auto_adjust_ff_dim": False,
                "num_experts": 32,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1792,
                "num_dense_layers": 2,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
            },
            "disputed": {"use_expert_bias": (True,)},
            "is_sparse": lambda keys, layer: layer >= keys.integer("num_dense_layers", zero=True),
            "router_scores": "sigmoid",
        },
        parts={
            "experts": Experts(
                router="feed_forward.gate",
                correction="feed_forward.expert_bias",
                prefix="feed_forward.experts",
                mlp=Mlp("w1", "w3", "w2"),
                stacked="feed_forward.switch_mlp",
            )
        },
    ),
)
