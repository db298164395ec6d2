"""Gemma 3: as Gemma 2 with norms of queries and keys in place of soft caps, and one rotary base for full
layers, another for sliding ones. Only the text part of multimodal checkpoints is read."""

from bitwright.models.architecture import Architecture, Attention, Wrapper, beside
from bitwright.models.keys import ConfigRules

_OF_IMAGES = (
    "vision_config",
    "mm_tokens_per_image",
    *(f"{which}_token_{kind}" for which in ("image", "boi", "eoi") for kind in ("id", "index")),
)
_TEXT = Architecture(
    model_types=("gemma3_text",),
    rules=ConfigRules(
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "scaled_embedding": True,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
            "final_logit_softcapping": None,
        },
        spellings={"hidden_act": "hidden_activation"},
        harmless=("hidden_act", "_sliding_window_pattern"),
        refused={"use_bidirectional_attention": (False,)},
        overlooked=("attn_logit_softcapping",),
        slides=lambda keys, layer: (layer + 1) % keys.integer("sliding_window_pattern") != 0,
    ),
    attention=Attention(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm_kind="offset_rms_norm",
)

FAMILIES = (
    _TEXT,
    Wrapper(
        model_types=("gemma3",),
        texts=("gemma3_text",),
        names=(
            beside("language_model.model", "language_model.lm_head"),
            beside("model.language_model"),
        ),
        harmless=_OF_IMAGES,
    ),
)
