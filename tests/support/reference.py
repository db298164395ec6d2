"""What the kernels compute, once more in plain NumPy: slow, and as close to the papers as it gets."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.gguf_file import BLOCKS
from bitwright.grids.choice import GridChoice
from bitwright.grids.tensor import K_GRIDS, SUPERBLOCK, Grid, SuperBlocks

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


SHRINKS = np.linspace(0.8, 1.1, 13)  # of the scale that just reaches the largest value
SMALLEST_HALF = np.float16(2.0**-24)  # of what is above zero
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
    if grid == "affine":  # MLX's floor, or few steps, may take more than half of a group's energy
        half = 0.5 * ((groups / unit) ** 2).sum(2, keepdims=True)
        unsure = coarse | (exact < np.float32(1e-7))
        allowed, doubtful = unsure & (best > half), unsure & (np.abs(best - half) <= 1e-4 * half)
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
        alike = (other.scale == fit.scale) & (other.bias == fit.bias)
        tied = where & (np.abs(error - best) <= 1e-4 * best) & ~alike
        best = np.where(better, error, best)
        yield better, tied | doubtful, other


def range_grids(low: Array, high: Array, top: Any, scale_dtype: str) -> Iterator[Fit]:
    """Yield the affine grids of a range, with zero on the grid and with the lower end on it."""
    dtype, least = DTYPES[scale_dtype], np.float32(SMALLEST[scale_dtype])
    with np.errstate(invalid="ignore", over="ignore"):  # of groups that these are not taken for
        width = (high - low) / top
        normal = np.float32(2.0**-14 if scale_dtype == "float16" else 2.0**-126)
        scale = np.where(width == 0, normal, np.maximum(width, least)).astype(dtype)
        scale = scale.astype(np.float32)
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


def fit_superblocks(scales: Array, offsets: Array, importance: Array, bits: int) -> SuperBlocks:
    """Return the superblocks nearest to scales and biases of groups, to the bit: NumPy's order of sums."""
    kind = K_GRIDS[bits]
    per = SUPERBLOCK // kind.group_size
    # In units of the largest, so that no sum of squares is more than float32 can hold.
    relative = np.ldexp(importance, -np.frexp(importance.max())[1])
    costs = relative.reshape(-1, per, kind.group_size).sum(axis=2) + np.float32(1e-30)

    def blocks(values: Array) -> Array:
        return values.reshape(len(values), -1, per)

    low, high = kind.scale_codes
    if kind.grid == "symmetric":
        d, codes = _fit_codes(blocks(scales), costs, low, high, least=1)
        return SuperBlocks(d, codes.reshape(scales.shape).astype(np.int8))
    top = np.float32(2**bits - 1)
    # Scales are positive and biases at most zero, so that both are unsigned codes.
    ends = offsets, offsets + scales * top
    bottom, peak = np.minimum(np.minimum(*ends), 0), np.maximum(*ends)
    scales = np.maximum(peak - bottom, 0) / top
    d, codes = _fit_codes(blocks(scales), costs, low, high, least=1)
    codes = codes.reshape(scales.shape)
    rounded = SuperBlocks(d, codes.astype(np.int8)).scales()
    # Where the scale has been rounded, the middle of the range stays where it is.
    mins = np.maximum((rounded - scales) * (top / 2) - bottom, 0)
    mins[(scales == 0) & (bottom == 0)] = 0  # so that zeros stay zeros
    dmin, min_codes = _fit_codes(blocks(mins), costs, low, high, least=0)
    return SuperBlocks(
        d, codes.astype(np.int8), dmin, min_codes.reshape(scales.shape).astype(np.uint8)
    )


def closed_form(weight: Array, codes: Array, importance: Array, bits: int) -> tuple[Array, Array]:
    """Return the scales and offsets of each group with the least ``Σ importance (weight - decoded)²``."""
    kind = K_GRIDS[bits]
    shape = (len(weight), -1, kind.group_size)
    w, c = weight.reshape(shape), codes.reshape(shape).astype(np.float32)
    cost = importance / max(float(importance.max()), 1e-30)
    cost = np.maximum(cost, np.float32(1e-12)).reshape(shape[1:])
    centre = np.full((1, 1, 1), 2 ** (bits - 1), np.float32)
    if kind.grid == "affine":
        centre = (cost * c).sum(axis=2, keepdims=True) / cost.sum(axis=1)[:, None]
    c -= centre
    energy = (cost * c * c).sum(axis=2)
    known = energy > 1e-4 * cost.sum(axis=1)
    scales = (cost * c * w).sum(axis=2) / np.where(known, energy, np.nan)
    if kind.grid == "symmetric":
        return scales, np.full_like(scales, 2 ** (bits - 1))
    mean = (cost * w).sum(axis=2) / cost.sum(axis=1)
    return scales, mean - scales * centre[:, :, 0]


def _fit_codes(
    values: Array, costs: Array, low: int, high: int, least: int
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Return d and codes with the least ``Σ costs (values - d codes)²`` of each superblock; codes are at
    least `least` in magnitude."""
    place = np.abs(values).argmax(axis=2)[:, :, None]
    extreme = np.take_along_axis(values, place, axis=2)[:, :, 0]
    best = np.full(extreme.shape, np.inf, np.float32)
    d, codes = np.zeros(extreme.shape, np.float16), np.zeros_like(values)

    def offer(candidate: Array, least_d: np.float16 = SMALLEST_HALF) -> None:
        with np.errstate(over="ignore"):
            stored = candidate.astype(np.float16)
        tiny = np.where(np.signbit(candidate), -least_d, least_d)
        stored = np.where(np.abs(stored) < least_d, tiny, stored)
        holds = np.isfinite(stored)
        wide = np.where(holds, stored, 1).astype(np.float32)[:, :, None]
        steps = np.clip(np.rint(values / wide), low, high)
        if least:
            steps = np.where(steps == 0, np.where(values * wide < 0, -1, 1), steps)
            steps = np.clip(steps, low or 1, high)
        error = (costs * np.square(values - wide * steps)).sum(axis=2)
        better = holds & (error < best)
        best[better], d[better] = error[better], stored[better]
        codes[better] = steps[better]

    for end in (high, low) if low else (high,):
        for shrink in SHRINKS:
            offer(extreme / np.float32(end * shrink))
        # The number after the smallest is twice it.
        if (np.abs(extreme) < 2 * SMALLEST_HALF * end).any():
            offer(extreme / np.float32(end), 2 * SMALLEST_HALF)
    if not np.isfinite(best).all():
        raise ValueError(
            "weight: its scales are more than float16 can hold; use another grid than k"
        )
    energy = (costs * codes * codes).sum(axis=2)
    offer((costs * values * codes).sum(axis=2) / np.where(energy > 0, energy, 1))
    return d, codes


def pack_blocks(
    codes: Array, d: Array, m: Array | None, bits: int, kind: str | None = None
) -> Array:
    """Return ggml's blocks of 32 weights; each field by itself."""
    if kind == "MXFP4":  # floats by sign and size, and powers of two by their exponents
        blocks = np.zeros(d.shape, BLOCKS[kind])
        blocks["e"] = d.view(np.uint8)
        floats = np.where(codes < 8, 15 - codes, codes - 8).astype(np.uint8)
        blocks["qs"] = _merged(floats.reshape(*d.shape, 32), 4, 16)
        return blocks
    if kind == "NVFP4":  # four groups of 16
        blocks = np.zeros((len(d), d.shape[1] // 4), BLOCKS[kind])
        blocks["e"] = d.view(np.uint8).reshape(*blocks.shape, 4)
        floats = np.where(codes < 8, 15 - codes, codes - 8).astype(np.uint8)
        blocks["qs"] = _merged(floats.reshape(*blocks.shape, 4, 16), 4, 8).reshape(
            *blocks.shape, 32
        )
        return blocks
    if kind == "IQ4_NL":
        return pack_blocks(codes, d, m, bits).view(BLOCKS[kind])
    kind = f"Q{bits}_{0 if m is None else 1}"
    blocks = np.zeros(d.shape, BLOCKS[kind])
    blocks["d"] = d
    if m is not None:
        blocks["m"] = m
    parts = codes.reshape(*d.shape, 32)
    if bits == 8:
        blocks["qs"] = (parts ^ 0x80).view(np.int8)
        return blocks
    blocks["qs"] = _merged(parts & 15, 4, 16)
    if bits == 5:
        blocks["qh"] = np.packbits(parts >> 4, axis=-1, bitorder="little")
    return blocks


def unpack_blocks(blocks: Array, bits: int) -> Array:
    """Return the codes of `pack_blocks`."""
    if "e" in (blocks.dtype.names or ()):
        width = 16 if blocks["e"].ndim == 2 else 8
        floats = _split(blocks["qs"].reshape(len(blocks), -1, width), 4, width).reshape(
            len(blocks), -1
        )
        return np.where(floats < 8, floats + 8, 15 - floats).astype(np.uint8)
    if "points" in (blocks.dtype.names or ()):
        blocks = blocks.view(BLOCKS["Q4_0"])
    if bits == 8:
        codes = blocks["qs"].view(np.uint8) ^ 0x80
    else:
        codes = _split(blocks["qs"], 4, 16)
        if bits == 5:
            codes |= np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4
    return np.ascontiguousarray(codes.reshape(len(blocks), -1))


def pack_superblocks(codes: Array, grid: SuperBlocks, bits: int, kind: str | None = None) -> Array:
    """Return ggml's superblocks of 256 weights; each field by itself."""
    blocks = np.zeros(grid.d.shape, BLOCKS[kind or f"Q{bits}_K"])
    codes = codes.reshape(*blocks.shape, SUPERBLOCK)
    scales = grid.scale_codes.reshape(*blocks.shape, -1)
    blocks["d"] = grid.d
    if grid.dmin is not None and grid.min_codes is not None:
        blocks["dmin"], mins = grid.dmin, grid.min_codes.reshape(*blocks.shape, -1)
    if kind == "IQ4_XS":
        unsigned = (scales + np.int8(32)).view(np.uint8)
        blocks["scales_l"] = _merged(unsigned & 15, 4, 1)
        places = np.arange(0, 16, 2, dtype=np.uint16)
        blocks["scales_h"] = ((unsigned >> 4).astype(np.uint16) << places).sum(-1, dtype=np.uint16)
        blocks["qs"] = _merged(codes, 4, 16)
    elif bits == 2:
        blocks["scales"] = scales.view(np.uint8) | mins << 4
        blocks["qs"] = _merged(codes, 2, 32)
    elif bits == 3:
        blocks["scales"] = _pack_six_bits_3(scales + np.int8(32))
        blocks["qs"] = _merged(codes & 3, 2, 32)
        blocks["hmask"] = _merged(codes >> 2, 1, 32)
    elif bits == 6:
        blocks["scales"] = scales
        blocks["ql"] = _merged(codes & 15, 4, 64)
        blocks["qh"] = _merged(codes >> 4, 2, 32)
    else:
        blocks["scales"] = _pack_six_bits(scales.view(np.uint8), mins)
        blocks["qs"] = _merged(codes & 15, 4, 32)
        if bits == 5:
            blocks["qh"] = _merged(codes >> 4, 1, 32)
    return blocks


def unpack_superblocks(blocks: Array, bits: int) -> tuple[Array, SuperBlocks]:
    """Return the codes and superblocks of `pack_superblocks`."""
    mins = None
    if "scales_h" in (blocks.dtype.names or ()):
        upper = blocks["scales_h"][..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        lower = _split(blocks["scales_l"], 4, 1)
        scales = (lower | upper.astype(np.uint8) << 4).view(np.int8) - np.int8(32)
        codes = _split(blocks["qs"], 4, 16)
    elif bits == 2:
        scales, mins = blocks["scales"] & 15, blocks["scales"] >> 4
        codes = _split(blocks["qs"], 2, 32)
    elif bits == 3:
        scales = _unpack_six_bits_3(blocks["scales"]).view(np.int8) - np.int8(32)
        codes = _split(blocks["qs"], 2, 32) | _split(blocks["hmask"], 1, 32) << 2
    elif bits == 6:
        scales = blocks["scales"]
        codes = _split(blocks["ql"], 4, 64) | _split(blocks["qh"], 2, 32) << 4
    else:
        scales, mins = _unpack_six_bits(blocks["scales"])
        codes = _split(blocks["qs"], 4, 32)
        if bits == 5:
            codes |= _split(blocks["qh"], 1, 32) << 4

    def rows(values: Array) -> Array:
        return np.ascontiguousarray(values.reshape(len(blocks), -1))

    return rows(codes), SuperBlocks(
        np.ascontiguousarray(blocks["d"]),
        rows(scales).astype(np.int8),
        None if mins is None else np.ascontiguousarray(blocks["dmin"]),
        None if mins is None else rows(mins),
    )


def _merged(parts: Array, bits: int, width: int) -> Array:
    """Merge values of few bits ``[…, n]`` into bytes: the lowest bits of `width` bytes hold the first
    `width` values, the next bits the next, until they are full."""
    count = 8 // bits
    runs = parts.reshape(*parts.shape[:-1], -1, count, width)
    merged = runs[..., 0, :].copy()
    for place in range(1, count):
        merged |= runs[..., place, :] << (bits * place)
    return merged.reshape(*parts.shape[:-1], -1)


def _split(merged: Array, bits: int, width: int) -> Array:
    """Return what `_merged` merged."""
    runs = merged.reshape(*merged.shape[:-1], -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = runs >> shifts & np.uint8((1 << bits) - 1)
    return parts.reshape(*merged.shape[:-1], -1)


def _pack_six_bits(scales: Array, mins: Array) -> Array:
    """Pack eight scales and eight mins of Q4_K and Q5_K: the first four of both are whole, the other four
    lie in a third row of nibbles and in the upper bits of the first two rows."""
    first, last = (slice(0, 4), slice(4, 8))
    return np.concatenate(
        [
            scales[..., first] | scales[..., last] >> 4 << 6,
            mins[..., first] | mins[..., last] >> 4 << 6,
            scales[..., last] & 15 | (mins[..., last] & 15) << 4,
        ],
        axis=-1,
    )


def _unpack_six_bits(packed: Array) -> tuple[Array, Array]:
    scales, mins, rest = (packed[..., start : start + 4] for start in (0, 4, 8))
    return (
        np.concatenate([scales & 63, rest & 15 | scales >> 6 << 4], axis=-1),
        np.concatenate([mins & 63, rest >> 4 | mins >> 6 << 4], axis=-1),
    )


def _pack_six_bits_3(scales: Array) -> Array:
    """Pack sixteen scales of Q3_K: their lower nibbles, then their upper two bits."""
    values = scales.view(np.uint8)
    return np.concatenate([_merged(values & 15, 4, 8), _merged(values >> 4, 2, 4)], axis=-1)


def _unpack_six_bits_3(packed: Array) -> Array:
    low: Array = _split(packed[..., :8], 4, 8)
    high: Array = _split(packed[..., 8:], 2, 4)
    low |= high << 4
    return low


def clipped_grids(low: Array, high: Array, choice: GridChoice) -> Iterator[Fit]:
    """Yield the grids that a search tries for the ranges [low, high], scales in float32."""
    if choice.grid == "affine":
        yield from range_grids(low, high, np.float32(2**choice.bits - 1), "float32")
        return
    fit = span(low, high, choice.bits, choice.grid, "float32")
    yield fit
    if choice.grid == "symmetric":
        yield Fit(-fit.scale, fit.zero, fit.bias)


def clip_group(
    rows: Array,
    choice: GridChoice,
    shares: Iterable[float],
    errors: Callable[[Array, Array, Array], Array],
) -> tuple[Array, Array, Array]:
    """Return codes, scales and offsets of one group of each row, clipped to the range of least error."""
    low, high = rows.min(axis=1), rows.max(axis=1)
    best_low, best_high = low.copy(), high.copy()
    best_errors = np.full(len(rows), np.inf)
    best_codes = np.zeros(rows.shape, np.uint8)
    best_scales, best_offsets = np.ones((2, len(rows), 1), np.float32)
    shares = [np.float32(share) for share in shares]

    def try_range(bottom: Array, top: Array) -> None:
        for fit in clipped_grids(bottom, top, choice):
            column = Fit(*(each[:, None] for each in (fit.scale, fit.zero, fit.bias)))
            codes = column.encode(rows, choice.bits).astype(np.uint8)
            offsets = column.bias if choice.grid == "affine" else column.zero
            found = errors(codes, column.scale, offsets)
            better = found < best_errors
            for best, new in (
                (best_errors, found),
                (best_codes, codes),
                (best_scales, column.scale),
                (best_offsets, offsets),
                (best_low, bottom),
                (best_high, top),
            ):
                best[better] = new[better]

    widest = np.maximum(high, -low)
    for share in shares:
        try_range(np.maximum(low, -share * widest), np.minimum(high, share * widest))
    top = best_high.copy()
    for share in shares[::2]:
        try_range(share * low, top)
    bottom = best_low.copy()
    for share in shares[::2]:
        try_range(bottom, share * high)
    return best_codes, best_scales, best_offsets
