"""Ministral 3: a Mistral whose queries grow beyond the original length, as Llama 4's do."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("ministral3",),
        of="mistral",
        rules={
            "defaults": {
                "vocab_size": 131072,
                "num_hidden_layers": 34,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 262144,
                "sliding_window": None,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1000000.0,
                    "factor": 16.0,
                    "original_max_position_embeddings": 16384,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "llama_4_scaling_beta": 0.1,
                },
            },
            "rope_keys": ("llama_4_scaling_beta",),
        },
    ),
)
