"""LFM 2: short convolutions between gates in most layers, attention in the others."""

from bitwright.models.architecture import Architecture, Attention, Mlp, Names, ShortConvolution
from bitwright.models.keys import ConfigRules, Keys


def _kind(keys: Keys, layer: int) -> str | None:
    said = keys.get("full_attn_idxs")
    return None if said is None or layer in keys.integers("full_attn_idxs") else "conv"


def _width(keys: Keys) -> int:
    """Of the MLP: two thirds of what is said, rounded up."""
    width = keys.integer("intermediate_size")
    if not keys.boolean("block_auto_adjust_ff_dim"):
        return width
    width = int(keys.number("block_ffn_dim_multiplier") * int(2 * width / 3))
    multiple = keys.integer("block_multiple_of")
    return (width + multiple - 1) // multiple * multiple


FAMILIES = (
    Architecture(
        model_types=("lfm2",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 65536,
                "hidden_size": 2560,
                "intermediate_size": 12288,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 128000,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": True,
                "conv_bias": False,
                "conv_L_cache": 3,
                "block_multiple_of": 256,
                "block_ffn_dim_multiplier": 1.0,
                "block_auto_adjust_ff_dim": True,
                "full_attn_idxs": None,
                "layer_types": None,
            },
            spellings={
                "rms_norm_eps": ("norm_eps", "block_norm_eps"),
                "intermediate_size": ("block_ff_dim", "intermediate_size"),
                "tie_word_embeddings": ("tie_embedding", "tie_word_embeddings"),
            },
            harmless=(
                "rms_norm_eps",
                "block_dim",
                "block_mlp_init_scale",
                "block_out_init_scale",
                "block_use_swiglu",
                "block_use_xavier_init",
                "conv_dim",
                "conv_dim_out",
                "conv_use_xavier_init",
                "num_heads",
                "theta",
            ),
            query_bias=False,
            output_bias=False,
            mlp_width=_width,
            layer_kind=_kind,
            layer_kinds=("conv",),
        ),
        names=(Names(final_norm="model.embedding_norm"),),
        attention=Attention(
            output="self_attn.out_proj",
            query_norm="self_attn.q_layernorm",
            key_norm="self_attn.k_layernorm",
        ),
        mixers={"conv": ShortConvolution()},
        mlp=Mlp("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        attention_norm="operator_norm",
        mlp_norm="ffn_norm",
    ),
)
