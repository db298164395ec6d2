"""Granite 3 with mixtures of experts, one of which all tokens pass."""

from bitwright.models.architecture import Experts, Mlp, Relative, Stack

FAMILIES = (
    Relative(
        model_types=("granitemoeshared",),
        of="granitemoe",
        rules={
            "defaults": {"shared_expert_intermediate_size": 0},
            "spellings": {"shared_expert_intermediate_size": "shared_intermediate_size"},
        },
        parts={
            "experts": Experts(
                router="block_sparse_moe.router.layer",
                prefix="block_sparse_moe.experts",
                shared=Mlp(down="shared_mlp.output_linear", fused="shared_mlp.input_linear"),
                stacked="block_sparse_moe.switch_mlp",
                stack=Stack(
                    "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"
                ),
            )
        },
    ),
)
