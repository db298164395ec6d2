"""Time one step of DWQ in plain torch, as a prototype would have it, and print one JSON line.

Runs in an environment of its own: pip install torch==2.13.0 transformers==5.23.0

Usage: python bench/peers/peer_torch_dwq.py MODEL BATCH.npz [--rounds 5] [--bits 3] [--group-size 64]

MODEL is a Llama checkpoint in float; ``bench/suites/dwq.py step`` writes the batch: token ids and a
teacher's targets. All of a step is what autograd makes of it: no activation is computed again.
"""

import argparse
import json
import resource
import time
from statistics import median

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

LEARNING_RATE = 1e-4
LEAST = 1e-12  # of the probability of all tokens that are not the teacher's


class QuantizedLinear(nn.Module):
    """A linear whose weight is ``scale * code + bias``, dequantized whenever it is used."""

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__()
        self.shape = linear.weight.shape
        groups = linear.weight.detach().reshape(self.shape[0], -1, group_size)
        least, most = groups.aminmax(dim=-1, keepdim=True)
        scales = ((most - least) / (2**bits - 1)).clamp_min(1e-8)
        self.register_buffer("codes", ((groups - least) / scales).round())
        self.scales = nn.Parameter(scales)
        self.biases = nn.Parameter(least.clone())
        self.addend = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        weight = (self.scales * self.codes + self.biases).reshape(self.shape)
        return nn.functional.linear(inputs, weight, self.addend)


def quantize_blocks(model: nn.Module, bits: int, group_size: int) -> list[nn.Parameter]:
    """Replace the linears of the blocks, and return what is trained; the rest of the model is frozen."""
    model.requires_grad_(False)
    parameters = []
    for block in model.model.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    quantized = QuantizedLinear(child, bits, group_size)
                    setattr(parent, name, quantized)
                    parameters += [quantized.scales, quantized.biases]
    return parameters


def divergence(logits: Tensor, ids: Tensor, known: Tensor, rest: Tensor) -> Tensor:
    """Return the mean KL(teacher ‖ student) over the teacher's tokens, with all others as one outcome."""
    log_q = logits.log_softmax(-1).gather(-1, ids)
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(LEAST)
    inside = (known.exp() * (known - log_q)).sum(-1)
    return (inside + torch.xlogy(rest, rest) - rest * rest_q.log()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("batch", help="tokens, ids, log_probabilities, rest, .npz")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    batch = np.load(options.batch)
    tokens = torch.from_numpy(batch["tokens"]).long()
    ids, known, rest = (
        torch.from_numpy(batch[name]).reshape(*tokens.shape, *batch[name].shape[1:])
        for name in ("ids", "log_probabilities", "rest")
    )
    ids = ids.long()
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    parameters = quantize_blocks(model, options.bits, options.group_size)
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    seconds, losses = [], []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = divergence(model(input_ids=tokens, use_cache=False).logits, ids, known, rest)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    figures = {
        "seconds": median(seconds[1:]),  # the first round warms up
        # ru_maxrss is in KiB on Linux.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_loss": losses[0],
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
