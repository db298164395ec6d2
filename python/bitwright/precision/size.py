"""The size of the weights of an output, from shapes alone."""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from bitwright.checkpoint.reader import written_dtype
from bitwright.formats import FORMATS, Format, FormatName, Precision
from bitwright.loading.model import Model
from bitwright.methods.rtn import quantize_rtn
from bitwright.precision.target import Target

SAMPLE_ROWS = 64  # of a matrix that is packed to see what rows take


def layer_bytes(
    format: type[Format],
    shape: tuple[int, int],
    precision: Precision,
    scale_dtype: np.dtype[Any],
) -> int:
    """Return the bytes of a layer ``[out, in]``: of its rows, and of what it has but once."""
    rows, channels = shape
    if scale_dtype not in format.scale_dtypes:  # such as products of a superblock's parts
        scale_dtype = format.scale_dtypes[0]
    once, by_row = _packed_bytes(format.name, channels, precision, scale_dtype)
    return once + math.ceil(by_row * rows)


@lru_cache(maxsize=1024)
def _packed_bytes(
    format: FormatName, channels: int, precision: Precision, scale_dtype: np.dtype[Any]
) -> tuple[int, float]:
    def packed(rows: int) -> int:
        zeros = np.zeros((rows, channels), np.float32)
        size, grid = precision.group_size, precision.grid
        tensor = quantize_rtn(zeros, precision.bits, size, grid=grid, scale_dtype=scale_dtype)
        return sum(array.nbytes for array in FORMATS[format].pack("", tensor).values())

    one, two = packed(SAMPLE_ROWS), packed(2 * SAMPLE_ROWS)
    return 2 * one - two, (two - one) / SAMPLE_ROWS


def written_tensors(
    model: Model,
    format: type[Format],
    plan: Mapping[str, Precision | None],
    scale_dtype: np.dtype[Any],
) -> Iterator[tuple[str, int]]:
    """Yield what is written, by names without endings, and the bytes of each: layers as they are planned,
    and tensors that stay in float."""
    matrix = model.table_shape
    shapes = {
        model.names.embedding: matrix,
        model.names.head: matrix,
        **model.linear_shapes(),
    }
    planned = {name: each for name, each in plan.items() if each is not None and name in shapes}
    for name, precision in planned.items():
        yield name, layer_bytes(format, shapes[name], precision, scale_dtype)
    packed, left_out, stacked = (
        model.packed_tensors(),
        model.left_out(format),
        model.stacked_tensors(),
    )
    for name in model.checkpoint.names():
        target = model.written_name(name)
        if target is None or name in packed or name in left_out:
            continue
        layers = stacked.get(name, [target.removesuffix(".weight")])
        left = sum(layer not in planned for layer in layers) / len(layers)
        shape = model.checkpoint.shape(name)
        width = written_dtype(model.checkpoint.dtype(name)).itemsize
        if format.own_container and len(shape) == 1:  # which llama.cpp has in float32
            width = 4
        if left:
            yield target, round(left * math.prod(shape) * width)
    for name, shape in model.quantized_layers().items():
        target = model.names.embedding if name == model.embedding_name else name
        if target not in planned:
            yield target, math.prod(shape) * model.dtype.itemsize


def weights_bytes(
    model: Model,
    format: type[Format],
    plan: Mapping[str, Precision | None],
    scale_dtype: np.dtype[Any],
) -> int:
    """Return the bytes of all tensors of an output, from shapes alone."""
    return sum(size for _, size in written_tensors(model, format, plan, scale_dtype))


def file_bytes(model: Model, target: Target) -> int:
    """Return the bytes of the files with an output's weights at most: with headers, and in GGUF with
    configuration and tokenizer."""
    format = target.format
    tensors = list(written_tensors(model, format, target.plan, target.scale_dtype))
    stacks = model.experts if format.stacks_experts else {}
    planned = {name for name, _ in tensors if target.is_planned(name)}
    layers = {stacks[name].stacked_name if name in stacks else name for name in planned}
    names = [f"{name}.{part}" for name in layers for part in format.parts]
    names += [name for name, _ in tensors if name not in planned]
    beside = format.files(model.checkpoint, target.file).overhead(names)
    return sum(size for _, size in tensors) + beside
