"""gpt-oss: sinks in attention, biases everywhere, and experts with clamped gates."""

from bitwright.models.architecture import Architecture, Attention, Experts, Mlp, Stack
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("gpt_oss",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 201088,
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": 36,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 131072,
                "rope_theta": 150000.0,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
                "attention_bias": True,
                "sliding_window": 128,
                "layer_types": None,
                "num_experts": 128,
                "num_experts_per_tok": 4,
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
            },
            harmless=("experts_per_token", "initial_context_length"),
            mlp_bias=True,
            slides=lambda _keys, layer: layer % 2 == 0,
            is_sparse=lambda _keys, _layer: True,
            always_normalized=True,
        ),
        attention=Attention(sinks="self_attn.sinks"),
        experts=Experts(
            router="mlp.router",
            router_bias=True,
            mlp=Mlp("gate_proj", "up_proj", "down_proj"),
            stacked="mlp.experts",
            stack=Stack(
                "mlp.experts.gate_up_proj",
                "mlp.experts.down_proj",
                transposed=True,
                interleaved=True,
                gate_up_bias="mlp.experts.gate_up_proj_bias",
                down_bias="mlp.experts.down_proj_bias",
            ),
        ),
    ),
)
