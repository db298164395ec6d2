"""Kernels as fractions of what OpenBLAS reaches on this machine, measured in the same run.

SGEMM is NumPy's; SSYRK is called directly, since NumPy's ``x.T @ x`` also fills the other triangle.

Usage: python bench/suites/kernel_speed.py [--size 4096] [--repeats 7]

Every round runs all measurements once, so that drift of the machine's speed meets all of them; the table
has medians, and medians of each round's ratio.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import scipy_openblas32
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import bitwright


def ssyrk(inputs: NDArray[np.float32], out: NDArray[np.float32]) -> Callable[[], Any]:
    """Return a call of OpenBLAS' SSYRK: the lower triangle of ``inputs.T @ inputs``."""
    folder, name = scipy_openblas32.get_lib_dir(), scipy_openblas32.get_library(fullname=True)
    function = ctypes.CDLL(f"{folder}/{name.removesuffix('.so')}.so").scipy_cblas_ssyrk
    row_major, lower, transposed = 101, 122, 112
    tokens, channels = inputs.shape
    sizes = (ctypes.c_int(channels), ctypes.c_int(tokens))
    x, g = (array.ctypes.data_as(ctypes.c_void_p) for array in (inputs, out))
    one, zero, step = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_int(channels)
    return lambda: function(row_major, lower, transposed, *sizes, one, x, step, zero, g, step)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="in, out and tokens")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    n = options.size
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((n, n), dtype=np.float32)
    weight = rng.standard_normal((n, n), dtype=np.float32)
    gram = bitwright.gram(inputs)
    factor = bitwright.factor_gram(gram)
    tensor = bitwright.quantize_rtn(weight)
    out = np.empty_like(weight)
    heads = rng.standard_normal((4096, 1024), dtype=np.float32)
    shared = rng.standard_normal((4096, 256), dtype=np.float32)
    attended = np.empty_like(heads)

    cube = float(n) ** 3
    # name -> (what runs, floating-point operations or bytes, what it is compared with)
    runs: dict[str, tuple[Callable[[], Any], float, str]] = {
        "SGEMM (NumPy)": (lambda: np.matmul(inputs, weight, out=out), 2 * cube, ""),
        "SSYRK (OpenBLAS)": (ssyrk(inputs, np.empty_like(gram)), cube, ""),
        "gram": (lambda: bitwright.gram(inputs, out=gram), cube, "SSYRK"),
        "factor_gram": (lambda: bitwright.factor_gram(gram), 2 / 3 * cube, "SGEMM"),
        "quantize_gptq, factor given": (
            lambda: bitwright.quantize_gptq(weight, factor, group_size=128),
            cube,
            "SGEMM",
        ),
        "quantize_gptq, factor included": (
            lambda: bitwright.quantize_gptq(weight, gram, group_size=128),
            5 / 3 * cube,
            "SGEMM",
        ),
        "quantize_gptq, no grid search": (
            lambda: bitwright.quantize_gptq(weight, gram, group_size=128, grid_search=False),
            5 / 3 * cube,
            "SGEMM",
        ),
        "attention, 8 x 512 tokens, 16 heads of 64": (
            lambda: bitwright._kernels.attention(
                heads, shared, shared, 512, 16, 4, 0.125, attended
            ),
            2.0 * 8 * 16 * 64 * 512**2,
            "SGEMM",
        ),
        "quantize_rtn": (lambda: bitwright.quantize_rtn(weight), 0, ""),
        "dequantize": (tensor.dequantize, 0, ""),
        "pack": (lambda: bitwright.pack(tensor.codes, 4), 0, ""),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats + 1):
        for name, (run, _, _) in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    table = Table(title=f"{bitwright.build_info()}, {n} x {n}")
    for heading in ("kernel", "ms", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for name, (_, work, peak) in runs.items():
        times = seconds[name][1:]  # the first round warms up
        share = ""
        if peak:
            base = next(each for each in runs if each.startswith(peak + " ("))
            base_work = runs[base][1]
            ratios = (
                (work / mine) / (base_work / theirs)
                for mine, theirs in zip(times, seconds[base][1:], strict=True)
            )
            share = f"{100 * median(ratios):.0f} % of {peak}"
        speed = f"{work / median(times) / 1e9:.0f}" if work else ""
        table.add_row(name, f"{1000 * median(times):.1f}", speed, share)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
