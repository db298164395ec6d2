"""Quantize a model with mlx-lm's AWQ on its CPU backend, on the same token ids, and time it.

Runs in an environment of its own: pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize
from mlx_lm.utils import load_model


def loadable(folder: Path, scratch: str) -> Path:
    """Return a folder that mlx-lm loads: a tied matrix under the embedding's name."""
    weights = mx.load(str(folder / "model.safetensors"))
    if "model.embed_tokens.weight" in weights:
        return folder
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    copy = Path(scratch, "model")
    copy.mkdir()
    shutil.copy(folder / "config.json", copy)
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", help="token ids [samples, length], .npy")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="MLX takes what it finds")
    parser.add_argument("--method", choices=["awq"], default="awq")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, config = load_model(loadable(options.model, scratch))
        mx.eval(model.parameters())
    inputs = mx.array(np.load(options.tokens))
    start = time.perf_counter()
    awq_quantize(
        model,
        inputs,
        AWQ_MODEL_CONFIGS[config["model_type"]],
        bits=options.bits,
        group_size=options.group_size,
    )
    mx.eval(model.parameters())
    seconds = time.perf_counter() - start
    mx.savez(options.out, **dict(tree_flatten(model.parameters())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_memory_bytes": peak,
                "version": f"mlx-lm {version('mlx-lm')} (mlx {version('mlx')})",
            }
        )
    )


if __name__ == "__main__":
    main()
