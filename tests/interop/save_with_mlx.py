"""Load folders with mlx-lm and save them again, in float and quantized, with the logits that these have.
Usage: TOKENS.npy OUT MODEL..."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_config, save_model


def main(tokens_file: str, out: str, *folders: str) -> None:
    ids = mx.array(np.load(tokens_file))
    for folder in map(Path, folders):
        model, config = load_model(folder)
        for kind in ("float", "quantized"):
            if kind == "quantized":
                model, config = quantize_model(
                    model, config, group_size=32, bits=4, quant_predicate=_fits
                )
            saved = Path(out, f"{folder.name}-{kind}")
            save_model(saved, model)
            save_config(dict(config), saved / "config.json")
            again, _ = load_model(saved)
            again.set_dtype(mx.float32)
            np.save(saved / "logits.npy", np.array(again(ids).astype(mx.float32)))


def _fits(_: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
