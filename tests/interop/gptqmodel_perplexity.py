"""Perplexity of saved folders, as transformers loads them: GPTQ, AWQ, compressed-tensors, GGUF. Usage:
TOKENS.npy MODEL..."""

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, GPTQConfig


def main(tokens_file: str, *folders: str) -> None:
    # GPTQModel wraps its unpacking in torch.compile, which would need a C++ compiler and a minute.
    torch.compiler.set_stance("force_eager")
    tokens = torch.from_numpy(np.load(tokens_file)).long()
    for folder in folders:
        judge(folder, tokens)


def judge(folder: str, tokens: torch.Tensor) -> None:
    start = time.perf_counter()
    # Of this config only the kernel counts; the rest comes from the folder. The kernel GPTQModel
    # picks by itself for 4 bits on a CPU computes in bfloat16, too coarse to judge by.
    config = json.loads(Path(folder, "config.json").read_text()).get("quantization_config", {})
    kernels = {
        "gptq": GPTQConfig(bits=4, backend="gptq_torch"),
        "awq": AwqConfig(backend="torch_awq"),  # computes in float16
        # Left packed, transformers 5.23 has no room for zeros: it expects them unpacked.
        "compressed-tensors": CompressedTensorsConfig(dequantize=True),
    }
    settings: dict[str, Any] = {"gguf_file": "model.gguf"}  # which transformers dequantizes
    if config:
        settings = {"quantization_config": kernels[config["quant_method"]]}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    # Unpacking multiplies in the dtype of the scales, float16 as stored, and would round each weight.
    for module in model.modules():
        if isinstance(module, BaseQuantLinear) and config.get("quant_method") != "awq":
            module.float()
    total = 0.0
    with torch.inference_mode():
        # Every forward pass unpacks all the weights again, hence several samples at a time.
        for rows in tokens.split(8):
            logits = model(input_ids=rows[:, :-1]).logits
            total += cross_entropy(
                logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
    count = tokens[:, 1:].numel()
    result = {
        "perplexity": math.exp(total / count),
        "tokens": count,
        "seconds": time.perf_counter() - start,
        "client": f"gptqmodel {version('gptqmodel')}, transformers {version('transformers')}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
