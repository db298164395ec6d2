"""CWM: a Llama with windows in three of four layers."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("cwm",),
        of="llama",
        rules={
            "defaults": {
                "vocab_size": 128256,
                "hidden_size": 6144,
                "intermediate_size": 21504,
                "num_hidden_layers": 64,
                "num_attention_heads": 48,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "rope_theta": 1000000.0,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 16.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                },
                "sliding_window": 8192,
                "layer_types": None,
                "attention_bias": ...,
            },
            "slides": lambda _keys, layer: layer % 4 != 0,
            "query_bias": False,
            "output_bias": False,
        },
    ),
)
