"""OLMo 2: norms after attention and MLP instead of before, and over whole queries and keys."""

from bitwright.models.architecture import Architecture, Attention
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("olmo2",),
        rules=ConfigRules(
            defaults={"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False}
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", whole=True),
        attention_norm=None,
        mlp_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
)
