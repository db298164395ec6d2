"""Perplexity of a text as llama-perplexity takes it, by llama.cpp. Usage: TEXT LENGTH MODEL.gguf...

The text is tokenized once, with the token of the beginning where the vocabulary adds one, and cut into
windows whose first token that one replaces; what comes after the middle of each is judged.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama, llama_model_get_vocab, llama_vocab_get_add_bos


def main(text_file: str, length: str, *files: str) -> None:
    text = Path(text_file).read_bytes().removesuffix(b"\n")
    for file in files:
        judge(file, text, int(length))


def judge(file: str, text: bytes, length: int) -> None:
    model = Llama(
        file,
        n_ctx=length,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    adds = bool(llama_vocab_get_add_bos(llama_model_get_vocab(model.model)))
    tokens = model.tokenize(text, add_bos=True, special=False)  # which adds it only where it does
    middle, total, count = length // 2, 0.0, 0
    windows = len(tokens) // length
    for window in range(windows):
        row = tokens[window * length : (window + 1) * length]
        model.reset()
        model.eval([model.token_bos() if adds else row[0], *row[1:]])
        for place in range(middle, length - 1):
            logits = model.scores[place].astype(np.float64)
            largest = logits.max()
            total += largest + math.log(np.exp(logits - largest).sum()) - logits[row[place + 1]]
            count += 1
    result = {"perplexity": math.exp(total / count), "windows": windows, "adds_bos": adds}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
