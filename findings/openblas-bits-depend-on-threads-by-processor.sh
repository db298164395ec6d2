#!/usr/bin/env bash
# Seen with numpy 2.4.6 (scipy-openblas 0.3.31 in its wheel), threadpoolctl 3.6.0.
#
# The same float32 matrix product of the same arrays, on one thread and on two:
# with OpenBLAS's kernels for AVX-512 (SkylakeX) it has the same bits, with those
# for AVX2 (Haswell, Zen) it has not. Threads are given parts of the output, and
# the AVX2 kernels add up the last rows and columns of a part in another order
# than those inside.
#
# It hurts whoever checks reproducibility on a new server and ships to older
# ones, fingerprints results, or resumes a run on a machine with another number
# of processors: the number of threads is a part of what decides the bits, on
# some processors only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet numpy==2.4.6 threadpoolctl==3.6.0

cat > "$work/products.py" <<'EOF'
import sys

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

rng = np.random.default_rng(0)
a = rng.standard_normal((512, 288), dtype=np.float32)
b = rng.standard_normal((288, 768), dtype=np.float32)
products = []
for threads in (1, 2):
    with threadpool_limits(threads):
        products.append(a @ b)
library = threadpool_info()[0]
same = products[0].tobytes() == products[1].tobytes()
print(
    f"numpy {np.__version__}, OpenBLAS {library['version']}, kernels {library['architecture']}: "
    f"product of 512 x 288 by 288 x 768 on 1 and 2 threads {'equal' if same else 'different'}, "
    f"{np.count_nonzero(products[0] != products[1])} of {products[0].size} values"
)
wanted = sys.argv[1] == "equal"
sys.exit(same is not wanted)
EOF

# Two processors are needed: OpenBLAS starts no more threads than there are.
for kernels in Haswell:different Zen:different SkylakeX:equal; do
    if [ "$kernels" = SkylakeX:equal ] && ! grep -q avx512f /proc/cpuinfo; then
        echo "no AVX-512 here: SkylakeX is left out"
        continue
    fi
    OPENBLAS_CORETYPE=${kernels%:*} "$work/venv/bin/python" "$work/products.py" "${kernels#*:}"
done
