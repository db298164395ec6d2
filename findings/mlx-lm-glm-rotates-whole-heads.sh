#!/usr/bin/env bash
# Seen with mlx-lm 0.32.2 (mlx 0.32.4), transformers 5.23.0, torch 2.13.0.
#
# glm turns only a part of each head by position: "partial_rotary_factor", 0.5
# where a config does not say. mlx-lm's glm has no such setting and turns the whole
# head, without a word. The logits agree at the first position, where nothing is
# turned, and part from the second on. They agree everywhere with a factor of 1.
# mlx-lm's glm4 goes by the factor.
#
# It hurts whoever runs, converts or measures a glm with a factor below 1 with
# mlx-lm: nothing fails, and quantization gets the blame for what the reader did.
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
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    initializer_range=0.3, max_position_embeddings=64,
)


def compare(kind, factor):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    config = transformers.AutoConfig.for_model(kind, rope_parameters=rope, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder = top / f"{kind}-{factor}"
    model.save_pretrained(folder)
    # transformers reads both keys at the top too, and mlx-lm looks nowhere else.
    file = folder / "config.json"
    flat = {"rope_theta": 10000.0, "partial_rotary_factor": factor}
    file.write_text(json.dumps(json.loads(file.read_text()) | flat))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert numpy.array_equal(theirs, again(torch.tensor(tokens)).logits.numpy())
    loaded, _ = load_model(folder)
    return numpy.abs(theirs - numpy.array(loaded(mx.array(tokens)))).max(axis=(0, 2))


found = {(kind, factor): compare(kind, factor) for kind in ("glm", "glm4") for factor in (0.5, 1.0)}
print("transformers", transformers.__version__, "mlx", mx.__version__, "mlx-lm", mlx_lm.__version__)
for (kind, factor), apart in found.items():
    print(f"{kind}, partial_rotary_factor {factor}: logits differ by at most {apart.max():.2g}"
          f" (first position {apart[0]:.2g})")

half = found.pop(("glm", 0.5))
assert half[0] < 1e-3 and half[1:].min() > 0.05 and half.max() > 1
assert all(apart.max() < 1e-3 for apart in found.values())
EOF
