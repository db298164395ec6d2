"""Perplexity of GGUF files, as llama.cpp loads them. Usage: TOKENS.npy MODEL.gguf...

It rounds what it multiplies with to the type of the weights, and to 8 bits for quantized ones, so only with
float32 weights are the figures exact.
"""

import json
import math
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama


def main(tokens_file: str, *files: str) -> None:
    tokens = np.load(tokens_file)
    for file in files:
        judge(file, tokens)


def judge(file: str, tokens: np.ndarray[Any, Any]) -> None:
    start = time.perf_counter()
    model = Llama(
        file,
        n_ctx=tokens.shape[1],
        n_threads=1,  # two that share a processor spin in each other's way
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    total = 0.0
    for row in tokens:
        model.reset()
        model.eval(row[:-1].tolist())
        logits = model.scores[: len(row) - 1].astype(np.float64)
        largest = logits.max(axis=1)
        logsumexp = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
        total += float((logsumexp - logits[np.arange(len(row) - 1), row[1:]]).sum())
    count = tokens[:, 1:].size
    result = {
        "perplexity": math.exp(total / count),
        "tokens": count,
        "seconds": time.perf_counter() - start,
        "client": f"llama-cpp-python {version('llama_cpp_python')}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
