"""Solar Open: GLM 4.5's experts in every layer, behind Llama's attention."""

from bitwright.models.architecture import Attention, Relative

FAMILIES = (
    Relative(
        model_types=("solar_open",),
        of="glm4_moe",
        rules={
            "defaults": {
                "vocab_size": 196608,
                "num_hidden_layers": 48,
                "num_attention_heads": 64,
                "head_dim": 128,
                "rope_theta": 1000000.0,
                "partial_rotary_factor": 1.0,
                "moe_intermediate_size": 1280,
                "first_k_dense_replace": 0,
                "use_qk_norm": ...,
            },
            "head_norms": False,
            "overlooked": ("use_qk_norm",),
        },
        parts={"attention": Attention()},
    ),
)
