"""Engines find what config.json names, where files, modules and engines have three names for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import run_client
from made_models import new_spelling
from shared_data import TESTS

import bitwright

pytestmark = pytest.mark.slow
DEMO, GEMMA = bitwright.demo_folder(), TESTS / "data" / "tiny" / "gemma3"
IN_FLOAT = {"exclude": ["*layers.0.mlp.*", "*.1.self_attn.[qkv]_proj"]}
FINER = {"overrides": {"*layers.0.mlp.*": {"bits": 8}}, "exclude": ["*.1.self_attn.[qkv]_proj"]}


def check(client: str, script: str, tolerance: float, folders: dict[str, Path]) -> None:
    """Compare the logits of a client, which loads all folders at once, with ours."""
    places = [f"{loader.split()[0]}:{folder}" for loader, folder in folders.items()]
    lines = run_client(client, script, *(places if client != "mlx" else folders.values()))
    found = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    assert len(found) == len(folders)
    for folder, theirs in zip(folders.values(), found, strict=True):
        assert not theirs.get("missing_keys"), folder
        assert not theirs.get("unexpected_keys"), folder
        ours = bitwright.load_model(folder).logits([[5, 6, 7]])[0, -1]
        difference = np.abs(ours - theirs["logits"]).max() / np.abs(ours).max()
        assert difference < tolerance, folder


def made(model: Path, out: Path, format: Any, **options: Any) -> Path:
    bitwright.quantize(model, out, "rtn", 4, 32, format, progress=False, **options)
    return out


def test_multimodal_models_load_in_transformers_and_gptqmodel(tmp_path: Path) -> None:
    new = new_spelling(tmp_path / "new")
    folders = {}
    for name, options in (("whole", {}), ("part", IN_FLOAT)):
        for format in ("compressed-tensors", "gptq", "awq"):
            out = made(GEMMA, tmp_path / f"{format}-{name}", format, **options)
            folders[f"transformers {format} {name}"] = out
    folders["transformers new"] = made(new, tmp_path / "saved", "compressed-tensors", **IN_FLOAT)
    folders["transformers mixed"] = made(GEMMA, tmp_path / "mixed", "compressed-tensors", **FINER)
    folders["gptqmodel mixed"] = made(GEMMA, tmp_path / "gptq", "gptq", **FINER)
    # A text model: rules for all parts of a module, and others.
    folders["gptqmodel text"] = made(DEMO, tmp_path / "text", "gptq", **FINER)
    check("gptqmodel", "gptqmodel_logits.py", 2e-3, folders)


def test_multimodal_models_load_in_mlx(tmp_path: Path) -> None:
    new = new_spelling(tmp_path / "new")
    folders = {
        name: made(model, tmp_path / name, "mlx", scale_dtype="float32", **FINER)
        for name, model in (("old", GEMMA), ("saved", new))
    }
    check("mlx", "mlx_logits.py", 2e-2, folders)
