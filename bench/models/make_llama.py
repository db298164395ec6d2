"""Write a random Llama for benchmarks: python bench/models/make_llama.py OUT [--shape 0.1b] [--blocks N]

Shapes are those of real models (0.5b: Qwen2.5-0.5B without its biases; 1b, 8b, 70b: Llama 3). Real models
have a few channels with large inputs, random ones do not: qualities measured on these say nothing. With
--blocks only the first so many decoder blocks are written."""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from bitwright.checkpoint import CheckpointWriter

# hidden, intermediate, blocks, heads, key-value heads, head dimension, vocabulary, tied
SHAPES = {
    "0.1b": (1024, 2816, 8, 16, 4, 64, 4096, False),
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
}
# The token ids of any text need a vocabulary; that of `small` has as many entries as the smallest model.
TOKENIZER = Path(__file__).resolve().parents[3] / "shared" / "models" / "small"


def config(shape: str, blocks: int | None) -> dict[str, object]:
    """Return config.json."""
    hidden, intermediate, all_blocks, heads, key_heads, head_dim, vocabulary, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks or all_blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def shapes(shape: str, blocks: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the tensors."""
    hidden, intermediate, all_blocks, heads, key_heads, head_dim, vocabulary, tied = SHAPES[shape]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(blocks or all_blocks):
        block = f"model.layers.{index}."
        yield block + "input_layernorm.weight", (hidden,)
        yield block + "self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield block + "self_attn.k_proj.weight", (key_heads * head_dim, hidden)
        yield block + "self_attn.v_proj.weight", (key_heads * head_dim, hidden)
        yield block + "self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield block + "post_attention_layernorm.weight", (hidden,)
        yield block + "mlp.gate_proj.weight", (intermediate, hidden)
        yield block + "mlp.up_proj.weight", (intermediate, hidden)
        yield block + "mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)


def tensors(shape: str, blocks: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors, one at a time: gains of one, normal weights."""
    rng = np.random.default_rng(0)
    for name, extent in shapes(shape, blocks):
        if len(extent) == 1:
            values = np.ones(extent, np.float32)
        else:
            values = rng.standard_normal(extent, dtype=np.float32)
            values *= np.float32(0.02)
        yield name, values.astype(ml_dtypes.bfloat16)


def make_hollow(out: Path, shape: str) -> int:
    """Write a folder whose weights are a hole in a file, for plans that only look at shapes; return how
    many they are."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    header, end = {}, 0
    for name, extent in shapes(shape, None):
        size = 2 * math.prod(extent)
        header[name] = {"dtype": "BF16", "shape": extent, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    with open(out / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (out / "config.json").write_text(json.dumps(config(shape, None)))
    return end // 2


def make(out: Path, shape: str = "0.1b", blocks: int | None = None) -> None:
    """Write the folder, in place of what is there."""
    shutil.rmtree(out, ignore_errors=True)
    parameters = 0
    with CheckpointWriter(out, metadata={"format": "pt"}) as writer:
        for name, array in tensors(shape, blocks):
            writer.add(name, array)
            parameters += array.size
        writer.write_json("config.json", config(shape, blocks))
        if shape == "0.1b":
            for source in TOKENIZER.glob("tokenizer*"):
                writer.add_file(source)
    print(f"{out}: {parameters / 1e6:.1f} M parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.1b")
    parser.add_argument("--blocks", type=int)
    options = parser.parse_args()
    make(options.out, options.shape, options.blocks)


if __name__ == "__main__":
    main()
