#!/usr/bin/env bash
# Seen with mlx-lm 0.32.2 (mlx 0.32.4), transformers 5.23.0, torch 2.13.0.
#
# config.json says "tie_word_embeddings": true, and the safetensors file stores
# an lm_head.weight that is not the embedding. transformers warns, and computes
# with the stored head. mlx-lm drops the stored head without a word and computes
# with the embedding. One folder is two models.
#
# It hurts whoever trains or edits a head and leaves the key in config.json as
# it was, and whoever compares a quantized folder in one engine with its source
# in the other.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=warning

"$work/venv/bin/python" - "$work" <<'EOF'
import contextlib
import io
import json
import pathlib
import sys

import mlx.core as mx
import mlx_lm
import numpy
import torch
import transformers
from mlx_lm.utils import load_model

folder = pathlib.Path(sys.argv[1]) / "model"
tokens = [[1, 5, 9, 3, 7, 2, 8, 4]]
torch.manual_seed(0)
made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    max_position_embeddings=64, tie_word_embeddings=False,
))
made.save_pretrained(folder)
config = json.loads((folder / "config.json").read_text())
config["tie_word_embeddings"] = True
(folder / "config.json").write_text(json.dumps(config))


def compute(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


with_head = compute(made)
made.lm_head.weight = made.model.embed_tokens.weight
with_embedding = compute(made)
of_transformers = compute(transformers.AutoModelForCausalLM.from_pretrained(folder))
words = io.StringIO()
with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
    loaded, _ = load_model(folder)
of_mlx = numpy.array(loaded(mx.array(tokens)))


def apart(first, second):
    return float(numpy.abs(first - second).max())


print("transformers", transformers.__version__, "mlx", mx.__version__, "mlx-lm", mlx_lm.__version__)
print(f"transformers from the stored head: {apart(of_transformers, with_head):.2g}")
print(f"transformers from the embedding:   {apart(of_transformers, with_embedding):.2g}")
print(f"mlx-lm from the stored head:       {apart(of_mlx, with_head):.2g}")
print(f"mlx-lm from the embedding:         {apart(of_mlx, with_embedding):.2g}")
print("mlx-lm said:", repr(words.getvalue()))

assert apart(of_transformers, with_head) < 1e-3 < 0.5 < apart(of_transformers, with_embedding)
assert apart(of_mlx, with_embedding) < 1e-3 < 0.5 < apart(of_mlx, with_head)
assert not words.getvalue()
EOF
