"""Round a folder with compressed-tensors and save what it dequantizes to. Usage: MODEL OUT EXPECTED.npz

This is what llm-compressor does without data, in an environment that need not have llm-compressor. The
decompressor computes in the dtype of the scales, that of the model, which rounds every weight; here it
gets the tensors of the folder with the scales in float32.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import is_match
from numpy import savez
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def dequantized(folder: Path) -> dict[str, Any]:
    """The float32 weights of all quantized layers, by the folder's tensors and config.json."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(settings).config_groups.values()
    tensors = load_file(folder / "model.safetensors")
    linear = torch.nn.Linear(1, 1)
    weights = {}
    for packed in [name for name in tensors if name.endswith(".weight_packed")]:
        name = packed.removesuffix(".weight_packed")
        scheme = next(s for s in groups if any(is_match(name, linear, t) for t in s.targets))
        state = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        state["weight_scale"] = state["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
        weights[name] = compressor.decompress(state, scheme)["weight"].numpy()
    return weights


def scheme(options: argparse.Namespace, bits: int, *targets: str) -> QuantizationScheme:
    """Settings for the layers whose names or classes are given."""
    weights = QuantizationArgs(
        num_bits=bits,
        strategy="group" if options.group_size else "channel",
        group_size=options.group_size or None,
        symmetric=not options.asymmetric,
        actorder=getattr(options, "actorder", None),
    )
    return QuantizationScheme(targets=list(targets), weights=weights)


def config_groups(options: argparse.Namespace) -> dict[str, QuantizationScheme]:
    """Settings for all linear layers, the down projections apart where the options say so."""
    if not options.down_proj_bits:
        return {"group_0": scheme(options, options.bits, "Linear")}
    return {
        "group_0": scheme(options, options.bits, r"re:.*\.(gate|up|[qkvo])_proj$"),
        "group_1": scheme(options, options.down_proj_bits, r"re:.*\.down_proj$"),
    }


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that do not depend on the method."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32, help="0: a scale per row")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--dtype", choices=["auto", "float16", "float32"], default="auto")
    parser.add_argument("--down-proj-bits", type=int, help="another precision, in a second group")
    return parser


def finish(options: argparse.Namespace, start: float, client: str) -> None:
    """Save the tokenizer and the expected weights, and print what was done."""
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    weights = dequantized(options.out)
    savez(options.expected, **weights)
    result = {
        "layers": len(weights),
        "seconds": time.perf_counter() - start,
        "client": f"{client}compressed-tensors {version('compressed-tensors')}",
    }
    print(json.dumps(result))


@torch.no_grad()
def main() -> None:
    options = options_parser(__doc__).parse_args()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    config = QuantizationConfig(config_groups=config_groups(options), ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight, settings = module.weight, module.quantization_scheme.weights
            groups = weight.unflatten(1, (-1, settings.group_size or weight.shape[1]))
            grid = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
            module.weight_scale.copy_(grid[0])
            module.weight_zero_point.copy_(grid[1])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(options.out)
    compressor.update_config(options.out)
    finish(options, start, "")


if __name__ == "__main__":
    main()
