"""Perplexity of a saved MLX folder, as mlx-lm loads it. Usage: MODEL TOKENS.npy"""

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model


def main(folder: str, tokens_file: str) -> None:
    start = time.perf_counter()
    tokens = np.load(tokens_file)
    # Not mlx_lm.load, which wants a tokenizer beside the weights.
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    total = 0.0
    for row in tokens:
        ids = mx.array(row)[None]
        total += nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="sum").item()
    count = tokens[:, 1:].size
    result = {
        "perplexity": math.exp(total / count),
        "tokens": count,
        "seconds": time.perf_counter() - start,
        "client": f"mlx-lm {version('mlx-lm')}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
