"""Write the speed benchmark's model: a random Llama of 98 M parameters. Usage: OUT"""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, BLOCKS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1024, 2816, 8, 16, 4, 64, 4096
# The token ids of any text need a vocabulary; that of `small` has as many entries as this model.
TOKENIZER = Path(__file__).resolve().parents[2] / "shared" / "models" / "small"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(rows: int, columns: int) -> np.ndarray:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return (values * np.float32(0.02)).astype(ml_dtypes.bfloat16)

    def ones() -> np.ndarray:
        return np.ones(HIDDEN, ml_dtypes.bfloat16)

    result = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
    for index in range(BLOCKS):
        block = f"model.layers.{index}."
        result |= {
            block + "input_layernorm.weight": ones(),
            block + "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN),
            block + "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            block + "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            block + "self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            block + "post_attention_layernorm.weight": ones(),
            block + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            block + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            block + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
        }
    return result | {"model.norm.weight": ones(), "lm_head.weight": normal(VOCABULARY, HIDDEN)}


def main(folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    weights = tensors()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    for source in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(source, out / source.name)
    print(f"{out}: {sum(w.size for w in weights.values()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
