#!/usr/bin/env bash
# Seen with transformers 5.24.0 and torch 2.13.0.
#
# Cohere2 multiplies its logits by "logit_scale". cohere2_vision and aya_vision
# hold a Cohere2 as their text model, with "logit_scale" in text_config, and never
# apply it: 1 and 0.25 give the same logits to the bit.
#
# It hurts whoever samples from these models, takes perplexity or compares them
# with an engine that scales: the order of tokens stays, every probability is
# another. Where the config says 0.25 it is as if one sampled at a temperature of
# a quarter.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.24.0
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import torch
import transformers

text = dict(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)
vision = dict(
    model_type="siglip_vision_model", hidden_size=16, intermediate_size=32,
    num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
)
tokens = torch.tensor([[1, 5, 9, 3, 7, 2, 8, 4, 11, 6]])


def compute(kind, scale):
    torch.manual_seed(0)
    own = dict(text, logit_scale=scale)
    if kind == "cohere2":
        config = transformers.AutoConfig.for_model(kind, **own)
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        config = transformers.AutoConfig.for_model(
            kind, text_config=dict(own, model_type="cohere2"), vision_config=vision,
            alignment_intermediate_size=32,
        )
        assert config.text_config.logit_scale == scale
        model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        return model.eval()(tokens).logits


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {}
for kind in ("cohere2", "cohere2_vision", "aya_vision"):
    one, quarter = compute(kind, 1.0), compute(kind, 0.25)
    found[kind] = float(quarter.norm() / one.norm())
    same = torch.equal(one, quarter)
    print(f"{kind}: logits at 0.25 over logits at 1: {found[kind]:.4g}; the same to the bit: {same}")
    assert same == (kind != "cohere2")

assert abs(found["cohere2"] - 0.25) < 1e-6
EOF
