"""Phi 1 to 2: attention and an MLP without a gate side by side behind one LayerNorm, and biases everywhere,
also of the head."""

from bitwright.models.architecture import Architecture, Attention, Mlp, Names
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("phi",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 51200,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 24,
                "hidden_act": "gelu_new",
                "rms_norm_eps": 1e-5,
                "partial_rotary_factor": 0.5,
                "rotates_in_part": True,
            },
            spellings={"rms_norm_eps": "layer_norm_eps"},
            harmless=("rms_norm_eps",),
            refused={"qk_layernorm": (False,)},
            parallel=True,
            query_bias=True,
            output_bias=True,
            mlp_bias=True,
            head_bias=True,
        ),
        names=(Names(final_norm="model.final_layernorm"),),
        attention=Attention(output="self_attn.dense"),
        mlp=Mlp(gate=None, up="mlp.fc1", down="mlp.fc2"),
        mlp_norm=None,
        norm_kind="layer_norm",
    ),
)
