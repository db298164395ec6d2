"""Quantize a folder with mlx-lm and save the weights that it reads back. Usage: MODEL OUT EXPECTED.npz

mlx dequantizes in the dtype of the scales, bfloat16 for most models, which rounds every weight; here it
does so from its own scales and biases in float32.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.convert import QUANT_RECIPES, convert
from mlx_lm.utils import load_model


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    """The float32 weights of all quantized layers, embedding included, as mlx-lm loads them."""
    model, _ = load_model(folder)
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "scales"):
            grid = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
            weight = mx.dequantize(module.weight, *grid, module.group_size, module.bits)
            weights[name] = np.array(weight)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default=None)
    parser.add_argument("--recipe", choices=QUANT_RECIPES, help="mixed precision, without --bits")
    parser.add_argument("--exclude", help="leave layers with this in their name in float")
    options = parser.parse_args()

    start = time.perf_counter()
    predicate = options.recipe
    if options.exclude:
        predicate = lambda path, module: options.exclude not in path  # noqa: E731
    convert(
        str(options.model),
        options.out,
        quantize=True,
        q_group_size=options.group_size,
        q_bits=options.bits,
        dtype=options.dtype,
        quant_predicate=predicate,
    )
    weights = dequantized(options.out)
    np.savez(options.expected, **weights)
    result = {
        "layers": len(weights),
        "seconds": time.perf_counter() - start,
        "client": f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
