"""The text part of Qwen 2 VL and 2.5 VL: Qwen 2, whose three rotations are one for text alone."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("qwen2_vl_text", "qwen2_5_vl_text"),
        of="qwen2",
        rules={
            "defaults": {
                "vocab_size": 152064,
                "hidden_size": 8192,
                "intermediate_size": 29568,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
                "max_window_layers": 80,
            },
            "meanings": {"rope_type": {"mrope": "default"}},
        },
    ),
)
