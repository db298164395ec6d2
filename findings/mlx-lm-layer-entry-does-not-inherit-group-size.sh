#!/usr/bin/env bash
# Seen with mlx-lm 0.32.2 (mlx[cpu] 0.32.4).
#
# In config.json's "quantization", the top level holds group_size and bits, and
# an entry by a layer's name holds that layer's own. One would guess that an
# entry {"bits": 8} takes group_size from the top. It does not: the missing value
# is mlx's own, 64. So beside a top-level 32, a layer stored in groups of 32 is
# refused (shapes do not fit), one stored in groups of 64 is loaded. With no
# entry at all for that layer, mlx-lm works out both values from the shapes and
# loads either.
#
# It hurts whoever writes MLX folders by another tool: an entry with a part of
# the values is worse than none, and must name group_size and bits both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import json
import pathlib
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import load_model

top = pathlib.Path(sys.argv[1])
name = "model.layers.0.mlp.down_proj"
sizes = dict(
    model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, vocab_size=32, rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)


def attempt(stored, entry):
    """Stores `name` in 8 bits and groups of `stored`, all else in 4 bits and groups of 32."""
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**sizes))

    def choose(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": stored, "bits": 8} if path == name else {"group_size": 32, "bits": 4}

    nn.quantize(model, class_predicate=choose)
    quantization = {"group_size": 32, "bits": 4}
    if entry is not None:
        quantization[name] = entry
    folder = top / f"model-{stored}-{json.dumps(entry)}".translate({34: None, 32: None})
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(sizes | {"quantization": quantization}))
    try:
        loaded, _ = load_model(folder)
    except ValueError as error:
        return "refused: " + str(error).splitlines()[0]
    layer = loaded.layers[0].mlp.down_proj
    return f"loaded as {layer.bits} bits, groups of {layer.group_size}"


print("mlx", mx.__version__, "mlx-lm", mlx_lm.__version__)
print("top level: group_size 32, bits 4")
found = {}
for stored in (32, 64):
    for entry in ({"bits": 8}, None, {"bits": 8, "group_size": stored}):
        found[stored, str(entry)] = result = attempt(stored, entry)
        print(f"stored in groups of {stored}, entry {entry}: {result}")

assert found[32, "{'bits': 8}"].startswith("refused")
assert found[64, "{'bits': 8}"] == "loaded as 8 bits, groups of 64"
for stored in (32, 64):
    for entry in ("None", str({"bits": 8, "group_size": stored})):
        assert found[stored, entry] == f"loaded as 8 bits, groups of {stored}"
EOF
