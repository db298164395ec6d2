"""Quantize a model with mlx-lm's GPTQ or AWQ on its CPU backend, on given token ids, and time it.

Usage, in an environment of its own::

    python3 -m venv /tmp/mlx
    /tmp/mlx/bin/pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
    /tmp/mlx/bin/python bench/peers/peer_mlx.py SHARED/models/story tokens.npy /tmp/out \\
        --method awq --bits 3 --group-size 64

Grids are affine. mlx-lm's GPTQ knows 2, 4 and 8 bits, no others. Both methods quantize the embedding too:
it gets 8 bits while they run, and is the original's in what is written, the dequantized model. Prints one
JSON line; the time is that of the algorithm alone. MLX takes all CPUs that it may use, whatever --threads
says.
"""

import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load_model
from peer import (
    EMBEDDING,
    HEAD,
    options_parser,
    peak_memory_bytes,
    print_figures,
    write_checkpoint,
)

OTHERS = {"bits": 8, "group_size": 32}  # of the embedding, and of a head that is its own


def loadable(folder: Path, scratch: str) -> Path:
    """Return a folder that mlx-lm loads: a tied matrix under the embedding's name."""
    weights = mx.load(str(folder / "model.safetensors"))
    if EMBEDDING in weights:
        return folder
    weights[EMBEDDING] = weights.pop(HEAD)
    copy = Path(scratch, "model")
    copy.mkdir()
    shutil.copy(folder / "config.json", copy)
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    return copy


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Return the tensors of a model in float32, quantized ones dequantized."""
    tensors = {}
    for prefix, module in model.named_modules():
        # Scales change the norms as well, so everything is taken.
        for name, value in module.parameters().items():
            if isinstance(value, mx.array) and name not in ("scales", "biases"):
                if name == "weight" and hasattr(module, "scales"):
                    value = mx.dequantize(
                        value, module.scales, module.biases, module.group_size, module.bits
                    )
                tensors[f"{prefix}.{name}"] = np.array(value.astype(mx.float32))
    return tensors


def main() -> None:
    """Quantize, write, print."""
    parser = options_parser(__doc__)
    parser.add_argument("--method", choices=["gptq", "awq"], default="awq")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        model, config = load_model(loadable(options.model, scratch))
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    in_float = dict(tree_flatten(model.parameters()))
    kept = {n: np.array(in_float[n]) for n in (EMBEDDING, HEAD) if n in in_float}
    inputs = mx.array(np.load(options.tokens))
    start = time.perf_counter()
    if options.method == "awq":
        awq_quantize(
            model,
            inputs,
            AWQ_MODEL_CONFIGS[config["model_type"]],
            bits=options.bits,
            group_size=options.group_size,
            embed_bits=OTHERS["bits"],
            embed_group_size=OTHERS["group_size"],
        )
    else:
        model, _ = gptq_quantize(
            model, inputs, options.bits, options.group_size, OTHERS["bits"], OTHERS["group_size"]
        )
    mx.eval(model.parameters())
    seconds = time.perf_counter() - start
    peak = peak_memory_bytes()  # before saving, which is no part of what is timed
    write_checkpoint(options.model, options.out, tensors_of(model) | kept)
    print_figures(seconds, peak, f"mlx-lm {version('mlx-lm')} (mlx {version('mlx')})")


if __name__ == "__main__":
    main()
