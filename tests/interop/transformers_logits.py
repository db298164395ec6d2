"""Logits of float folders, as transformers loads them. Usage: TOKENS.npy OUT.npz MODEL..."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(tokens_file: str, out: str, *folders: str) -> None:
    tokens = torch.from_numpy(np.load(tokens_file)).long()
    logits = {}
    for number, folder in enumerate(folders):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            logits[str(number)] = model.eval()(input_ids=tokens).logits.numpy()
    np.savez(out, **logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
