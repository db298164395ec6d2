"""Folders whose tensors contradict their config.json mean to us what they mean to the real clients, which
load what we make of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import run_client
from safetensors.numpy import load_file, save_file
from shared_data import TESTS
from test_interop import check_loads

import bitwright
from bitwright.formats.mlx import MlxFormat

pytestmark = pytest.mark.slow

DEMO = bitwright.demo_folder()
TINY = TESTS / "data" / "tiny"
Arrays = dict[str, Any]


def changed(
    source: Path,
    target: Path,
    config: Callable[[dict[str, Any]], Any] = lambda _: None,
    tensors: Callable[[Arrays], Any] = lambda _: None,
) -> Path:
    settings = json.loads((source / "config.json").read_text())
    arrays = load_file(source / "model.safetensors")
    config(settings)
    arrays = tensors(arrays) or arrays
    target.mkdir()
    (target / "config.json").write_text(json.dumps(settings))
    save_file(arrays, target / "model.safetensors", {"format": "pt"})
    return target


def bare(arrays: Arrays) -> Arrays:
    return {name.removeprefix("model."): array for name, array in arrays.items()}


def own_head(arrays: Arrays) -> None:
    matrix = arrays["model.embed_tokens.weight"]
    noise = np.random.default_rng(0).standard_normal(matrix.shape)
    arrays["lm_head.weight"] = (matrix.astype(np.float32) + 0.1 * noise).astype(matrix.dtype)


def unused(arrays: Arrays) -> None:
    """Layers for multi-token prediction under both names that are in use, a denied bias, a classifier."""
    for name in [each for each in arrays if each.startswith("model.layers.0.")]:
        arrays[name.replace("layers.0", "layers.3")] = arrays[name]
        arrays[name.replace("model.layers.0", "mtp.layers.0")] = arrays[name]
    norm = arrays["model.norm.weight"]
    arrays["model.layers.0.self_attn.o_proj.bias"] = np.ones_like(norm)
    arrays["score.weight"] = np.stack([norm, norm])


def renamed(arrays: Arrays) -> Arrays:
    """As some checkpoints of Gemma 3 have them."""
    old, new = "language_model.model.", "model.language_model."
    return {
        name.replace(old, new) if name.startswith(old) else f"model.{name}": array
        for name, array in arrays.items()
    }


@pytest.mark.filterwarnings("ignore::bitwright.BitwrightWarning")
def test_transformers_computes_the_same(tmp_path: Path) -> None:
    folders = [
        changed(DEMO, tmp_path / "bare", tensors=bare),
        changed(TINY / "qwen2", tmp_path / "bare-qwen2", tensors=bare),
        changed(TINY / "qwen3_moe", tmp_path / "bare-moe", tensors=bare),
        changed(DEMO, tmp_path / "head", tensors=own_head),
        changed(TINY / "smollm3", tmp_path / "head-smollm3", tensors=own_head),
        changed(TINY / "llama-biases", tmp_path / "head-llama", tensors=own_head),
        changed(DEMO, tmp_path / "unused", tensors=unused),
        changed(TINY / "gemma3", tmp_path / "gemma3", tensors=renamed),
    ]
    written = []
    for folder in folders:
        bitwright.convert(folder, tmp_path / f"{folder.name}-float", "float", progress=False)
        written.append(tmp_path / f"{folder.name}-float")
    ids = np.arange(1, 25).reshape(2, 12)
    np.save(tmp_path / "tokens.npy", ids)
    out = tmp_path / "logits.npz"
    run_client(
        "gptqmodel", "transformers_logits.py", tmp_path / "tokens.npy", out, *folders, *written
    )
    with np.load(out) as theirs:
        for number, folder in enumerate((*folders, *written)):
            ours = bitwright.load_model(folder).logits(ids)
            assert np.abs(theirs[str(number)] - ours).max() < 5e-4, folder.name


@pytest.mark.filterwarnings("ignore::bitwright.BitwrightWarning")
def test_mlx_lm_loads_what_is_made_of_them(tmp_path: Path) -> None:
    def say_nothing(config: dict[str, Any]) -> None:
        del config["tie_word_embeddings"]

    folders = [
        changed(DEMO, tmp_path / "bare", tensors=bare),
        changed(DEMO, tmp_path / "head", tensors=own_head),
        changed(DEMO, tmp_path / "silent", say_nothing, own_head),
        changed(DEMO, tmp_path / "unused", tensors=unused),
        changed(TINY / "gemma3", tmp_path / "gemma3", tensors=renamed),
        changed(TINY / "deepseek_v3", tmp_path / "latent"),
    ]
    outs = []
    for folder in folders:
        outs.append(tmp_path / f"{folder.name}-out")
        options: dict[str, Any] = {}
        if folder.name in ("gemma3", "latent"):
            narrow = "*self_attn*" if folder.name == "gemma3" else "*o_proj"  # for groups of 32
            options["exclude"] = [narrow]
        bitwright.quantize(folder, outs[-1], "rtn", group_size=32, progress=False, **options)
    check_loads("mlx", outs, np.arange(1, 65).reshape(2, 32))


def test_what_mlx_lm_saves_is_read(tmp_path: Path) -> None:
    """Families under the names that they have there, in float and quantized; with samples shorter than
    windows, which mlx-lm does not know in all of them."""
    names = (
        "deepseek_v3",
        "gemma2",
        "gemma3",
        "llama-biases",
        "olmo2",
        "qwen2",
        "qwen3_moe",
        "smollm3",
    )
    sources = []
    for name in names:
        source = changed(TINY / name, tmp_path / name)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(MlxFormat.spell(config)))
        sources.append(source)
    np.save(tmp_path / "tokens.npy", np.arange(1, 13).reshape(3, 4))
    out = tmp_path / "saved"
    run_client("mlx", "save_with_mlx.py", tmp_path / "tokens.npy", out, *sources)
    for name in names:
        for kind in ("float", "quantized"):
            folder = out / f"{name}-{kind}"
            ours = bitwright.load_model(folder).logits(np.load(tmp_path / "tokens.npy"))
            theirs = np.load(folder / "logits.npy")
            assert np.abs(ours - theirs).max() < 2e-3 * max(1, np.abs(theirs).max()), folder.name
