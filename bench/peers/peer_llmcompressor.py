"""Quantize a model with llm-compressor's GPTQ or AWQ on given token ids, and time it.

Usage, in an environment of its own::

    python3 -m venv /tmp/llmc
    /tmp/llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    /tmp/llmc/bin/python bench/peers/peer_llmcompressor.py SHARED/models/story tokens.npy /tmp/out \\
        --method gptq --bits 3 --group-size 64

Grids are asymmetric with integer zero points, or symmetric with --symmetric. Writes the dequantized model
and prints one JSON line; the time is that of `oneshot` alone.
"""

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer import options_parser, peak_memory_bytes, print_figures, write_checkpoint
from transformers import AutoModelForCausalLM


@torch.no_grad()
def dequantized(model: torch.nn.Module) -> dict[str, Any]:
    """Return the tensors of the model, each weight with a grid rounded to it."""
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            tensors[f"{name}.weight"] = fake_quantize(
                module.weight,
                module.weight_scale,
                module.weight_zero_point,
                scheme.weights,
            )
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def main() -> None:
    """Quantize, write, print."""
    parser = options_parser(__doc__)
    parser.add_argument("--samples", type=int, default=None, help="default: all")
    parser.add_argument("--symmetric", action="store_true")
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
    peak = peak_memory_bytes()  # before saving, which is no part of what is timed
    write_checkpoint(options.model, options.out, dequantized(model))
    print_figures(seconds, peak, f"llm-compressor {version('llmcompressor')}")


if __name__ == "__main__":
    main()
