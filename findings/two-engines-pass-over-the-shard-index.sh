#!/usr/bin/env bash
# Seen with transformers 5.23.0 and mlx-lm 0.32.2 (mlx 0.32.4), torch 2.13.0.
#
# A folder holds a model in shards with an index that names them, and beside
# these an older model.safetensors. transformers reads the single file alone.
# mlx-lm reads every model*.safetensors and no index: for each tensor the file
# that the folder lists last wins, and no order is asked for. So neither engine
# follows the index, and mlx-lm's model hangs on the order of listing (both
# orders are tried here, by sorting what the listing returns).
#
# It hurts whoever saves shards into a folder that held a smaller single file:
# each engine may go on with the old weights, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import glob
import pathlib
import shutil
import sys
from unittest import mock

import mlx.core as mx
import mlx_lm
import torch
import transformers
from mlx_lm.utils import load_model

top = pathlib.Path(sys.argv[1])


def make(seed):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    ))


old, new = make(0), make(1)
old.save_pretrained(top / "old")
new.save_pretrained(top / "new", max_shard_size="20kB")
shutil.copy(top / "old" / "model.safetensors", top / "new")
folder = top / "new"
sums = {name: model.lm_head.weight.double().sum().item() for name, model in (("old", old), ("new", new))}


def whose(weight_sum):
    return min(sums, key=lambda name: abs(sums[name] - weight_sum))


read = transformers.AutoModelForCausalLM.from_pretrained(folder)
of_transformers = whose(read.lm_head.weight.double().sum().item())
of_mlx = {}
for order in ("forward", "backward"):
    def listing(pattern, list_files=glob.glob):
        return sorted(list_files(pattern), reverse=order == "backward")

    with mock.patch("glob.glob", listing):
        loaded, _ = load_model(folder)
    of_mlx[order] = whose(float(loaded.lm_head.weight.sum()))

print("transformers", transformers.__version__, "mlx", mx.__version__, "mlx-lm", mlx_lm.__version__)
print("files:", sorted(file.name for file in folder.glob("*.safetensors*")))
print("transformers reads the", of_transformers, "weights")
for order, name in of_mlx.items():
    print(f"mlx-lm, files listed {order}: the {name} weights")

assert (folder / "model.safetensors.index.json").is_file()
assert of_transformers == "old"
assert sorted(of_mlx.values()) == ["new", "old"]
EOF
