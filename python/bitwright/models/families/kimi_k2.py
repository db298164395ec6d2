"""Kimi K2: a DeepSeek V3 under another name."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("kimi_k2",),
        of="deepseek_v3",
        rules={
            "defaults": {"vocab_size": 163840, "num_experts": 384, "n_group": 1, "topk_group": 1}
        },
    ),
)
