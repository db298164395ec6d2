"""Makes tests/data/tiny/NAME: random models with the hidden states and logits that transformers computes.

Run once, in an environment of its own, and commit the result::

    python3 -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0
    /tmp/hf/bin/pip install transformers==5.23.0 safetensors
    /tmp/hf/bin/python tests/make_tiny_models.py [NAME ...]

The references are those of the model as ``from_pretrained`` loads it, in float32.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

DATA = Path(__file__).parent / "data" / "tiny"
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
SCALED = {**YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3}
MROPE = {"rope_type": "default", "rope_theta": 10000.0}
INTERLEAVED = {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
SMALL_SHAPE = SHAPE | SMALL
SMALL_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2} | {
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
SIGMOID_EXPERTS = SMALL_EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
DELTA = {
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
SCAN = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "in_channels": 1,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "num_position_embeddings": 4,
}
LATENT_SIZES = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.5,
    "key_multiplier": 0.7,
    "mlp_multipliers": [0.8, 1.2],
    "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [0.7, 1.3, 0.8, 1.2, 0.9],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.6,
}
INDEXER = {
    "num_key_value_heads": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
VARIANTS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama-biases": (
        "llama",
        torch.float32,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "llama-llama3": ("llama", torch.bfloat16, {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", torch.float16, {"rope_parameters": YARN}),
    "llama-linear": (
        "llama",
        torch.float32,
        {"rope_parameters": LINEAR, "num_key_value_heads": 4},
    ),
    "mistral": ("mistral", torch.bfloat16, {"sliding_window": 7}),
    "qwen2": (
        "qwen2",
        torch.float16,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        torch.bfloat16,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
    "gemma2": (
        "gemma2",
        torch.bfloat16,
        {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "gemma3",
        torch.bfloat16,
        {
            "text_config": {
                **SHAPE,
                "num_hidden_layers": 3,
                "head_dim": 16,
                "sliding_window": 9,
                "sliding_window_pattern": 3,
                "query_pre_attn_scalar": 16,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 95,
            "boi_token_index": 93,
            "eoi_token_index": 94,
        },
    ),
    "phi3-longrope": (
        "phi3",
        torch.bfloat16,
        {"rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": 30},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        torch.bfloat16,
        {**LATENT, "q_lora_rank": None, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3-qlora": (
        "deepseek_v3",
        torch.float16,
        {
            **LATENT,
            "q_lora_rank": 24,
            "n_group": 2,
            "topk_group": 1,
            "attention_bias": True,
            "rope_interleave": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        },
    ),
    "olmo2": ("olmo2", torch.bfloat16, {}),
    "granite": (
        "granite",
        torch.bfloat16,
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.5,
            "mlp_bias": True,
        },
    ),
    "smollm3": ("smollm3", torch.bfloat16, {"num_hidden_layers": 4}),
    "glm4": ("glm4", torch.bfloat16, {"head_dim": 16}),
    "starcoder2": ("starcoder2", torch.float16, {"sliding_window": 20}),
    "ministral": (
        "ministral",
        torch.bfloat16,
        SMALL
        | {
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral3-ministral3": (
        "mistral3",
        torch.bfloat16,
        {
            "text_config": {
                **SMALL_SHAPE,
                "model_type": "ministral3",
                "head_dim": 8,
                "rope_parameters": SCALED,
            },
            "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 63,
            "vision_feature_layer": -1,
        },
    ),
    "qwen2_vl": (
        "qwen2_vl",
        torch.bfloat16,
        {
            "text_config": {
                **SMALL_SHAPE,
                "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1},
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        torch.bfloat16,
        {
            "text_config": {
                **SMALL_SHAPE,
                "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {**QWEN_TOWER, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        torch.bfloat16,
        {
            "text_config": {**SMALL_SHAPE, "head_dim": 8, "rope_parameters": INTERLEAVED},
            "vision_config": {**QWEN_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        torch.bfloat16,
        {
            "text_config": {
                **SMALL_SHAPE,
                **SMALL_EXPERTS,
                "head_dim": 8,
                "rope_parameters": INTERLEAVED,
            },
            "tie_word_embeddings": False,
            "vision_config": {**QWEN_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        },
    ),
    "internlm3": (
        "internlm3",
        torch.float16,
        SMALL | {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    ),
    "glm4_moe": (
        "glm4_moe",
        torch.bfloat16,
        SMALL
        | SIGMOID_EXPERTS
        | {"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 8},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        torch.bfloat16,
        SMALL
        | SIGMOID_EXPERTS
        | {**LATENT_SIZES, "num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "minimax_m2": (
        "minimax_m2",
        torch.bfloat16,
        SMALL
        | SMALL_EXPERTS
        | {"head_dim": 8, "rotary_dim": 4, "intermediate_size": 32, "rope_parameters": PARTIAL},
    ),
    "dots1": (
        "dots1",
        torch.bfloat16,
        SMALL
        | SIGMOID_EXPERTS
        | {"sliding_window": 9, "max_window_layers": 1, "first_k_dense_replace": 1, "head_dim": 8},
    ),
    "olmoe": ("olmoe", torch.bfloat16, SMALL | SMALL_EXPERTS | {"intermediate_size": 32}),
    "solar_open": ("solar_open", torch.bfloat16, SMALL | SIGMOID_EXPERTS | {"head_dim": 8}),
    "ernie4_5": ("ernie4_5", torch.bfloat16, SMALL | {"head_dim": 16, "use_bias": True}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        torch.bfloat16,
        SMALL
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "seed_oss": (
        "seed_oss",
        torch.bfloat16,
        SMALL | {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
    ),
    "olmo3": (
        "olmo3",
        torch.bfloat16,
        SMALL
        | {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        },
    ),
    "exaone4": (
        "exaone4",
        torch.bfloat16,
        SMALL | {"num_hidden_layers": 4, "sliding_window": 9},
    ),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        torch.bfloat16,
        SMALL | {"head_dim": 16, "rope_parameters": ALPHA},
    ),
    "granitemoe": (
        "granitemoe",
        torch.bfloat16,
        SMALL
        | SMALL_EXPERTS
        | {
            "intermediate_size": 32,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.5,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        torch.bfloat16,
        SMALL
        | SMALL_EXPERTS
        | {"head_dim": 8, "sliding_window": 9, "swiglu_limit": 1.5, "intermediate_size": 32},
    ),
    "qwen3_next": (
        "qwen3_next",
        torch.bfloat16,
        SMALL
        | SMALL_EXPERTS
        | DELTA
        | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 32},
    ),
    "qwen3_5": (
        "qwen3_5",
        torch.bfloat16,
        {
            "text_config": {**SMALL_SHAPE, **DELTA},
            "vision_config": {**QWEN_TOWER, "out_hidden_size": 32},
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        torch.bfloat16,
        {
            "text_config": {
                **SMALL_SHAPE,
                **SMALL_EXPERTS,
                **DELTA,
                "shared_expert_intermediate_size": 32,
            },
            "vision_config": {**QWEN_TOWER, "out_hidden_size": 32},
        },
    ),
    "lfm2": (
        "lfm2",
        torch.bfloat16,
        SMALL
        | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16, "conv_bias": True},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        torch.bfloat16,
        SMALL
        | SMALL_EXPERTS
        | {
            "num_dense_layers": 1,
            "layer_types": ["full_attention", "conv"],
            "routed_scaling_factor": 1.5,
        },
    ),
    "bamba": (
        "bamba",
        torch.bfloat16,
        SMALL | SCAN | {"mamba_n_groups": 1, "attn_layer_indices": [1]},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        torch.bfloat16,
        SMALL | SMALL_EXPERTS | {"intermediate_size": 32, "shared_intermediate_size": 64},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        torch.bfloat16,
        SMALL
        | SCAN
        | {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "residual_multiplier": 0.7,
        },
    ),
    "granitemoehybrid-experts": (
        "granitemoehybrid",
        torch.bfloat16,
        SMALL
        | SCAN
        | SMALL_EXPERTS
        | {
            "intermediate_size": 32,
            "shared_intermediate_size": 64,
            "layer_types": ["full_attention", "linear_attention"],
            "position_embedding_type": "rope",
        },
    ),
    "stablelm": ("stablelm", torch.bfloat16, SMALL | {"use_qkv_bias": True}),
    "glm": ("glm", torch.bfloat16, SMALL | {"head_dim": 8}),
    "helium": ("helium", torch.bfloat16, SMALL | {"head_dim": 8}),
    "cwm": (
        "cwm",
        torch.bfloat16,
        SMALL | {"head_dim": 8, "sliding_window": 9, "rope_parameters": LLAMA3},
    ),
    "arcee": ("arcee", torch.bfloat16, SMALL | {"head_dim": 8, "mlp_bias": True}),
    "gemma4": (
        "gemma4",
        torch.bfloat16,
        {
            "text_config": {
                **SMALL_SHAPE,
                "head_dim": 8,
                "global_head_dim": 16,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "sliding_window": 9,
                "hidden_size_per_layer_input": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                **TOWER,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "position_embedding_size": 8,
            },
            "audio_config": None,
        },
    ),
    "cohere": ("cohere", torch.bfloat16, SMALL | {"logit_scale": 0.5}),
    "cohere2": (
        "cohere2",
        torch.bfloat16,
        SMALL | {"head_dim": 8, "sliding_window": 9, "num_hidden_layers": 4},
    ),
    "stablelm-parallel": ("stablelm", torch.bfloat16, SMALL | {"use_parallel_residual": True}),
    "mistral3-mistral4": (
        "mistral3",
        torch.bfloat16,
        {
            "text_config": {
                **SMALL_SHAPE,
                **SIGMOID_EXPERTS,
                **LATENT_SIZES,
                "model_type": "mistral4",
                "num_key_value_heads": 4,
                "first_k_dense_replace": 1,
                "rope_parameters": {**SCALED, "mscale": 1.0, "mscale_all_dim": 0.8},
            },
            "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 63,
            "vision_feature_layer": -1,
        },
    ),
    "phi": ("phi", torch.bfloat16, SMALL),
    "gpt_neox": ("gpt_neox", torch.bfloat16, SMALL | {"rope_parameters": PARTIAL}),
    "deepseek_v32": (
        "deepseek_v32",
        torch.bfloat16,
        SMALL | SIGMOID_EXPERTS | LATENT_SIZES | INDEXER | {"first_k_dense_replace": 1},
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        torch.bfloat16,
        SMALL
        | SIGMOID_EXPERTS
        | LATENT_SIZES
        | INDEXER
        | {"first_k_dense_replace": 1, "indexer_types": ["full", "shared"]},
    ),
    "mamba2": (
        "mamba2",
        torch.bfloat16,
        SMALL | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "expand": 2},
    ),
    "nemotron_h": (
        "nemotron_h",
        torch.bfloat16,
        SMALL
        | SIGMOID_EXPERTS
        | {
            "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "time_step_min": 0.5,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        torch.bfloat16,
        SMALL | SCAN | MULTIPLIED | {"mamba_d_ssm": 64, "mamba_rms_norm": True},
    ),
    "falcon_h1-gated": (
        "falcon_h1",
        torch.bfloat16,
        SMALL | SCAN | MULTIPLIED | {"mamba_d_ssm": 64, "mamba_expand": 3},
    ),
}
OFFSET = ("gemma2", "gemma3", "qwen3_next", "qwen3_5")  # whose norms multiply by 1 + weight


def make(name: str) -> None:
    """Make one variant."""
    model_type, dtype, settings = VARIANTS[name]
    torch.manual_seed([*VARIANTS].index(name))
    multimodal = "text_config" in settings
    config = AutoConfig.for_model(model_type, **({} if multimodal else SHAPE) | settings)
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    made = kind.from_config(config)
    for key, parameter in (*made.named_parameters(), *made.named_buffers()):
        if key.endswith(("norm.weight", "bias")):
            offset = 1.0 if "norm.w" in key and not model_type.startswith(OFFSET) else 0.0
            torch.nn.init.normal_(parameter, offset, 0.2)
        if key.endswith("layer_scalar"):
            torch.nn.init.constant_(parameter, 0.8)
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    made.to(dtype).save_pretrained(folder)
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary - 6, (2, 40 if vocabulary == SMALL["vocab_size"] else 70))
    with torch.no_grad():
        result = model(ids, output_hidden_states=True)
    states = dict(enumerate(result.hidden_states))
    if model_type == "mamba2":  # the last block's are there, the embeddings are not
        states = dict(enumerate((*result.hidden_states[:-2], result.hidden_states[-1]), 1))
    np.savez_compressed(
        folder / "expected.npz",
        input_ids=ids.numpy().astype(np.int32),
        logits=result.logits.numpy(),
        **{f"hidden_{i}": each.numpy() for i, each in states.items()},
    )
    print(name, float(result.logits.std()), [*folder.iterdir()])


if __name__ == "__main__":
    for variant in sys.argv[1:] or VARIANTS:
        make(variant)
