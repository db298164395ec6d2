"""Quantize a folder with GPTQModel and save the weights that it reads back. Usage: MODEL OUT EXPECTED.npz

Its kernels dequantize in the dtype of the scales, float16 as stored, which rounds every weight; here they
run on its own loaded codes and zeros with the scales in float32.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Its pool of loaders needs two workers, its pool for the CPU has one per two cores.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.looper.awq_processor import AWQProcessor
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm


def dequantized(folder: Path, backend: BACKEND) -> dict[str, Any]:
    """The float32 weights of all quantized layers, as GPTQModel loads them."""
    model = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, AwqTorchLinear):
            grid = module.qzeros, module.scales.float()
            weight = dequantize_gemm(module.qweight, *grid, module.bits, module.group_size)
        elif isinstance(module, BaseQuantLinear):
            weight = module.float().eval().dequantize_weight()
        else:
            continue
        weights[name] = weight.T.contiguous().numpy()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--method", choices=["gptq", "awq"], default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64, help="-1: a scale per row")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--format", help="of the checkpoint: gptq, gptq_v2 or gemm")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--dynamic", type=json.loads, help='rules, as {"-:.*o_proj": {}}')
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()

    start = time.perf_counter()
    torch.compiler.set_stance("force_eager")
    # The search for clips wants multiples of 64 output channels, and is nothing to who reads.
    AWQProcessor._search_best_clip = lambda *arguments: []
    # GPTQModel's default order of channels wants groups.
    order = {"act_group_aware": False} if options.group_size < 0 else {}
    settings = QuantizeConfig(
        method=options.method,
        format=options.format or ("gemm" if options.method == "awq" else "gptq"),
        bits=options.bits,
        group_size=options.group_size,
        sym=not options.asymmetric,
        desc_act=options.desc_act,
        dynamic=options.dynamic,
        offload_to_disk=False,
        **order,
    )
    dtype = torch.float16 if options.method == "awq" else torch.float32  # its kernel takes no other
    model = GPTQModel.load(str(options.model), settings, dtype=dtype, device="cpu")
    # What is in the codes does not matter to who reads them.
    size = (options.samples, options.length)
    tokens = torch.randint(model.model.config.vocab_size, size, generator=torch.manual_seed(0))
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    # The kernel that packs; by itself it takes one for CUDA for AWQ.
    backend = BACKEND.AWQ_TORCH if options.method == "awq" else BACKEND.GPTQ_TORCH
    model.quantize(examples, batch_size=4, backend=backend)
    model.save(str(options.out))
    weights = dequantized(options.out, backend)
    np.savez(options.expected, **weights)
    result = {
        "layers": len(weights),
        "seconds": time.perf_counter() - start,
        "client": f"GPTQModel {version('gptqmodel')}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
