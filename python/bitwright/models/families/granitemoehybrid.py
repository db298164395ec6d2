"""Granite 4: Mamba-2 mixers in most layers, and the shared expert alone where there are no others."""

from bitwright.models.architecture import Mamba, Mlp, Relative

FAMILIES = (
    Relative(
        model_types=("granitemoehybrid",),
        of="granitemoeshared",
        rules={
            "defaults": {
                "shared_expert_intermediate_size": 1024,
                "position_embedding_type": None,
                "layer_types": None,
                "mamba_n_heads": 128,
                "mamba_n_groups": 1,
                "mamba_d_state": 256,
                "mamba_d_head": 64,
                "mamba_d_conv": 4,
                "mamba_expand": 2,
                "mamba_conv_bias": True,
                "mamba_proj_bias": False,
            },
            "spellings": {"layer_types": ("layer_types", "layers_block_type")},
            "harmless": ("mamba_chunk_size", "normalization_function", "init_method"),
            "disputed": {
                "time_step_limit": ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
            },
            "mlp_width": lambda keys: keys.integer("shared_expert_intermediate_size"),
            "is_sparse": lambda keys, _layer: keys.integer("num_experts", zero=True) > 0,
            "rotates": lambda keys, _layer: keys.get("position_embedding_type") == "rope",
            "convolution_bias": "mamba_conv_bias",
            "projection_bias": "mamba_proj_bias",
            "layer_kind": lambda _keys, _layer: "linear_attention",
            "layer_kinds": ("linear_attention",),
        },
        parts={
            "mixers": {"linear_attention": Mamba()},
            "mlp": Mlp(down="shared_mlp.output_linear", fused="shared_mlp.input_linear"),
        },
    ),
)
