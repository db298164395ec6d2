#!/usr/bin/env bash
# Seen with compressed-tensors 0.20.0, transformers 5.24.0, torch 2.13.0.
#
# A model stored by compressed-tensors as NVFP4 and loaded with
# dtype=torch.float32 and dequantize=True says float32 for every weight. The values
# are those of bfloat16: each equals value x scale / global scale worked out in
# float32 and then rounded to bfloat16, and few equal the unrounded number.
# compressed-tensors unpacks the 4-bit values as bfloat16 and never hears of the
# dtype. Whole numbers of 4 bits with scales in float32, stored by the same package
# and loaded the same way, come out in float32 to the bit.
#
# It hurts whoever measures what NVFP4 costs, or checks another reader of it,
# against "float32" from transformers: the reference has an error of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error

"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import json
import pathlib
import sys
from importlib.metadata import version

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

top = pathlib.Path(sys.argv[1])
levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
levels = torch.cat([levels, -levels])


def quantize(kind, weight, scheme):
    """What compressed-tensors stores for a weight, and its values in float32."""
    groups = weight.unflatten(1, (-1, scheme.weights.group_size)).abs().amax(2)
    if kind == "nvfp4-pack-quantized":
        divisor = 448 * 6 / weight.abs().max()
        scales = (groups / 6 * divisor).to(torch.float8_e4m3fn).float()
        given = {"weight_scale": scales, "weight_global_scale": divisor.reshape(1)}
        exact = scales / divisor
    else:
        exact = groups / 7
        given = {"weight_scale": exact}
    packer = BaseCompressor.get_value_from_registry(kind)
    stored = packer.compress({"weight": weight, **given}, scheme)
    packed = stored["weight_packed"]
    if kind == "nvfp4-pack-quantized":
        values = levels[torch.stack([packed & 15, packed >> 4], 2).flatten(1).long()]
    else:
        values = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], 2).flatten(1) - 8.0
    return stored, values * exact.repeat_interleave(scheme.weights.group_size, 1)


def load(kind, arguments):
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3,
        max_position_embeddings=64,
    ))
    folder = top / kind
    made.save_pretrained(folder)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stored, expected[name] = quantize(kind, tensors.pop(name), scheme)
        for part, tensor in stored.items():
            tensors[name.removesuffix("weight") + part] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    group = {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {
        "quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }}))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    state = model.state_dict()
    assert all(state[name].dtype == torch.float32 for name in expected)
    loaded = torch.cat([state[name].flatten() for name in expected])
    exact = torch.cat([weight.flatten() for weight in expected.values()])
    equal = float((loaded == exact).float().mean())
    rounded = float((loaded == exact.bfloat16().float()).float().mean())
    return equal, rounded, float(((loaded - exact).norm() / exact.norm()))


common = dict(num_bits=4, symmetric=True)
kinds = {
    "nvfp4-pack-quantized": dict(type="float", strategy="tensor_group", group_size=16),
    "pack-quantized": dict(type="int", strategy="group", group_size=32),
}
names = ("transformers", "compressed-tensors", "torch")
print(", ".join(f"{name} {version(name)}" for name in names))
found = {}
for kind, own in kinds.items():
    found[kind] = load(kind, QuantizationArgs(**common, **own))
    equal, rounded, error = found[kind]
    print(f"{kind}: dtype float32; {equal:.1%} of weights equal float32,"
          f" {rounded:.1%} equal it rounded to bfloat16; relative error {error:.2g}")

assert found["nvfp4-pack-quantized"][0] < 0.2 and found["nvfp4-pack-quantized"][1] == 1
assert found["pack-quantized"][0] == 1 and found["pack-quantized"][1] < 0.5
EOF
