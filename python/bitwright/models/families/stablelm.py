"""StableLM: a Llama with LayerNorms, a quarter of each head rotated."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("stablelm",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 50304,
                "hidden_size": 2560,
                "intermediate_size": 6912,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "partial_rotary_factor": 0.25,
                "rotates_in_part": True,
                "use_qkv_bias": False,
                "use_parallel_residual": False,
            },
            spellings={
                "rms_norm_eps": "layer_norm_eps",
                "partial_rotary_factor": ("partial_rotary_factor", "rope_pct"),
            },
            harmless=("rms_norm_eps", "norm_eps"),
            refused={"qk_layernorm": (False,)},
            parallel="use_parallel_residual",
            query_bias="use_qkv_bias",
            output_bias=False,
        ),
        norm_kind="layer_norm",
    ),
)
