"""Perplexity of saved MLX folders, as mlx-lm loads them. Usage: TOKENS.npy MODEL..."""

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model


def main(tokens_file: str, *folders: str) -> None:
    tokens = np.load(tokens_file)
    for folder in folders:
        judge(folder, tokens)


def judge(folder: str, tokens: np.ndarray[Any, Any]) -> None:
    start = time.perf_counter()
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
