#!/usr/bin/env bash
# Seen with mlx 0.32.4, gguf 0.19.0, compressed-tensors 0.20.0, torch 2.13.0.
#
# "MXFP4" is one format (groups of 32 values of E2M1 with one power of two) and
# three ways to round to it. With the largest value of a group m:
# - gguf takes 2^(floor(log2 m) - 2), as OCP's text has it: m from 6 to 8 is clipped;
# - mlx takes 2^ceil(log2(m / 6)): nothing is clipped, the small values get coarser;
# - compressed-tensors takes gguf's scale up to 7 and mlx's from 7 on (per octave).
# Halfway values differ too: 0.75 becomes 0.5 in mlx and gguf and 1 in
# compressed-tensors, so that two packages with the same scale still part. The
# same five numbers come out in three ways at m = 7.
#
# It hurts whoever compares MXFP4 files of two packages, expects a model rounded
# by one to be bit-equal to one rounded by another, or takes the error measured
# with one package for that of "MXFP4".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet 'mlx[cpu]==0.32.4' gguf==0.19.0 compressed-tensors==0.20.0

"$work/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import gguf
import mlx.core as mx
import numpy
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

arguments = QuantizationArgs(
    num_bits=4, type="float", strategy="group", group_size=32, symmetric=True,
    scale_dtype=torch.uint8,
)
scheme = QuantizationScheme(targets=["Linear"], weights=arguments)


def round_by_mlx(group):
    codes, scales = mx.quantize(mx.array(group), group_size=32, bits=4, mode="mxfp4")
    values = mx.dequantize(codes, scales, group_size=32, bits=4, mode="mxfp4")
    return int(scales[0, 0]), numpy.array(values.astype(mx.float32))[0]


def round_by_gguf(group):
    block = gguf.quantize(group, gguf.GGMLQuantizationType.MXFP4)
    return int(block[0, 0]), gguf.dequantize(block, gguf.GGMLQuantizationType.MXFP4)[0]


def round_by_compressed_tensors(group):
    weight = torch.from_numpy(group)
    ends = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale, _ = calculate_qparams(*ends, arguments)
    stored = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    values = MXFP4PackedCompressor.decompress(stored, scheme)["weight"]
    return int(stored["weight_scale"][0, 0]), values.float().numpy()[0]


packages = {
    "mlx": round_by_mlx, "gguf": round_by_gguf, "compressed-tensors": round_by_compressed_tensors,
}
others = [0.5, 1.5, 3.0, 5.0]
found = {}
print(", ".join(f"{name} {version(name)}" for name in packages))
print(f"groups of {others} and the value named first; scale byte and values of each package")
for largest in (6.0, 6.5, 7.0, 7.5, 8.0, 13.0):
    group = numpy.zeros((1, 32), numpy.float32)
    group[0, :5] = [*others, largest]
    for name, rounded in packages.items():
        byte, values = rounded(group)
        found[largest, name] = byte, values[:5].tolist()
        print(f"{largest:4} {name:18} {byte} {values[:5].tolist()}")

fine, coarse = [0.5, 1.5, 3.0, 4.0], [0.0, 1.0, 3.0, 4.0]
up = [0.0, 2.0, 3.0, 4.0]  # as coarse, with 0.75 rounded up
assert [found[6.0, name] for name in packages] == [(127, [*fine, 6.0])] * 3
assert [found[6.5, name] for name in packages] == [
    (128, [*coarse, 6.0]), (127, [*fine, 6.0]), (127, [*fine, 6.0]),
]
assert [found[7.0, name] for name in packages] == [
    (128, [*coarse, 6.0]), (127, [*fine, 6.0]), (128, [*up, 8.0]),
]
assert [found[8.0, name] for name in packages] == [
    (128, [*coarse, 8.0]), (128, [*coarse, 8.0]), (128, [*up, 8.0]),
]
assert [found[13.0, name][0] for name in packages] == [129, 128, 128]
EOF
