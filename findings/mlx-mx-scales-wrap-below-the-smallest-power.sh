#!/usr/bin/env bash
# Seen with mlx 0.32.4.
#
# A scale of MXFP4 and MXFP8 is a power of two in one byte, from 2^-127 on.
# Where a group needs a smaller one, mx.quantize does not take the smallest: the
# byte goes around, and the group comes back as huge numbers or as infinity. With
# mxfp8 that begins at weights of about 3e-37, which float32 and bfloat16 hold as
# normal numbers; with mxfp4 at about 6e-38. Larger weights, and zeros, are as
# they should be.
#
# It hurts whoever quantizes matrices with rows or groups that are all but zero
# (pruned channels, experts that were never chosen, padding of a vocabulary):
# instead of nothing, such a group gives inf and then NaN in the logits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet 'mlx[cpu]==0.32.4' numpy==2.4.6

"$work/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import mlx.core as mx
import numpy

print("mlx", version("mlx"))
found = {}
for mode, bits in (("mxfp8", 8), ("mxfp4", 4)):
    for value in (1.0, 1e-36, 1e-37, 1e-38, 1e-40, 0.0):
        group = mx.array(numpy.full((1, 32), value, numpy.float32))
        codes, scales = mx.quantize(group, group_size=32, bits=bits, mode=mode)
        back = mx.dequantize(codes, scales, group_size=32, bits=bits, mode=mode)
        found[mode, value] = int(scales[0, 0]), float(back.astype(mx.float32)[0, 0])
        print(f"{mode} {value:g}: scale byte {found[mode, value][0]}, back {found[mode, value][1]:g}")

for mode in ("mxfp8", "mxfp4"):
    assert found[mode, 0.0][1] == 0.0
    assert 0.8 < found[mode, 1.0][1] < 1.3
    assert found[mode, 1e-38][1] == numpy.inf
    assert 1e36 < found[mode, 1e-40][1] < 1e38
assert found["mxfp8", 1e-36][1] == numpy.inf
assert 0.8e-36 < found["mxfp4", 1e-36][1] < 1.3e-36
EOF
