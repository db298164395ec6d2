"""Mamba-2 and Nemotron-H: blocks of one mixer each, here always Mamba-2's, there also attention, an MLP or
experts without gates."""

from bitwright.models.architecture import Architecture, Attention, Experts, Mamba, Mlp, Names
from bitwright.models.keys import MOST_LAYERS, ConfigRules, Keys

_MIXERS = {
    "linear_attention": Mamba(
        inputs="mixer.in_proj",
        convolution="mixer.conv1d",
        decay="mixer.A_log",
        step="mixer.dt_bias",
        skip="mixer.D",
        norm="mixer.norm",
        output="mixer.out_proj",
    )
}
_NAMES = Names("backbone.embeddings", "backbone.layers.{}", "backbone.norm_f")
_NO_LIMIT = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
_OF_STEPS = ("time_step_max", "time_step_floor", "chunk_size", "residual_in_fp32", "expand")
_KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_MEANT = {"mamba": "linear_attention", "attention": "full_attention"}


def _kinds(keys: Keys) -> list[str]:
    """Return the types of Nemotron-H's layers, however they are given."""
    said = keys.get("layer_types")
    if isinstance(said, list) and all(isinstance(each, str) for each in said):
        return [_MEANT.get(str(each), str(each)) for each in said]
    pattern = keys.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or not {*pattern} <= {*_KINDS} or not pattern:
        raise keys.wrong(
            "hybrid_override_pattern", f"must name each layer by one of {' '.join(_KINDS)}"
        )
    return [_KINDS[each] for each in pattern[: MOST_LAYERS + 1]]


FAMILIES = (
    Architecture(
        model_types=("mamba2",),
        rules=ConfigRules(
            defaults={
                "num_hidden_layers": 64,
                "num_attention_heads": 1,
                "vocab_size": 32768,
                "rms_norm_eps": 1e-5,
                "layer_types": None,
                "mamba_n_heads": 128,
                "mamba_n_groups": 8,
                "mamba_d_state": 128,
                "mamba_d_head": 64,
                "mamba_d_conv": 4,
                "use_bias": False,
                "use_conv_bias": True,
            },
            spellings={
                "rms_norm_eps": "layer_norm_epsilon",
                "num_attention_heads": "_heads_of_attention",
                "num_key_value_heads": "_heads_of_attention",
                "mamba_n_heads": "num_heads",
                "mamba_n_groups": "n_groups",
                "mamba_d_state": "state_size",
                "mamba_d_head": "head_dim",
                "mamba_d_conv": "conv_kernel",
            },
            harmless=(
                "num_attention_heads",
                "num_key_value_heads",
                "time_step_rank",
                "time_step_min",
                "rescale_prenorm_residual",
                *_OF_STEPS,
            ),
            uncomputed={"hidden_act": ("silu", "swish")},
            disputed={"time_step_limit": _NO_LIMIT},
            alone=True,
            convolution_bias="use_conv_bias",
            projection_bias="use_bias",
            layer_kind=lambda _keys, _layer: "linear_attention",
            layer_kinds=("linear_attention",),
        ),
        names=(_NAMES,),
        mixers=_MIXERS,
        attention_norm="norm",
        mlp_norm="norm",
    ),
    Architecture(
        model_types=("nemotron_h",),
        rules=ConfigRules(
            overlooked=("sliding_window",),
            defaults={
                "vocab_size": 131072,
                "intermediate_size": 21504,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "hidden_act": "relu2",
                "mlp_bias": False,
                "layer_types": None,
                "hybrid_override_pattern": "ME*-",
                "mamba_n_heads": 128,
                "mamba_n_groups": 8,
                "mamba_d_state": 128,
                "mamba_d_head": 64,
                "mamba_d_conv": 4,
                "time_step_min": 0.001,
                "use_bias": False,
                "use_conv_bias": True,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 7688,
                "shared_expert_intermediate_size": 7688,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "norm_topk_prob": True,
            },
            spellings={
                "rms_norm_eps": "layer_norm_epsilon",
                "hidden_act": "mlp_hidden_act",
                "layer_types": ("layers_block_type", "layer_types"),
                "mamba_n_heads": "mamba_num_heads",
                "mamba_n_groups": ("n_groups", "mamba_n_groups"),
                "mamba_d_state": "ssm_state_size",
                "mamba_d_head": "mamba_head_dim",
                "mamba_d_conv": ("conv_kernel", "mamba_d_conv"),
                "use_conv_bias": ("use_conv_bias", "mamba_conv_bias"),
                "time_step_min": ("time_step_min", "mamba_dt_min"),
                "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
            },
            harmless=(
                "hidden_act",
                "rms_norm_eps",
                "num_logits_to_keep",
                "rescale_prenorm_residual",
                "use_mamba_kernels",
                "mamba_ssm_cache_dtype",
                "mamba_proj_bias",
                "time_step_limit",
                "n_shared_experts",
                "moe_shared_expert_overlap",
                "mtp_layers_block_type",
                "mtp_hybrid_override_pattern",
                *_OF_STEPS,
            ),
            refused={"moe_latent_size": ()},
            disputed={"mamba_hidden_act": ("silu", "swish")},
            alone=True,
            layer_count=lambda keys: len(_kinds(keys)),
            layer_kind=lambda keys, layer: (
                kind if (kind := _kinds(keys)[layer]) != "full_attention" else None
            ),
            layer_kinds=("linear_attention", "mlp", "moe"),
            rotates=lambda _keys, _layer: False,
            is_sparse=lambda keys, layer: _kinds(keys)[layer] == "moe",
            topk_methods=("noaux_tc",),
            router_scores="sigmoid",
            query_bias=False,
            output_bias=False,
            mlp_bias="mlp_bias",
            convolution_bias="use_conv_bias",
            projection_bias="use_bias",
        ),
        names=(
            _NAMES,
            Names("model.embeddings", "model.layers.{}", "model.norm_f"),
        ),
        attention=Attention("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"),
        mixers=_MIXERS,
        mlp=Mlp(gate=None, up="mixer.up_proj", down="mixer.down_proj"),
        experts=Experts(
            router="mixer.gate",
            correction="mixer.gate.e_score_correction_bias",
            prefix="mixer.experts",
            mlp=Mlp(gate=None, up="up_proj", down="down_proj"),
            shared=Mlp(None, "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"),
            stacked="mixer.switch_mlp",
            in_stacks={"up": "fc1", "down": "fc2"},
        ),
        attention_norm="norm",
        mlp_norm="norm",
    ),
)
