"""StarCoder 2: LayerNorms, biases everywhere, and an MLP without a gate."""

from bitwright.models.architecture import Architecture, Mlp
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("starcoder2",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 49152,
                "hidden_size": 3072,
                "intermediate_size": 12288,
                "num_hidden_layers": 30,
                "num_attention_heads": 24,
                "num_key_value_heads": 2,
                "hidden_act": "gelu_pytorch_tanh",
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "tie_word_embeddings": True,
                "sliding_window": None,
                "use_bias": True,
            },
            spellings={"rms_norm_eps": "norm_epsilon"},
            harmless=("rms_norm_eps",),
            disputed={"norm_type": ("layer_norm",), "mlp_type": ("default",)},
            query_bias="use_bias",
            output_bias="use_bias",
            mlp_bias="use_bias",
            slides=lambda _keys, _layer: True,
        ),
        mlp=Mlp(gate=None, up="mlp.c_fc", down="mlp.c_proj"),
        norm_kind="layer_norm",
    ),
)
