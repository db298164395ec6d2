#!/usr/bin/env bash
# Seen with safetensors 0.8.0 and numpy 2.4.6 on Linux.
#
# safe_open reads a file through a memory map, or with backend="pread" by plain
# reads, which do not count a mapped file as the process's memory. get_slice is
# there to read a part of a tensor. With "pread" it reads all bytes of the tensor,
# into memory of its own, and then returns the part.
#
# It hurts whoever streams a large embedding, a head or stacked experts row by row
# to keep memory small: each part costs the whole tensor, in memory and in reads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet safetensors==0.8.0 numpy==2.4.6

"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

file = str(Path(sys.argv[1], "model.safetensors"))
whole = np.arange(4_000_000, dtype=np.float32).reshape(4000, 1000)
save_file({"embedding": whole}, file)


def bytes_read():
    """What this process has asked for with read calls; a mapped page is none."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def cost(**how):
    with safetensors.safe_open(file, "numpy", **how) as opened:
        part = opened.get_slice("embedding")
        before = bytes_read()
        rows = part[100:110]
        assert np.array_equal(rows, whole[100:110])
        return bytes_read() - before, rows.nbytes


print("safetensors", safetensors.__version__, "numpy", np.__version__)
found, asked = cost(backend="pread")
mapped, _ = cost()
print(f"asked for {asked:,} of {whole.nbytes:,} bytes: read {found:,} with pread, {mapped:,} through the map")
assert found >= whole.nbytes
assert mapped < whole.nbytes // 10
EOF
