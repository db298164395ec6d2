"""OLMoE: mixtures of experts behind attention with norms over whole queries and keys."""

from bitwright.models.architecture import Architecture, Attention, Experts
from bitwright.models.keys import ConfigRules

FAMILIES = (
    Architecture(
        model_types=("olmoe",),
        rules=ConfigRules(
            defaults={
                "vocab_size": 50304,
                "hidden_size": 2048,
                "intermediate_size": 2048,
                "num_hidden_layers": 16,
                "num_attention_heads": 16,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "attention_bias": False,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
            is_sparse=lambda _keys, _layer: True,
            refused={"clip_qkv": ()},
        ),
        attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", whole=True),
        experts=Experts(),
    ),
)
