#!/usr/bin/env bash
# Seen with transformers 5.23.0 and torch 2.13.0.
#
# deepseek_v2's config class declares "norm_topk_prob": whether the weights of a
# token's chosen experts are scaled to sum to 1. Its model never reads the key:
# true and false give the same logits to the bit. In qwen2_moe, whose code it
# shares, the same key counts.
#
# It hurts whoever runs a model of this type that was trained with the key on,
# or compares transformers with an engine that goes by the key.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import torch
import transformers

sizes = dict(
    vocab_size=32, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    num_experts_per_tok=3, initializer_range=0.3, max_position_embeddings=64,
)
own = {
    "deepseek_v2": dict(
        n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=0, kv_lora_rank=8,
        q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, topk_method="greedy",
    ),
    "qwen2_moe": dict(num_experts=8, shared_expert_intermediate_size=16),
}
tokens = torch.tensor([[1, 5, 9, 3, 7, 2, 8, 4, 11, 6]])


def compute(kind, value):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, norm_topk_prob=value, **sizes, **own[kind])
    assert config.norm_topk_prob is value
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        return model(tokens).logits


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {}
for kind in own:
    found[kind] = float((compute(kind, True) - compute(kind, False)).abs().max())
    print(f"{kind}: norm_topk_prob changes logits by {found[kind]:.2g}")

assert found["deepseek_v2"] == 0
assert found["qwen2_moe"] > 0.1
EOF
