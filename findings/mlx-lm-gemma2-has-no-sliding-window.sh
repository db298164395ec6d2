#!/usr/bin/env bash
# Seen with mlx-lm 0.32.2 (mlx 0.32.4), transformers 5.23.0, torch 2.13.0.
#
# gemma2 attends to a sliding window in every second layer. transformers (eager
# attention, which has gemma2's soft cap) does that. mlx-lm's gemma2 has no
# window: each layer sees the whole text. Logits agree at the positions within
# the first window and part from there on.
#
# It hurts whoever measures perplexity of gemma2 with mlx-lm on samples longer
# than the window (4096 in the released models) and compares the number with
# one from transformers: the change is not due to quantization.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import pathlib
import sys

import mlx.core as mx
import mlx_lm
import numpy
import torch
import transformers
from mlx_lm.utils import load_model

folder = pathlib.Path(sys.argv[1]) / "model"
window = 6
tokens = [[1, 5, 9, 3, 7, 2, 8, 4, 11, 6, 13, 17]]
torch.manual_seed(0)
model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    query_pre_attn_scalar=8, initializer_range=0.3, sliding_window=window,
    max_position_embeddings=64, attn_implementation="eager",
)).eval()
model.save_pretrained(folder)
with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
loaded, _ = load_model(folder)
apart = numpy.abs(theirs - numpy.array(loaded(mx.array(tokens)))).max(axis=(0, 2))

print("transformers", transformers.__version__, "mlx", mx.__version__, "mlx-lm", mlx_lm.__version__)
print("layers:", model.config.layer_types, "window:", window)
for position, value in enumerate(apart):
    print(f"position {position}: logits differ by at most {value:.2g}")

assert model.config.layer_types == ["sliding_attention", "full_attention"]
assert apart[:window].max() < 1e-3
assert apart[window:].min() > 0.1
EOF
