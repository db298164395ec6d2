"""Hunyuan dense: a Llama with norms of queries and keys after their rotation."""

from bitwright.models.architecture import Architecture, Attention
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("hunyuan_v1_dense",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 290943,
                "rms_norm_eps": 1e-5,
                "attention_bias": False,
            },
            harmless=("eod_token_id", "eod_id", "sep_token_id"),
            disputed={"use_qk_norm": (True,), "use_cla": (False,)},
            rope_keys=("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        ),
        attention=Attention(
            query_norm="self_attn.query_layernorm",
            key_norm="self_attn.key_layernorm",
            norms_last=True,
        ),
    ),
)
