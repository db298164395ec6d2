"""Quantize a model with llm-compressor, bitwright's peer, on the same token ids, and time it.

Runs in an environment of its own: pip install torch==2.13.0 llmcompressor==0.14.0.1
"""

import argparse
import json
import resource
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens", help="token ids [samples, length], .npy")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=None, help="default: all")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    # A CPU without bfloat16 instructions multiplies bfloat16 several times slower than float32, so
    # the peer gets the faster of the two; "auto" is the checkpoint's own, as its users have it.
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "auto"], default="float32")
    parser.add_argument("--method", choices=["gptq", "awq"], default="gptq")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tokens = np.load(options.tokens)[: options.samples]
    weights = QuantizationArgs(
        num_bits=options.bits,
        type="int",
        strategy="group",
        group_size=options.group_size,
        symmetric=options.symmetric,
    )
    scheme: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    recipe: Any = GPTQModifier(**scheme, dampening_frac=0.01)
    if options.method == "awq":
        # It pins memory for an accelerator, and stops where there is none.
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else "auto"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    start = time.perf_counter()
    model = oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    seconds = time.perf_counter() - start
    # Before saving, which is no part of what is timed. ru_maxrss is in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.save_pretrained(options.out, save_compressed=True)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_memory_bytes": peak,
                "version": f"llm-compressor {version('llmcompressor')}",
            }
        )
    )


if __name__ == "__main__":
    main()
