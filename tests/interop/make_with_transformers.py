"""Make random models, change their config.json and save transformers' logits. Usage: VARIANTS.json OUT

VARIANTS.json holds ``{name: [model_type, settings, changes]}``. OUT/name gets the model with the changes
in its config.json, and expected.npz the logits before and after them; none where transformers refuses.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
variants, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
for seed, (name, (model_type, settings, changes)) in enumerate(variants.items()):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SHAPE | settings))
    made = AutoModelForCausalLM.from_config(config)
    for key, parameter in (*made.named_parameters(), *made.named_buffers()):
        if key.endswith("norm.weight") or key.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0 if key.endswith("bias") else 1.0, 0.2)
    folder = out / name
    made.save_pretrained(folder)
    ids = torch.randint(3, 90, (2, 70))
    results = {"input_ids": ids.numpy().astype(np.int32)}
    path = folder / "config.json"
    for when in ("before", "after"):
        if when == "after":
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        except Exception as error:  # what it makes of strange keys is what is asked
            print(name, when, repr(error)[:200])
            continue
        with torch.no_grad():
            results[when] = model(ids).logits.numpy()
    np.savez_compressed(folder / "expected.npz", **results)
