"""Bamba: Mamba-2 mixers in most layers, attention in the others."""

from bitwright.models.architecture import Architecture, Mamba, Mlp, Names
from bitwright.models.keys import ConfigRules, Keys


def _kind(keys: Keys, layer: int) -> str | None:
    return None if layer in keys.integers("attn_layer_indices") else "linear_attention"


FAMILIES = (
    Architecture(
        model_types=("bamba",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 128000,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 262144,
                "partial_rotary_factor": 0.5,
                "rotates_in_part": True,
                "attention_bias": False,
                "mlp_bias": False,
                "attn_layer_indices": None,
                "layer_types": None,
                "mamba_n_heads": 128,
                "mamba_n_groups": 1,
                "mamba_d_state": 256,
                "mamba_d_head": "auto",
                "mamba_d_conv": 4,
                "mamba_expand": 2,
                "mamba_conv_bias": True,
                "mamba_proj_bias": False,
            },
            spellings={"layer_types": ("layers_block_type", "layer_types")},
            harmless=(
                "mamba_chunk_size",
                "num_logits_to_keep",
                "z_loss_coefficient",
                "attn_rotary_emb",
            ),
            disputed={"time_step_limit": ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])},
            mlp_bias="mlp_bias",
            convolution_bias="mamba_conv_bias",
            projection_bias="mamba_proj_bias",
            layer_kind=_kind,
            layer_kinds=("linear_attention",),
        ),
        names=(Names(final_norm="model.final_layernorm"),),
        mixers={"linear_attention": Mamba()},
        mlp=Mlp("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
        mlp_norm="pre_ff_layernorm",
    ),
)
