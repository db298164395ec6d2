"""Quantize a model with auto-round on given token ids, and time it.

Usage, in an environment of its own::

    python3 -m venv /tmp/autoround
    /tmp/autoround/bin/pip install torch==2.13.0 auto-round==0.15.1
    /tmp/autoround/bin/python bench/peers/peer_autoround.py SHARED/models/story tokens.npy /tmp/out \\
        --bits 3 --group-size 64 --iterations 200

Grids are asymmetric with integer zero points; all else is auto-round's default. Writes the dequantized
model and prints one JSON line; the time is that of `quantize` alone.
"""

import time
from importlib.metadata import version

import numpy as np
import torch
from auto_round import AutoRound
from peer import options_parser, peak_memory_bytes, print_figures, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize, write, print."""
    parser = options_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=200, help="auto-round's default")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tokens = torch.from_numpy(np.load(options.tokens).astype(np.int64))
    # bfloat16 is several times slower than float32 on a CPU without its instructions.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group_size,
        sym=False,
        iters=options.iterations,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": row[None]} for row in tokens],
        device_map="cpu",
    )
    start = time.perf_counter()
    model, _ = rounder.quantize()
    seconds = time.perf_counter() - start
    peak = peak_memory_bytes()  # before saving, which is no part of what is timed
    tensors = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    write_checkpoint(options.model, options.out, tensors)
    print_figures(seconds, peak, f"auto-round {version('auto-round')}")


if __name__ == "__main__":
    main()
