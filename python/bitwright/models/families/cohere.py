"""Command R: attention and MLP side by side behind one LayerNorm without a bias."""

from bitwright.models.architecture import Architecture
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("cohere",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 256000,
                "hidden_size": 8192,
                "intermediate_size": 22528,
                "num_hidden_layers": 40,
                "num_attention_heads": 64,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 8192,
                "rope_theta": 500000.0,
                "tie_word_embeddings": True,
                "attention_bias": False,
                "logit_scale": 0.0625,
            },
            spellings={"rms_norm_eps": "layer_norm_eps"},
            harmless=("rms_norm_eps",),
            refused={"use_qk_norm": (False,)},
            parallel=True,
            interleaved=True,
        ),
        mlp_norm=None,
        norm_kind="biasless_layer_norm",
    ),
)
