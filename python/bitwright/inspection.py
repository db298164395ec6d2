"""What a checkpoint holds, what would be quantized, and what a run would take."""

import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bitwright import _kernels
from bitwright.drift import drift_rows
from bitwright.errors import check_choice
from bitwright.evaluate import bits_per_weight, parameter_count
from bitwright.methods.refine import ROUNDS
from bitwright.methods.solver import CORRECTED_METHODS, METHODS, SCALED_METHODS
from bitwright.models.block import Rotation
from bitwright.models.model import Model, load_model

PROCESS_BYTES = 90_000_000  # the interpreter and its libraries
CARRIED_BYTES_PER_SECOND = 2e8  # read, checked, converted, packed and written
MEASURED_SIZE = 1024  # of the product that the machine's speed is measured on


@dataclass(frozen=True)
class LayerKind:
    """Linears of the same name and shape in several blocks (and experts).

    Parameters
    ----------
    name
        Within the block; ``*`` stands for the expert's index.
    shape
        ``(out, in)``.
    count
        How many there are in the model.
    quantized
        Whether they would be quantized; routers, for example, stay in float.
    """

    name: str
    shape: tuple[int, int]
    count: int
    quantized: bool


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Parameters
    ----------
    folder, model_type, dtype
        The checkpoint, its family, and the dtype that it declares.
    format
        The quantization format it is stored in; None for float.
    blocks, experts
        Decoder blocks, and experts in each block that has them (0: none).
    parameters, bits_per_weight
        Of the whole checkpoint.
    tied
        Whether embedding and head are one matrix.
    layers
        The matrices in the blocks.
    method, preset, tokens
        The run that memory and time are estimated for.
    memory_bytes, seconds
        Estimates of its peak memory and of its time on this machine.
    """

    folder: Path
    model_type: str
    dtype: str
    format: str | None
    blocks: int
    experts: int
    parameters: int
    bits_per_weight: float
    tied: bool
    layers: tuple[LayerKind, ...]
    method: str
    preset: str
    tokens: int
    memory_bytes: int
    seconds: float


def inspect_model(
    model: str | os.PathLike[str],
    *,
    method: str = "gptq",
    preset: Literal["fast", "default"] = "default",
    samples: int = 128,
    length: int = 512,
) -> Inspection:
    """Describe a checkpoint folder, and estimate what quantizing it would take.

    Only headers are read. The time is that of the products of the run at the speed that a small one has
    now; it is good to a factor of two.

    Parameters
    ----------
    model
        Checkpoint folder.
    method, preset, samples, length
        The run to estimate, as for `quantize`.

    Returns
    -------
    Inspection

    Raises
    ------
    CheckpointError, UnsupportedModelError, ValueError
        If the model cannot be used, or there is no such method or preset.

    Examples
    --------
    >>> import bitwright
    >>> found = bitwright.inspect_model(bitwright.demo_folder())
    >>> found.model_type, found.blocks, found.layers[0].name, found.layers[0].shape
    ('llama', 3, 'self_attn.q_proj', (64, 64))
    """
    check_choice("method", method, METHODS)
    check_choice("preset", preset, ("fast", "default"))
    opened = load_model(model)
    counts: Counter[tuple[str, tuple[int, int], bool]] = Counter()
    for layout in opened.layouts:
        for shapes, quantized in ((layout.linears, True), (layout.floats, False)):
            for name, shape in shapes.items():
                counts[re.sub(r"\.\d+\.", ".*.", name), shape, quantized] += 1
    tokens = 0 if method == "rtn" else samples * length
    config = opened.config
    run = _Plan(method, tokens, 0)
    if preset == "default" and method in CORRECTED_METHODS:
        run = _Plan(method, tokens, drift_rows(tokens, Rotation(length, {})))
    return Inspection(
        folder=opened.checkpoint.folder,
        model_type=config.model_type,
        dtype=str(opened.dtype),
        format=None if opened.format is None else opened.format.name,
        blocks=config.num_hidden_layers,
        experts=config.experts.count if config.experts else 0,
        parameters=parameter_count(opened),
        bits_per_weight=bits_per_weight(opened),
        tied=opened.tied,
        layers=tuple(
            LayerKind(name, shape, count, quantized)
            for (name, shape, quantized), count in counts.items()
        ),
        method=method,
        preset=preset,
        tokens=tokens,
        memory_bytes=_memory(opened, run),
        seconds=_products(opened, run) / _speed()
        + opened.checkpoint.nbytes() / CARRIED_BYTES_PER_SECOND,
    )


@dataclass(frozen=True)
class _Plan:
    """A run to estimate; `drift_tokens` of its tokens go through the original, too, none without drift
    correction (and refinement)."""

    method: str
    tokens: int
    drift_tokens: int


def _memory(model: Model, run: _Plan) -> int:
    """Estimate the peak: a block's weights (of experts, one), the largest gram with what solving by it
    takes, the hidden states and the widest states between two stages; or the embedding and its copy."""
    scaled, corrected = run.method in SCALED_METHODS, run.drift_tokens > 0
    copies = (3 if scaled else 1) + corrected  # in float, rounded, and scaled
    largest = states = 0
    for layout in model.layouts:
        shapes = layout.linears
        one_expert = {
            name: shape
            for name, shape in (*shapes.items(), *layout.floats.items())
            if scaled or name not in layout.experts
        }
        weights = sum(out * channels for out, channels in one_expert.values())
        experts = [shapes[name] for name, place in layout.experts.items() if place.index == 0]
        weights += sum(out * channels for out, channels in experts)
        widest = max(channels for _, channels in shapes.values())
        solving = max(out * channels for out, channels in shapes.values())
        grams = 6 if corrected else 3
        largest = max(largest, 4 * (copies * weights + grams * widest**2 + 2 * solving))
        rows = run.tokens + run.drift_tokens
        states = max(states, 4 * rows * (widest + model.config.hidden_size))
    matrix = model.config.vocab_size * model.config.hidden_size
    embedding = matrix * (4 + model.dtype.itemsize)
    return PROCESS_BYTES + max(largest + states, embedding)


def _products(model: Model, run: _Plan) -> float:
    """Count the floating-point operations of a run: forward passes, grams, and solving."""
    tokens, drift = run.tokens, run.drift_tokens
    passes = 2.25 if run.method in SCALED_METHODS else 1.0
    passes += drift / max(tokens, 1)
    operations = 0.0
    for index, layout in enumerate(model.layouts):
        share = _routed_share(model, index)
        for stage in layout.stages:
            seen = tokens * (share if stage.expert is not None else 1.0)
            for number, name in enumerate(stage.linears):
                out, channels = layout.linears[name]
                operations += passes * 2 * seen * out * channels
                if number == 0:
                    operations += seen * channels**2 + 2.0 * drift * channels * min(out, channels)
                operations += _solving(run.method, out, channels, number == 0)
                if drift:  # correction, and refinement: a full product, then four halves per round
                    operations += (4.0 + 2.0 + 4.0 * ROUNDS) * out * channels**2
        operations += passes * _attention_products(model, tokens)
    return operations


def _solving(method: str, out: int, channels: int, first: bool) -> float:
    if method == "rtn":
        return 100.0 * out * channels
    operations = 0.0
    if "gptq" in method:
        operations += out * channels**2 + (channels**3 if first else 0)
    if "awq" in method:
        operations += 9 * min(out, 128) * channels**2 + 3000.0 * out * channels
    return operations or 3000.0 * out * channels


def _attention_products(model: Model, tokens: int) -> float:
    config = model.config
    return 4.0 * tokens * 512 * config.num_attention_heads * config.head_dim / 2


def _routed_share(model: Model, index: int) -> float:
    experts = model.config.experts
    return experts.chosen / experts.count if experts and model.config.is_sparse[index] else 1.0


def _speed() -> float:
    """Return the products and sums per second of a matrix product now."""
    size = MEASURED_SIZE
    left = np.ones((size, size), np.float32)
    out = np.empty_like(left)
    _kernels.linear(left, left, None, out, False)
    start = time.perf_counter()
    _kernels.linear(left, left, None, out, False)
    return 2 * size**3 / (time.perf_counter() - start)
