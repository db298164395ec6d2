#!/usr/bin/env bash
# Seen with mlx-lm 0.32.2 (mlx 0.32.4), transformers 5.23.0, torch 2.13.0.
#
# ernie4_5_moe chooses a token's experts by their scores plus a stored bias,
# "e_score_correction_bias". mlx-lm leaves out that tensor when it reads the
# model and chooses by the scores alone: other experts, other logits, no word.
# With a bias of zeros the two agree.
#
# It hurts whoever runs, converts or measures an ERNIE 4.5 mixture of experts
# with mlx-lm, and a copy that mlx-lm saves has lost the bias for good.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import json
import pathlib
import sys

import mlx.core as mx
import mlx_lm
import numpy
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors import safe_open

top = pathlib.Path(sys.argv[1])
tokens = [[1, 5, 9, 3, 7, 2, 8, 4, 11, 6, 13, 17]]
config = transformers.AutoConfig.for_model(
    "ernie4_5_moe", vocab_size=32, hidden_size=32, intermediate_size=64,
    moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, use_bias=False,
    moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0,
    initializer_range=0.3, max_position_embeddings=64,
)


def is_bias(name):
    return name.endswith("e_score_correction_bias")


def compare(size):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in model.named_parameters():
        if is_bias(name):
            tensor.data.copy_(size * torch.randn(tensor.shape))
    folder = top / str(size)
    model.save_pretrained(folder)
    # transformers reads the base at the top too, and mlx-lm looks nowhere else.
    file = folder / "config.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps(text | {"rope_theta": text["rope_parameters"]["rope_theta"]}))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = again(torch.tensor(tokens)).logits.numpy()
    loaded, _ = load_model(folder)
    with safe_open(folder / "model.safetensors", "numpy") as weights:
        stored = sum(is_bias(name) for name in weights.keys())
    kept = sum(is_bias(name) for name, _ in tree_flatten(loaded.parameters()))
    return stored, kept, float(numpy.abs(theirs - numpy.array(loaded(mx.array(tokens)))).max())


found = {size: compare(size) for size in (0.0, 0.1)}
print("transformers", transformers.__version__, "mlx", mx.__version__, "mlx-lm", mlx_lm.__version__)
for size, (stored, kept, apart) in found.items():
    print(f"bias of size {size}: {stored} stored, {kept} in mlx-lm's model,"
          f" logits differ by at most {apart:.2g}")

assert found[0.0][:2] == found[0.1][:2] == (2, 0)
assert found[0.0][2] < 1e-3
assert found[0.1][2] > 0.5
EOF
