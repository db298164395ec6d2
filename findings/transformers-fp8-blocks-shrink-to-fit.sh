#!/usr/bin/env bash
# Seen with transformers 5.24.0 and 5.23.0, torch 2.13.0.
#
# A checkpoint in FP8 by blocks of 128 x 128 holds one scale for each block in
# "weight_scale_inv"; where 128 does not divide a layer, its last block is cut
# short. 192 rows have two scales: one for rows 0 to 127, one for 128 to 191.
# Loaded with dequantize=True (which it sets by itself where there is no GPU),
# transformers does not read "weight_block_size": it takes rows / scales for the
# size of a block, here 96, and rows 96 to 127 get the scale of the next block. It
# says nothing. Its own FP8 layer, made with blocks of 128, has two scales as well,
# so both readings fit the file's shapes. Columns go the same way. Layers that 128
# divides are right to the bit, and a layer whose rows its scales do not divide
# (576 rows, 5 scales) is refused.
#
# It hurts whoever loads such a checkpoint to run it on a CPU, to fine-tune it or
# to quantize it to another format: part of a layer has other weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.24.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" - "$work" <<'EOF'
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import FP8Linear

folder = pathlib.Path(sys.argv[1]) / "model"
block = 128
torch.manual_seed(0)
made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=32, hidden_size=128, intermediate_size=192, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3,
    max_position_embeddings=64,
))
made.save_pretrained(folder)

# Each weight becomes FP8 values times the scale of its block, a power of two.
tensors = load_file(folder / "model.safetensors")
expected = {}
for name in [name for name in tensors if name.endswith("_proj.weight")]:
    rows, columns = tensors[name].shape
    by_row, by_column = torch.arange(rows) // block, torch.arange(columns) // block
    exponents = torch.arange(by_row[-1] + 1)[:, None] + torch.arange(by_column[-1] + 1)[None]
    scales = torch.exp2(exponents.float() - 8)
    full = scales[by_row][:, by_column]
    stored = (tensors[name] / full).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected[name] = stored.float() * full
    tensors[name] = stored
    tensors[name + "_scale_inv"] = scales
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
settings = {"weight_block_size": [block, block], "modules_to_not_convert": ["lm_head"]}
file = folder / "config.json"
config = json.loads(file.read_text())
config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", **settings}
file.write_text(json.dumps(config))

loaded = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32,
    quantization_config=transformers.FineGrainedFP8Config(dequantize=True, **settings),
).state_dict()
stored = tuple(tensors["model.layers.0.mlp.up_proj.weight_scale_inv"].shape)
own = tuple(FP8Linear(128, 192, block_size=(block, block)).weight_scale_inv.shape)

print("transformers", transformers.__version__, "torch", torch.__version__)
print("scales of 192 x 128 in the file:", stored, "in a layer of transformers:", own)
off = {}
for name, weight in expected.items():
    wrong = loaded[name] != weight
    off[name.split(".")[-2]] = [wrong.any(axis).nonzero().flatten().tolist() for axis in (1, 0)]
    rows, columns = off[name.split(".")[-2]]
    where = f"rows {rows[0]}-{rows[-1]}, columns {columns[0]}-{columns[-1]}" if rows else "none"
    factors = (loaded[name] / weight)[wrong].unique().tolist()
    print(f"{name} {tuple(weight.shape)}: wrong: {where}; times {factors}")

assert stored == own == (2, 1)
whole, cut = list(range(128)), list(range(96, 128))
assert off["up_proj"] == off["gate_proj"] == [cut, whole]
assert off["down_proj"] == [whole, cut]
assert all(off[name] == [[], []] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
EOF
