"""Llama 1, 2, 3 and whatever else declares ``model_type: llama``."""

from bitwright.models.architecture import Architecture

LLAMA = Architecture(
    model_type="llama",
    embedding="model.embed_tokens",
    block="model.layers.{}",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
)
