"""Granite 3 with mixtures of experts, and with an expert that all tokens pass."""

from bitwright.models.architecture import Experts, Relative, Stack

_EXPERTS = Experts(
    router="block_sparse_moe.router.layer",
    prefix="block_sparse_moe.experts",
    stacked="block_sparse_moe.switch_mlp",
    stack=Stack("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)
FAMILIES = (
    Relative(
        model_types=("granitemoe",),
        of="granite",
        rules={
            "defaults": {"num_experts": 8, "num_experts_per_tok": 2},
            "mlp_bias": False,
            "is_sparse": lambda _keys, _layer: True,
            "always_normalized": True,
        },
        parts={"experts": _EXPERTS},
    ),
)
