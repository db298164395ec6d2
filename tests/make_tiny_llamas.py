"""Makes tests/data/llama-*: tiny random Llamas and the logits that transformers computes from them.

Run once, in an environment of its own, and commit the result::

    python3 -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0
    /tmp/hf/bin/pip install transformers==5.23.0 safetensors
    /tmp/hf/bin/python tests/make_tiny_llamas.py

Logits are of the model as ``from_pretrained`` loads it, in float32.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).parent / "data"
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "biases": (
        torch.float32,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "llama3": (torch.bfloat16, {"rope_parameters": LLAMA3}),
    "yarn": (torch.float16, {"rope_parameters": YARN}),
    "linear": (torch.float32, {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
}


def main() -> None:
    """Make every variant."""
    for seed, (name, (dtype, settings)) in enumerate(VARIANTS.items()):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings}))
        for key, parameter in made.named_parameters():
            if key.endswith("norm.weight") or key.endswith("bias"):
                torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.2)
        folder = DATA / f"llama-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        made.to(dtype).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.randint(0, SHAPE["vocab_size"], (2, 70))
        with torch.no_grad():
            logits = model(ids).logits
        np.savez_compressed(
            folder / "expected.npz", input_ids=ids.numpy().astype(np.int32), logits=logits.numpy()
        )
        print(name, float(logits.std()))


main()
