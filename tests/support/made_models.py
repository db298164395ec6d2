"""Models that are made for tests: of other shapes, names and files than those in tests/data/tiny."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from shared_data import TESTS

import bitwright
from bitwright.checkpoint.gguf_file import TensorInfo, tensor_offsets, write_header

Array = np.ndarray[Any, Any]
DEMO = bitwright.demo_folder()
GEMMA = TESTS / "data" / "tiny" / "gemma3"


def k_model(folder: Path) -> Path:
    """Make a random Llama whose rows are whole superblocks."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    config = {
        **json.loads((DEMO / "config.json").read_text()),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def matrix(out: int, channels: int) -> Array:
        return (rng.standard_normal((out, channels)) / 12).astype(ml_dtypes.bfloat16)

    tensors = {
        "model.embed_tokens.weight": matrix(512, 256),
        "lm_head.weight": matrix(512, 256),
        "model.norm.weight": np.ones(256, ml_dtypes.bfloat16),
    }
    for index in range(2):
        prefix = f"model.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = rng.uniform(0.5, 2, 256).astype(ml_dtypes.bfloat16)
        for name, out, channels in (
            ("self_attn.q_proj", 256, 256),
            ("self_attn.k_proj", 128, 256),
            ("self_attn.v_proj", 128, 256),
            ("self_attn.o_proj", 256, 256),
            ("mlp.gate_proj", 512, 256),
            ("mlp.up_proj", 512, 256),
            ("mlp.down_proj", 256, 512),
        ):
            tensors[f"{prefix}{name}.weight"] = matrix(out, channels)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def new_spelling(folder: Path) -> Path:
    """Return Gemma 3 as transformers saves it since 4.52."""
    folder.mkdir()
    (folder / "config.json").write_bytes((GEMMA / "config.json").read_bytes())
    tensors = load_file(GEMMA / "model.safetensors")
    named = {
        f"model.{name}".replace("model.language_model.model.", "model.language_model."): array
        for name, array in tensors.items()
    }
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Array]) -> Path:
    infos = [TensorInfo(name, array.dtype, array.shape) for name, array in tensors.items()]
    with path.open("wb") as file:
        start = write_header(file, metadata, infos)
        for array, offset in zip(tensors.values(), tensor_offsets(infos), strict=False):
            file.seek(start + offset)
            file.write(array.tobytes())
        file.truncate(start + tensor_offsets(infos)[-1])
    return path
