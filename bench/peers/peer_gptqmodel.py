"""Quantize a model with GPTQModel's GPTQ on given token ids, and time it.

Usage, in an environment of its own::

    python3 -m venv /tmp/gptqmodel
    /tmp/gptqmodel/bin/pip install torch==2.13.0 gptqmodel==7.6.0
    /tmp/gptqmodel/bin/python bench/peers/peer_gptqmodel.py SHARED/models/story tokens.npy /tmp/out \\
        --bits 3 --group-size 64

Grids are asymmetric with integer zero points; all else is GPTQModel's default. Writes the weights as GPTQ
leaves them, before they are packed and their scales rounded, and prints one JSON line; the time is that of
`quantize` alone, packing included.
"""

import os
import time
from importlib.metadata import version
from typing import Any

# Its pool of loaders needs two workers, its pool for the CPU has one per two cores: on a machine of two it
# stops before it begins.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from peer import options_parser, peak_memory_bytes, print_figures, write_checkpoint
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantize, write, print."""
    options = options_parser(__doc__).parse_args()

    torch.set_num_threads(options.threads)
    tokens = torch.from_numpy(np.load(options.tokens).astype(np.int64))
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tensors: dict[str, Any] = {
        name: tensor.float().numpy().copy() for name, tensor in original.state_dict().items()
    }
    del original
    quantize_layer = GPTQ.quantize
    quantized: dict[str, Any] = {}

    def keeping(layer: GPTQ, *arguments: Any, **keywords: Any) -> Any:
        result = quantize_layer(layer, *arguments, **keywords)
        quantized[layer.module.module_name] = result[0].detach().float().cpu().numpy().copy()
        return result

    GPTQ.quantize = keeping
    settings = QuantizeConfig(
        bits=options.bits, group_size=options.group_size, sym=False, offload_to_disk=False
    )
    model = GPTQModel.load(str(options.model), settings, dtype=torch.float32, device="cpu")
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    start = time.perf_counter()
    model.quantize(examples, batch_size=1)
    seconds = time.perf_counter() - start
    peak = peak_memory_bytes()  # before saving, which is no part of what is timed
    for name, weight in quantized.items():
        tensors[f"{name}.weight"] = weight.reshape(tensors[f"{name}.weight"].shape)
    expected = sum(".layers." in name and weight.ndim == 2 for name, weight in tensors.items())
    if len(quantized) != expected:
        raise RuntimeError(f"{len(quantized)} layers were quantized, of {expected}")
    write_checkpoint(options.model, options.out, tensors)
    print_figures(seconds, peak, f"GPTQModel {version('gptqmodel')}")


if __name__ == "__main__":
    main()
