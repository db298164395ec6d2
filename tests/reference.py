"""What the kernels compute, once more in plain NumPy: slow, and as close to the papers as it gets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright.grids.tensor import Grid

Array = NDArray[Any]
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Fit:
    """Grids ``w = scale * (code - zero) + bias``; arrays of one shape, float32."""

    scale: Array
    zero: Array
    bias: Array

    def encode(self, weight: Array, bits: int) -> Array:
        steps = np.rint((weight - self.bias) / self.scale)
        codes: Array = np.clip(steps + self.zero, 0, 2**bits - 1)
        return codes

    def decode(self, codes: Array) -> Array:
        weight: Array = self.scale * (codes - self.zero) + self.bias
        return weight

    def margin(self, weight: Array) -> Array:
        """Return how far, in steps, each weight is from a tie between two codes."""
        steps = (weight - self.bias) / self.scale
        return np.abs(np.abs(steps - np.floor(steps)) - 0.5)


SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}  # above zero


def span(
    low: Array, high: Array, bits: int, grid: Grid, scale_dtype: str, floor: float = 1e-7
) -> Fit:
    """Return the grids over the ranges [low, high] float32; no affine scale is below `floor`."""
    dtype, least = DTYPES[scale_dtype], np.float32(SMALLEST[scale_dtype])
    one = np.float32(1)
    top = np.float32(2**bits - 1)

    def rounded(values: Array) -> Array:
        return values.astype(dtype).astype(np.float32)

    zero = np.zeros_like(low)
    if grid == "affine":
        # mlx.core.quantize: the end of larger magnitude is a point of the grid, and so is zero.
        negative = np.abs(low) > np.abs(high)
        width = np.maximum((high - low) / top, np.float32(floor))
        scale = np.where(negative, width, -width)
        edge = np.where(negative, low, high)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            steps = np.rint(edge / scale)
            scale = np.where(steps != 0, edge / np.where(steps != 0, steps, one), scale)
        bias = rounded(np.where(steps != 0, edge, zero))
        scale = rounded(scale)
        return Fit(np.where(scale == 0, np.where(negative, least, -least), scale), zero, bias)
    below, above = np.minimum(low, 0), np.maximum(high, 0)
    width = 2 * np.maximum(above, -below) if grid == "symmetric" else above - below
    scale = np.where(width == 0, one, np.maximum(rounded(width / top), least))
    if grid == "symmetric":
        zero = np.full_like(low, 2 ** (bits - 1))
    else:
        zero = np.minimum(np.rint(-below / scale), top)
    return Fit(scale, zero, np.zeros_like(low))


def rtn(
    weight: Array, bits: int, group_size: int, grid: Grid, scale_dtype: str
) -> tuple[Array, Fit, Array]:
    """Return codes ``[out, in]``, grids ``[out, groups, 1]``, and where no other grid is as good."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, group_size)
    low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    fit = span(low, high, bits, grid, scale_dtype)
    clear = np.ones(low.shape, bool)
    for instead, tied, other in smaller_steps(groups, fit, bits, grid, scale_dtype):
        clear &= ~tied
        names = ("scale", "zero", "bias")
        fit = Fit(*(np.where(instead, getattr(other, n), getattr(fit, n)) for n in names))
    return fit.encode(groups, bits).astype(np.uint8).reshape(weight.shape), fit, clear[..., 0]


def smaller_steps(
    groups: Array, fit: Fit, bits: int, grid: Grid, scale_dtype: str
) -> Iterator[tuple[Array, Array, Fit]]:
    """Yield where weights are so small that another grid than the one so far is better, where it is neither
    better nor worse, and that grid."""
    low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    least, top = np.float32(SMALLEST[scale_dtype]), np.float32(2**bits - 1)
    unit = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    unit[unit == 0] = 1

    def lost(other: Fit) -> Array:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            change = other.decode(other.encode(groups, bits)) - groups
        sums: Array = ((change / unit) ** 2).sum(2, keepdims=True)
        return sums

    # Between two multiples of the smallest number, the one that is not nearer.
    reach = high - low if grid == "affine" else np.maximum(high, 0) - np.minimum(low, 0)
    exact = (2 * unit if grid == "symmetric" else reach).astype(np.float32) / top
    nearest = exact.astype(DTYPES[scale_dtype]).astype(np.float32)
    step = np.where(nearest <= exact, nearest + least, np.maximum(nearest - least, least))
    coarse = (exact > 0) & (exact < 64 * least)
    stretch = np.where(coarse, step / np.where(coarse, exact, 1), 1).astype(np.float32)
    best = lost(fit)
    allowed, doubtful = coarse, np.zeros_like(coarse)
    if grid == "affine":  # MLX's floor takes more than half of a group's energy
        half = 0.5 * ((groups / unit) ** 2).sum(2, keepdims=True)
        allowed, doubtful = best > half, np.abs(best - half) <= 1e-4 * half
    ranges = [(low * factor, high * factor) for factor in (np.ones_like(stretch), stretch)]
    others = [(allowed, span(*each, bits, grid, scale_dtype, floor=0)) for each in ranges]
    if grid == "affine":  # whose scale the end of the range may have taken to the same multiple
        same = allowed & (stretch != 1) & (others[0][1].scale == others[1][1].scale)
        others += [
            (same, other) for each in ranges for other in range_grids(*each, top, scale_dtype)
        ]
    for where, other in others:
        error = lost(other)
        better = where & (error < best)
        tied = where & (np.abs(error - best) <= 1e-4 * best) & (other.scale != fit.scale)
        best = np.where(better, error, best)
        yield better, tied | doubtful, other


def range_grids(low: Array, high: Array, top: Any, scale_dtype: str) -> Iterator[Fit]:
    """Yield the affine grids of a range, with zero on the grid and with the lower end on it."""
    dtype, least = DTYPES[scale_dtype], np.float32(SMALLEST[scale_dtype])
    with np.errstate(invalid="ignore", over="ignore"):  # of groups that these are not taken for
        scale = np.maximum((high - low) / top, least).astype(dtype).astype(np.float32)
        for bias in (np.rint(low / scale) * scale, low):
            yield Fit(scale, np.zeros_like(low), bias.astype(dtype).astype(np.float32))


def dequantize(codes: Array, scales: Array, offsets: Array, grid: Grid) -> Array:
    """Return the weights float32, from scales and biases or zeros ``[out, groups]``."""
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    scale, offset = (array.astype(np.float32)[..., None] for array in (scales, offsets))
    weight = scale * groups + offset if grid == "affine" else scale * (groups - offset)
    return weight.reshape(codes.shape)


def pack(codes: Array, bits: int) -> Array:
    """Return each row as one little-endian stream of bits in uint32 words."""
    stream = np.unpackbits(codes[..., None], axis=2, bitorder="little", count=bits)
    packed = np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")
    return packed.view("<u4")


def damped(gram: Array, damping: float) -> Array:
    """Return ``G + D`` float64: damping on the live channels, one on the dead ones."""
    diagonal = gram.diagonal().astype(np.float64)
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else 1.0
    result: Array = gram.astype(np.float64) + np.diag(np.where(live, damping * mean, 1.0))
    return result


def objective(weight: Array, quantized: Array, gram: Array) -> Array:
    """Return the diagonal of ``(W - Ŵ) G (W - Ŵ)ᵀ``: each row's squared output error, float64."""
    change = weight.astype(np.float64) - quantized.astype(np.float64)
    rows: Array = np.einsum("oi,ij,oj->o", change, gram.astype(np.float64), change, optimize=True)
    return rows


@dataclass(frozen=True)
class GptqResult:
    """Codes and weights ``[out, in]``; `margin` [out], the smallest distance from a tie of codes."""

    codes: Array
    weight: Array
    margin: Array


def gptq(
    weight: Array,
    gram: Array,
    bits: int,
    group_size: int,
    grid: Grid,
    scale_dtype: str = "float32",
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> GptqResult:
    """Frantar et al. 2023, algorithm 1, in float64 without blocks; min-max grids of live channels."""
    out, channels = weight.shape
    dead = gram.diagonal() == 0
    order = np.argsort(-gram.diagonal(), kind="stable") if act_order else np.arange(channels)
    hessian = damped(gram, damping)[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T

    def fitted(rows: Array, group: int) -> Fit:
        here = slice(group * group_size, (group + 1) * group_size)
        live = rows[:, here][:, ~dead[here]].astype(np.float32)
        if live.size == 0:
            live = np.zeros((out, 1), np.float32)
        return span(live.min(1), live.max(1), bits, grid, scale_dtype)

    fits = {group: fitted(weight, group) for group in range(channels // group_size)}
    work = weight.astype(np.float64)
    codes = np.zeros((out, channels), np.uint8)
    result = np.zeros((out, channels))
    margin = np.full(out, np.inf)
    for step, column in enumerate(order):
        group = int(column) // group_size
        if not static_groups and step % group_size == 0:
            fits[group] = fitted(work, group)
        fit = fits[group]
        code = fit.encode(work[:, column], bits)
        margin = np.minimum(margin, fit.margin(work[:, column]))
        codes[:, column], result[:, column] = code, fit.decode(code)
        error = (work[:, column] - result[:, column]) / upper[step, step]
        later = order[step + 1 :]
        work[:, later] -= np.outer(error, upper[step, step + 1 :])
    return GptqResult(codes, result, margin)


def rms_norm(states: Array, weight: Array, epsilon: float) -> Array:
    """Zhang and Sennrich 2019, float64."""
    states = states.astype(np.float64)
    result: Array = weight * states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon)
    return result


def layer_norm(states: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Ba et al. 2016, float64."""
    states = states.astype(np.float64)
    states = states - states.mean(-1, keepdims=True)
    result: Array = weight * states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon) + bias
    return result


def rotate(
    states: Array,
    cosines: Array,
    sines: Array,
    heads: int,
    first: int = 0,
    interleaved: bool = False,
) -> Array:
    """Return states ``[batch * length, heads * width]`` turned by their positions, float64.

    Of each head's channels from ``first`` on, channel i of the first half and of the second are one
    complex number or, interleaved, channels 2i and 2i + 1.
    """
    length, half = cosines.shape
    result = states.astype(np.float64).reshape(len(states) // length, length, heads, -1)
    part = result[..., first : first + 2 * half]
    left, right = (
        (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    )
    turned = (left + 1j * right) * (cosines + 1j * sines)[:, None]
    left[:], right[:] = turned.real, turned.imag
    return result.reshape(states.shape)


def attention(
    query: Array,
    key: Array,
    value: Array,
    length: int,
    heads: int,
    key_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Array:
    """Return causal attention with grouped queries, ``[batch * length, heads * width]`` float64."""

    def split(states: Array, count: int) -> Array:
        per_head = states.astype(np.float64).reshape(-1, length, count, states.shape[1] // count)
        return np.repeat(per_head.transpose(0, 2, 1, 3), heads // count, axis=1)

    scores = scale * split(query, heads) @ split(key, key_heads).transpose(0, 1, 3, 2)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    seen = np.tri(length, dtype=bool)
    if window:
        seen &= ~np.tri(length, k=-window, dtype=bool)
    scores = np.where(seen, scores, -np.inf)
    mixed = np.exp(log_softmax(scores)) @ split(value, key_heads)
    return mixed.transpose(0, 2, 1, 3).reshape(len(query), -1)


def log_softmax(logits: Array) -> Array:
    """Return ``log softmax`` over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result
