"""Runs on the demo model, and what they are worth."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

import bitwright

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
EVALUATION = DEMO / "evaluation.txt"


def run(out: Path, model: Path = DEMO, **options: Any) -> bitwright.QuantizationReport:
    settings: dict[str, Any] = {
        "bits": 3,
        "calibration": TEXT,
        "samples": 12,
        "length": 128,
        "float_embeddings": True,  # what methods are worth shows in the layers
        "progress": False,
    }
    return bitwright.quantize(model, out, **{**settings, **options})


def divergence(out: Path, samples: int = 16) -> float:
    result = bitwright.evaluate(out, EVALUATION, reference=DEMO, length=128, samples=samples)
    assert result.kl_divergence is not None
    return result.kl_divergence


def copy_of_demo(folder: Path, **changes: Any) -> Path:
    """Copy the demo model with some tensors or config entries changed."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if name in tensors:
            tensors[name] = value
        else:
            config[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
