#!/usr/bin/env bash
# Seen with transformers 5.23.0 and torch 2.13.0.
#
# config.json's "rope_parameters" is in most models one flat set of values. For
# gemma3, which has two kinds of layers, it is one set for each kind. A flat set
# given to gemma3 is kept in the config and shown there, but not used: both kinds
# of layers get gemma3's own bases, and nothing is said. The flat set does count
# for gemma2, and the old top-level "rope_theta" does count for gemma3.
#
# It hurts whoever sets RoPE values in configs by one rule for all models, or
# reads config.rope_parameters["rope_theta"] to learn what a model computes with.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=warning

"$work/venv/bin/python" - "$work" <<'EOF'
import torch
import transformers

sizes = dict(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
    initializer_range=0.3, sliding_window=6, max_position_embeddings=64,
    layer_types=["sliding_attention", "full_attention"], attn_implementation="eager",
)
tokens = torch.tensor([[1, 5, 9, 3, 7, 2, 8, 4, 11, 6]])
flat = {"rope_type": "default", "rope_theta": 77.0}
nested = {"full_attention": flat, "sliding_attention": flat}


def compute(kind, **values):
    config, model = {
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    made = model(config(**sizes, **values)).eval()
    with torch.no_grad():
        return made(tokens).logits, made.config.rope_parameters


def change(kind, **values):
    return float((compute(kind, **values)[0] - compute(kind)[0]).abs().max())


found = {
    "gemma2, flat": change("gemma2", rope_parameters=dict(flat)),
    "gemma3, flat": change("gemma3", rope_parameters=dict(flat)),
    "gemma3, nested": change("gemma3", rope_parameters={key: dict(value) for key, value in nested.items()}),
    "gemma3, rope_theta at the top": change("gemma3", rope_theta=77.0),
}
kept = compute("gemma3", rope_parameters=dict(flat))[1]
print("transformers", transformers.__version__, "torch", torch.__version__)
for name, value in found.items():
    print(f"{name}: a base of 77 changes logits by {value:.2g}")
print("gemma3, flat, in the config afterwards:", kept)

assert kept["rope_theta"] == 77.0
assert found.pop("gemma3, flat") == 0
assert min(found.values()) > 0.01
EOF
