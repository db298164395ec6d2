"""Layers whose weights are smaller than the scales that can be stored: what is said of them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.formats import FORMATS, Format
from bitwright.grids.choice import smallest_scale
from bitwright.grids.tensor import QuantizedTensor
from bitwright.quantization.output import Output
from bitwright.warned import warn

MOST_LOST = 0.5  # of a layer's energy
FLOAT16 = np.dtype(np.float16)


def largest_of(weights: Iterable[NDArray[Any]]) -> float:
    """Return the largest magnitude in some matrices, 0 without any."""
    return max((float(np.abs(weight).max()) for weight in weights), default=0.0)


def require_kept(
    layer: str,
    format: type[Format] | None,
    tensor: QuantizedTensor,
    lost: float,
    largest: float,
    lost_if_raised: Callable[[int], float],
) -> None:
    """Raise ValueError if a layer loses most of its energy because scales cannot be so small: multiplied by
    a power of two, and quantized in the same way, it would lose less than half as much.

    Parameters
    ----------
    layer
        Folder and name.
    format, tensor
        What it is stored in, and as.
    lost
        The share of its energy that this loses, more than `MOST_LOST`.
    largest
        The largest magnitude of its weights.
    lost_if_raised
        Given a power of two, returns the share that is lost by the weights times that.
    """
    power = -int(np.frexp(np.float32(largest))[1])  # that takes the largest to 1, or a little less
    if not lost_if_raised(power) < 0.5 * lost:
        return
    dtype = FLOAT16 if tensor.superblocks is not None else tensor.scales.dtype
    raise ValueError(
        f"{layer}: its weights, {largest:.1e} at most, are so small that {dtype.name} scales lose "
        f"{lost:.0%} of its energy; {remedy(format, dtype)}"
    )


def remedy(format: type[Format] | None, dtype: np.dtype[Any]) -> str:
    """Say what stores smaller scales than a dtype."""

    def smaller(kind: type[Format]) -> list[str]:
        least = smallest_scale(dtype)
        return [each.name for each in kind.scale_dtypes if smallest_scale(each) < least]

    own = smaller(format) if format is not None else []
    if own:
        return f"use {' or '.join(own)} scales (--scale-dtype {own[0]}), or leave it in float"
    others = [name for name, kind in FORMATS.items() if smaller(kind)]
    if not others:
        return "leave it in float"
    return (
        f"use a format with float32 or bfloat16 scales (--format {' or '.join(others)}, with "
        f"--scale-dtype float32), or leave it in float"
    )


def warn_of_small_weights(folder: Path, format: type[Format], output: Output) -> None:
    """Warn of the layers of a run that were multiplied by powers of two, or should have been, or have
    wider scales."""
    moved = [layer.name for layer in output.layers if layer.power > 0]
    coarse = [layer.name for layer in output.layers if layer.coarse]
    if moved:
        warn(
            f"{folder}: {counted(moved, 'layer')}, such as {moved[0]}, had weights too small for float16 "
            f"scales, or read what such a layer reads; they were multiplied by powers of two, and what is "
            f"before or after them ({counted(output.divided, 'norm or layer', 'norms or layers')}) divided "
            f"by as much, which changes nothing that the model computes"
        )
    if wide := [layer.name for layer in output.layers if layer.wide]:
        warn(
            f"{folder}: float16 scales cannot hold the weights of {counted(wide, 'layer')}, such as "
            f"{wide[0]}; their scales are float32"
        )
    if coarse:
        warn(
            f"{folder}: the weights of {counted(coarse, 'layer')}, such as {coarse[0]}, are so small that "
            f"float16 scales have less than six bits for them; {remedy(format, FLOAT16)}"
        )


def counted(names: Sequence[str], one: str, several: str | None = None) -> str:
    """Return how many there are, in words."""
    return f"{len(names)} {one if len(names) == 1 else several or one + 's'}"
