"""What it takes to quantize a model that transformers runs, from its shapes alone."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.adapter.torch_model import CHUNK_TOKENS, TorchModel
from bitwright.methods.method import MethodOptions
from bitwright.quantization.plan import REFINED_ROWS

Shape = tuple[int, int]
SCORES = 3  # arrays of attention's scores that exist at one time
ACTIVATED = 2  # of what a block computes: as it is, and changed by activations and norms
SOLVED_COPIES = 3  # of a matrix that is being solved, beside the codes


def needed_bytes(
    model: TorchModel, options: MethodOptions, tokens: NDArray[np.int32] | None
) -> int:
    """Return the most that a run takes beside what the process has already.

    Parameters
    ----------
    model
        Whose weights need not be there yet.
    options
        What is done to each layer.
    tokens
        ``[samples, length]`` of calibration, None for none.
    """
    parameters = [*model.module.parameters(), *model.module.buffers()]
    weights = 4 * sum(each.numel() for each in parameters)
    # Pages of the files count until they are closed.
    files = model.checkpoint.stored_bytes()
    width = max(model.checkpoint.dtype(name).itemsize for name in model.checkpoint.names())
    compared = (width + 4 + 1) * max(each.numel() for each in parameters)
    _, blocks = model.find_blocks()
    observing = hidden_states = 0
    if tokens is not None:
        text = model.module.config.get_text_config()
        rows = min(tokens.size, max(1, CHUNK_TOKENS // tokens.shape[1]) * tokens.shape[1])
        heads = int(getattr(text, "num_attention_heads", 1))
        hidden = int(text.hidden_size)
        scores = SCORES * heads * rows * tokens.shape[1]
        inner = max(sum(out for out, _ in map(_flat, _matrices(block))) for block in blocks)
        hidden_states = 4 * tokens.size * hidden
        observing = 4 * (scores + ACTIVATED * rows * inner)
    solving = max(_block_bytes(block, options, tokens, observing) for block in blocks)
    return int(weights + max(files, compared, hidden_states + solving))


def _block_bytes(
    block: Any, options: MethodOptions, tokens: NDArray[np.int32] | None, observing: int
) -> int:
    """Return what the statistics of a block take, with what gathers them or what solving works on."""
    inputs = list(_inputs(block))
    shapes = [_flat(each) for each in _matrices(block)]
    largest = max(math.prod(shape) for shape in shapes)
    work = (4 * SOLVED_COPIES + 1) * largest
    if tokens is None:
        return work
    widest = max(inputs)
    work += 4 * widest**2 + (12 * REFINED_ROWS * widest if options.refine else 0)
    held = 4 * sum(width**2 for width in inputs)
    if options.method.scales_first:  # the weights as they were, and both forms that are judged
        held += (4 + 2) * sum(map(math.prod, map(tuple, _matrices(block))))
    return held + max(observing, work)


def _matrices(block: Any) -> Iterator[tuple[int, ...]]:
    for parameter in block.parameters():
        if parameter.ndim > 1:
            yield tuple(parameter.shape)


def _flat(shape: tuple[int, ...]) -> Shape:
    return shape[-2], shape[-1]


def _inputs(block: Any) -> Iterator[int]:
    """Yield how many channels each input has that statistics are gathered of.

    The linears of a module read its own input and, the last of them, what is computed from it.
    """
    for module in block.modules():
        own = dict(module.named_parameters(recurse=False))
        if all(name in own and own[name].ndim == 3 for name in ("gate_up_proj", "down_proj")):
            for name in ("gate_up_proj", "down_proj"):
                yield from [own[name].shape[2]] * own[name].shape[0]
        widths = [each.in_features for each in module.children() if hasattr(each, "in_features")]
        yield from set(widths)
        if len(widths) > 1 and len(set(widths)) == 1:
            yield widths[-1]
