#!/usr/bin/env bash
# Seen with mlx-lm 0.32.2 (mlx 0.32.4), transformers 5.23.0, torch 2.13.0.
#
# A llama saved by transformers 5 holds its RoPE base only in config.json's
# "rope_parameters". mlx-lm's llama does not read that key. It takes its own
# base, 10000, and says nothing, so a model with any other base gives other
# logits. The two agree at 10000, and agree at 500000 too once "rope_theta" is
# put back at the top of config.json. mlx-lm's qwen3 does read the new key.
#
# It hurts whoever saves a model again with transformers 5, for instance after
# a fine-tune, and then converts, quantizes or measures it with mlx-lm.
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
from mlx_lm.utils import load_model

top = pathlib.Path(sys.argv[1])
tokens = [[1, 5, 9, 3, 7, 2, 8, 4, 11, 6, 13, 17]]
sizes = dict(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    initializer_range=0.3, max_position_embeddings=64,
)


def save(name, base, config, model):
    torch.manual_seed(0)
    made = model(config(rope_parameters={"rope_type": "default", "rope_theta": base}, **sizes))
    made.save_pretrained(top / name)


def difference(name):
    model = transformers.AutoModelForCausalLM.from_pretrained(top / name).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    other, _ = load_model(top / name)
    return float(numpy.abs(theirs - numpy.array(other(mx.array(tokens)))).max())


found = {}
for base in (10000.0, 500000.0):
    save(f"llama-{base:.0f}", base, transformers.LlamaConfig, transformers.LlamaForCausalLM)
    save(f"qwen3-{base:.0f}", base, transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
    for kind in ("llama", "qwen3"):
        found[kind, base] = difference(f"{kind}-{base:.0f}")

file = top / "llama-500000" / "config.json"
config = json.loads(file.read_text())
saved = {key: config.get(key) for key in ("rope_theta", "rope_parameters")}
config["rope_theta"] = 500000.0
file.write_text(json.dumps(config))
mended = difference("llama-500000")

print("transformers", transformers.__version__, "mlx", mx.__version__, "mlx-lm", mlx_lm.__version__)
print("saved by transformers:", saved)
for (kind, base), value in found.items():
    print(f"{kind}, base {base:.0f}: logits differ by at most {value:.2g}")
print(f"llama, base 500000, with rope_theta at the top: {mended:.2g}")

assert saved == {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
assert found["llama", 10000.0] < 1e-3
assert found["llama", 500000.0] > 0.1
assert mended < 1e-3
assert found["qwen3", 10000.0] < 1e-3 and found["qwen3", 500000.0] < 1e-3
EOF
