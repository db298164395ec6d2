"""ERNIE 4.5 with mixtures of experts, whose choice a bias corrects."""

from bitwright.models.architecture import Experts, Mlp, Relative
from bitwright.models.keys import Keys


def _is_sparse(keys: Keys, layer: int) -> bool:
    last = keys.get("moe_layer_end_index")
    within = last in (None, -1) or layer <= keys.integer("moe_layer_end_index", zero=True)
    first = keys.integer("moe_layer_start_index", zero=True)
    return within and layer >= first and (layer + 1) % keys.integer("moe_layer_interval") == 0


FAMILIES = (
    Relative(
        model_types=("ernie4_5_moe",),
        of="ernie4_5",
        rules={
            "defaults": {
                "hidden_size": 2560,
                "intermediate_size": 12288,
                "num_hidden_layers": 28,
                "num_attention_heads": 20,
                "num_key_value_heads": 4,
                "head_dim": None,
                "num_experts": 64,
                "num_experts_per_tok": 6,
                "moe_intermediate_size": 1536,
                "n_shared_experts": 2,
                "moe_layer_start_index": 1,
                "moe_layer_end_index": None,
                "moe_layer_interval": 1,
                "mlp_layer_types": None,
            },
            "spellings": {
                "num_experts": ("moe_num_experts", "num_experts"),
                "num_experts_per_tok": ("moe_k", "num_experts_per_tok"),
                "n_shared_experts": ("moe_num_shared_experts", "num_shared_experts"),
            },
            "harmless": ("moe_norm_min", "moe_capacity", "moe_use_aux_free", "moe_gate"),
            "is_sparse": _is_sparse,
            "always_normalized": True,
        },
        parts={
            "experts": Experts(
                correction="mlp.moe_statics.e_score_correction_bias",
                correction_axes=(1,),
                shared=Mlp(
                    "mlp.shared_experts.gate_proj",
                    "mlp.shared_experts.up_proj",
                    "mlp.shared_experts.down_proj",
                ),
            )
        },
    ),
)
