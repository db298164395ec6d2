"""Phi 3 and 4: queries, keys and values in one tensor, gate and up in another."""

from bitwright.models.architecture import Architecture, Attention, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("phi3",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 32064,
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "sliding_window": None,
                "rotates_in_part": True,
            },
            query_bias=False,
            output_bias=False,
            slides=lambda _keys, _layer: True,
        ),
        attention=Attention(fused="self_attn.qkv_proj"),
        mlp=Mlp(fused="mlp.gate_up_proj"),
    ),
)
