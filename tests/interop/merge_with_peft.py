"""Make adapters with PEFT for a model, and merge them by its own merge."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

CASES = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "all": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"up_proj": 2, r"layers\.0\..*q_proj": 32},
    },
    "embedding": {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "o_proj"]},
    "whole": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "few layers": {"r": 2, "target_modules": ["gate_proj"], "layers_to_transform": [1]},
    "dora": {"r": 2, "target_modules": ["q_proj"], "use_dora": True},
    "biased": {"r": 2, "target_modules": ["q_proj"], "lora_bias": True},
    "pissa": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}

model, out, dtype = sys.argv[1:]
for number, (name, settings) in enumerate(CASES.items()):
    torch.manual_seed(number)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(Path(out) / name)
    if not settings.get("lora_bias"):  # which needs biases to be merged into
        adapted.merge_and_unload().save_pretrained(Path(out) / f"{name} merged")
