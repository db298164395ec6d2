"""Random models of any size, of the families in tests/data/tiny."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from shared_data import TESTS

from bitwright.models import ARCHITECTURES
from bitwright.models.config import ModelConfig
from bitwright.models.layout import block_layout


def make_sized(folder: Path, family: str, **changes: Any) -> Path:
    """Write a model like the tiny one of `family`, with these keys of config.json changed."""
    content = json.loads((TESTS / "data/tiny" / family / "config.json").read_text()) | changes
    rules = {name: each.rules for name, each in ARCHITECTURES.items()}
    config = ModelConfig.from_dict(content, folder / "config.json", rules)
    architecture = ARCHITECTURES[config.family]
    names, norms = architecture.names[0], architecture.norm_kind
    matrix = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{names.embedding}.weight": matrix}
    if not config.tie_word_embeddings:
        shapes[f"{names.head}.weight"] = matrix
    for part in ("weight", "bias") if norms == "layer_norm" else ("weight",):
        shapes[f"{names.final_norm}.{part}"] = (config.hidden_size,)
    for index in range(config.num_hidden_layers):
        layout, prefix = block_layout(architecture, config, index), names.block.format(index) + "."
        for kind in (layout.linears, layout.floats):
            shapes |= {f"{prefix}{name}.weight": shape for name, shape in kind.items()}
        shapes |= {prefix + name: shape for name, shape in layout.vectors.items()}
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        values = 0.05 * rng.standard_normal(shape, np.float32)
        if len(shape) == 1 and norms != "offset_rms_norm" and name.endswith("weight"):
            values += 1
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content))
    return folder
