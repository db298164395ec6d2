"""Quantize a folder with llm-compressor and save what it dequantizes to. Usage: MODEL OUT EXPECTED.npz

See make_with_compressedtensors.py for what is saved.
"""

import time
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from make_with_compressedtensors import config_groups, finish, options_parser
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--method", choices=["rtn", "gptq"], default="rtn")
    parser.add_argument("--actorder", choices=["static"], default=None)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    modifier = GPTQModifier if options.method == "gptq" else QuantizationModifier
    data = {}
    if options.method == "gptq":
        # What is in the codes does not matter to who reads them.
        size = (options.samples, options.length)
        tokens = torch.randint(model.config.vocab_size, size, generator=torch.manual_seed(0))
        data = {
            "dataset": Dataset.from_dict({"input_ids": tokens.tolist()}),
            "num_calibration_samples": options.samples,
            "max_seq_length": options.length,
        }
    recipe = modifier(config_groups=config_groups(options), ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(options.out, save_compressed=True)
    finish(options, start, f"llm-compressor {version('llmcompressor')}, ")


if __name__ == "__main__":
    main()
