"""Describes a checkpoint: its layers, which would be quantized, and the memory and time of a run."""

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitwright.checkpoint.hub import finds_models
from bitwright.errors import check_choice
from bitwright.evaluation import bits_per_weight, parameter_count
from bitwright.files.home import expands_home
from bitwright.formats import FormatName, GroupSize, Precision
from bitwright.grids.tensor import Grid
from bitwright.loading.model import load_model
from bitwright.methods.method import MethodOptions
from bitwright.methods.registry import METHODS
from bitwright.precision.target import Target
from bitwright.quantization.options import QuantizationOptions
from bitwright.quantization.plan import Work, plan_run
from bitwright.text.samples import DEFAULT_LENGTH
from bitwright.warned import reports_warnings

FORECAST_PRESETS = ("fast", "default", "high")


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
        Estimates of its peak memory, with all states in it, and of its time on this machine.
    output_format, output_bytes
        What it would write, and the bytes of all tensors of that; None where it cannot be written so, for
        the reason in `output_problem`.
    warnings
        What was warned of, one line each.
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
    output_format: str
    output_bytes: int | None
    output_problem: str | None = None
    warnings: tuple[str, ...] = ()


@reports_warnings
@expands_home
@finds_models
def inspect_model(
    model: str | os.PathLike[str],
    *,
    method: str = "gptq",
    preset: Literal["fast", "default", "high"] = "default",
    samples: int = 128,
    length: int | None = None,
    bits: int | str = 4,
    group_size: GroupSize = "auto",
    format: FormatName = "mlx",
    grid: Grid | str | None = None,
    type: str | None = None,
    float_embeddings: bool = False,
) -> Inspection:
    """Describe a checkpoint folder, and estimate what quantizing it would take.

    Only headers are read. The time is that of the products of the run at the speed that a small one has
    now; it is good to a factor of two.

    Parameters
    ----------
    model
        Checkpoint folder.
    method, preset, samples, length
        The run to estimate, as for `quantize` on text.
    bits, group_size, format, grid, type, float_embeddings
        What it writes, as for `quantize`.

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
    check_choice("preset", preset, FORECAST_PRESETS)
    opened = load_model(model)
    opened.warn_of_unused()
    length = length or min(DEFAULT_LENGTH, opened.positions)
    counts: Counter[tuple[str, tuple[int, int], bool]] = Counter()
    for layout in opened.layouts:
        for shapes, quantized in ((layout.linears, True), (layout.floats, False)):
            for name, shape in shapes.items():
                counts[re.sub(r"\.\d+\.", ".*.", name), shape, quantized] += 1
    chosen = METHODS[method]
    tokens = samples * length if chosen.needs_inputs else 0
    config = opened.config
    improved = preset != "fast" and chosen.corrects
    asked = {"bits": bits, "group_size": group_size, "grid": grid, "type": type}
    asked |= {"format": format, "float_embeddings": float_embeddings}
    options = QuantizationOptions.of({"method": "rtn", **asked}).precision
    usual = Precision(4, 64, "affine")  # of what cannot be written
    target = Target(options.kind, dict.fromkeys(opened.linear_shapes(), usual), usual, opened.dtype)
    problem = None
    try:
        target = options.for_model(opened, chosen).target(opened, chosen)
    except ValueError as error:
        problem = str(error)
    work = Work(
        opened,
        target.plan,
        MethodOptions(chosen, refine=improved, drift=improved),
        True,
        tokens,
        length,
        target.scale_dtype,
        format=options.kind if problem is None else None,
        two_sided=preset == "high" and improved,
    )
    plan = plan_run(work, memory=math.inf)
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
        memory_bytes=plan.memory_bytes,
        seconds=plan.seconds,
        output_format=format,
        output_bytes=plan.written_bytes if problem is None else None,
        output_problem=problem,
    )
