"""Logits of the last of three tokens, as transformers and GPTQModel load a folder. Usage: LOADER:MODEL...,
where LOADER is transformers, for what it has of text and images, or gptqmodel."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from transformers import AutoModelForImageTextToText, AwqConfig, GPTQConfig

IDS = [[5, 6, 7]]


def main(*places: str) -> None:
    torch.compiler.set_stance("force_eager")  # see gptqmodel_perplexity.py, for the kernels, too
    for place in places:
        loader, _, folder = place.partition(":")
        model, info = by_transformers(folder) if loader == "transformers" else by_gptqmodel(folder)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(IDS)).logits[0, -1]
        found = {"logits": logits.tolist(), **{key: sorted(info[key]) for key in info}}
        print(json.dumps(found), flush=True)


def by_transformers(folder: str) -> tuple[Any, dict[str, Any]]:
    config = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
    kernels = {
        "gptq": GPTQConfig(bits=4, backend="gptq_torch"),
        "awq": AwqConfig(backend="torch_awq"),
    }
    kernel = kernels.get(config["quant_method"])
    settings = {} if kernel is None else {"quantization_config": kernel}
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **settings
    )
    if config["quant_method"] == "gptq":
        in_float32(model)
    return model, {key: info[key] for key in ("missing_keys", "unexpected_keys")}


def by_gptqmodel(folder: str) -> tuple[Any, dict[str, Any]]:
    model = GPTQModel.load(
        folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
    ).model
    in_float32(model)
    return model.float(), {}


def in_float32(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, BaseQuantLinear):
            module.float()


if __name__ == "__main__":
    main(*sys.argv[1:])
