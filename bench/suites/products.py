"""Products in bfloat16 next to float32: kernels, and whole runs, in turn on one thread, in processor time.

python bench/suites/products.py                                         # kernels
python bench/suites/products.py MODEL TOKENS.npy --preset fast --pairs 3  # runs, and their KL
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import bitwright
from bitwright import _kernels

SHAPES = (
    (2048, 288, 288),
    (2048, 768, 2048),
    (2048, 1024, 1024),
    (512, 1024, 2816),
    (512, 2816, 1024),
    (1024, 4096, 4096),
)
ROUNDS = 5


def seconds(compute: Callable[[], object]) -> float:
    """Return the least processor time of some rounds."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        compute()
        found.append(time.process_time() - start)
    return min(found)


def compare_kernels() -> None:
    """Print the times of products in float32, and how many times as fast those in bfloat16 are."""
    print(
        "tokens × in × out: float32, bfloat16 of a float32 weight, of a bfloat16 one; gram, the same"
    )
    random = np.random.default_rng(0)
    for tokens, channels, out in SHAPES:
        states = random.standard_normal((tokens, channels), np.float32)
        weight = random.standard_normal((out, channels), np.float32)
        result, gram = np.empty((tokens, out), np.float32), np.zeros((channels,) * 2, np.float32)

        def product(
            right: Any, states: Any = states, result: Any = result, rows: bool = True
        ) -> Callable[[], None]:
            lower = not rows
            return lambda: _kernels.bfloat16_product(
                states, rows, right, rows, result, lower, lower
            )

        plain = seconds(lambda: _kernels.linear(states, weight, None, result, False))  # noqa: B023
        half = weight.astype(ml_dtypes.bfloat16)
        own, exact = seconds(product(weight)), seconds(product(half))
        square = seconds(lambda: _kernels.accumulate_gram(states, gram))  # noqa: B023
        other = seconds(product(states, result=gram, rows=False))
        print(
            f"{tokens} × {channels} × {out}: {1e3 * plain:.1f} ms, {plain / own:.2f}, "
            f"{plain / exact:.2f}; {1e3 * square:.1f} ms, {square / other:.2f}"
        )


def compare_runs(
    model: Path, tokens: Path, preset: str, pairs: int, evaluation: Path | None
) -> None:
    """Print the processor time of runs in float32 and bfloat16, pair by pair, and their KL."""
    ratios = []
    for pair in range(pairs):
        spent, divergences = dict[str, float](), dict[str, float | None]()
        order = ("float32", "bfloat16") if pair % 2 == 0 else ("bfloat16", "float32")
        for precision in order:
            with tempfile.TemporaryDirectory() as folder:
                out, start = f"{folder}/out", time.process_time()
                bitwright.quantize(
                    *(model, out, "gptq", 4, 128),
                    calibration=tokens,
                    samples=32,
                    seed=pair,
                    preset=preset,
                    precision=precision,
                    progress=False,
                    threads=1,
                )
                spent[precision] = time.process_time() - start
                if evaluation is not None:
                    judged = bitwright.evaluate(out, evaluation, reference=model)
                    divergences[precision] = judged.kl_divergence
        ratios.append(spent["float32"] / spent["bfloat16"])
        print(f"{preset}: {spent}, ratio {ratios[-1]:.2f}, KL {divergences}", flush=True)
    print(f"{preset}: median ratio {statistics.median(ratios):.2f}")


def main() -> None:
    """Compare kernels, or runs on a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("tokens", type=Path, nargs="?")
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    _kernels.set_num_threads(1)
    if given.model is None:
        compare_kernels()
    else:
        compare_runs(given.model, given.tokens, given.preset, given.pairs, given.evaluation)


if __name__ == "__main__":
    main()
