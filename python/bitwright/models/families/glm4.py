"""GLM 4 (0414): norms on both sides of attention and MLP, and interleaved RoPE on half of each head."""

from bitwright.models.architecture import Architecture, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("glm4",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 151552,
                "intermediate_size": 13696,
                "num_hidden_layers": 40,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rms_norm_eps": 1.5625e-7,
                "max_position_embeddings": 131072,
                "attention_bias": True,
                "partial_rotary_factor": 0.5,
                "rotates_in_part": True,
            },
            interleaved=True,
            output_bias=False,
        ),
        mlp=Mlp(fused="mlp.gate_up_proj"),
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
    ),
)
