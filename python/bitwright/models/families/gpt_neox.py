"""GPT-NeoX and Pythia: attention and an MLP without a gate side by side, each behind its own LayerNorm."""

from dataclasses import replace

from bitwright.models.architecture import Architecture, Attention, Mlp, Names
from bitwright.models.keys import ConfigRules

_NAMES = Names("gpt_neox.embed_in", "gpt_neox.layers.{}", "gpt_neox.final_layer_norm", "embed_out")

FAMILIES = (
    Architecture(
        model_types=("gpt_neox",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 50432,
                "hidden_size": 6144,
                "intermediate_size": 24576,
                "num_hidden_layers": 44,
                "num_attention_heads": 64,
                "hidden_act": "gelu",
                "rms_norm_eps": 1e-5,
                "partial_rotary_factor": 0.25,
                "rotates_in_part": True,
                "attention_bias": True,
                "use_parallel_residual": True,
            },
            spellings={
                "rms_norm_eps": "layer_norm_eps",
                "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
                "rope_theta": ("rope_theta", "rotary_emb_base"),
                "num_key_value_heads": "num_attention_heads",
            },
            harmless=("rms_norm_eps", "num_key_value_heads"),
            parallel="use_parallel_residual",
            two_norms=True,
            mlp_bias=True,
        ),
        names=(_NAMES, replace(_NAMES, head="lm_head")),
        attention=Attention(
            output="attention.dense", fused="attention.query_key_value", by_head=True
        ),
        mlp=Mlp(gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
        norm_kind="layer_norm",
    ),
)
