"""The "k" grids of GGUF: scales and mins of groups as codes with one scale for 256 weights."""

import numpy as np
from numpy.typing import NDArray

from bitwright.grids.tensor import K_GRIDS, SUPERBLOCK, SuperBlocks

Float32 = NDArray[np.float32]
SHRINKS = np.linspace(0.8, 1.1, 13)  # of the scale that just reaches the largest value
SMALLEST = np.float16(2.0**-24)  # the smallest subnormal float16


def fit_superblocks(
    scales: Float32, offsets: Float32, importance: Float32, bits: int
) -> SuperBlocks:
    """Return the superblocks nearest to scales and biases of groups that were fitted one by one.

    Parameters
    ----------
    scales, offsets
        ``[out, groups]`` of the base grid of `K_GRIDS`; offsets are biases if it is affine.
    importance
        ``[in]`` what an error costs in each channel.
    bits
        Of the codes.

    Raises
    ------
    ValueError
        If a scale is too large for float16.
    """
    kind = K_GRIDS[bits]
    per = SUPERBLOCK // kind.group_size
    # In units of the largest, so that no sum of squares is more than float32 can hold.
    relative = np.ldexp(importance, -np.frexp(importance.max())[1])
    costs = relative.reshape(-1, per, kind.group_size).sum(axis=2) + np.float32(1e-30)

    def blocks(values: Float32) -> Float32:
        return values.reshape(len(values), -1, per)

    low, high = kind.scale_codes
    if kind.grid == "symmetric":
        d, codes = _fit(blocks(scales), costs, low, high, least=1)
        return SuperBlocks(d, codes.reshape(scales.shape).astype(np.int8))
    top = np.float32(2**bits - 1)
    # Scales are positive and biases at most zero, so that both are unsigned codes.
    ends = offsets, offsets + scales * top
    bottom, peak = np.minimum(np.minimum(*ends), 0), np.maximum(*ends)
    scales = np.maximum(peak - bottom, 0) / top
    d, codes = _fit(blocks(scales), costs, low, high, least=1)
    codes = codes.reshape(scales.shape)
    rounded = SuperBlocks(d, codes.astype(np.int8)).scales()
    # After the scale has been rounded, the middle of the range is kept.
    mins = np.maximum((rounded - scales) * (top / 2) - bottom, 0)
    mins[(scales == 0) & (bottom == 0)] = 0  # so that zeros stay zeros
    dmin, min_codes = _fit(blocks(mins), costs, low, high, least=0)
    return SuperBlocks(
        d, codes.astype(np.int8), dmin, min_codes.reshape(scales.shape).astype(np.uint8)
    )


def closed_form(
    weight: Float32, codes: NDArray[np.uint8], importance: Float32, bits: int
) -> tuple[Float32, Float32]:
    """Return the scales and offsets of each group with the least ``Σ importance (weight - decoded)²``.

    Parameters
    ----------
    weight, codes
        ``[out, in]``.
    importance
        ``[in]``.
    bits
        Of the codes.

    Returns
    -------
    scales, offsets
        ``[out, groups]``; scales are NaN where all codes of a group are the same, which says nothing.
    """
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


def expanded(blocks: SuperBlocks, bits: int) -> tuple[Float32, Float32]:
    """Return scales and offsets as kernels take them."""
    scales, biases = blocks.scales(), blocks.biases()
    if biases is None:
        biases = np.full_like(scales, 2 ** (bits - 1))
    return scales, biases


def _fit(
    values: Float32, costs: Float32, low: int, high: int, least: int
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Return d and codes with the least ``Σ costs (values - d codes)²`` of each superblock; codes are at
    least `least` in magnitude."""
    place = np.abs(values).argmax(axis=2)[:, :, None]
    extreme = np.take_along_axis(values, place, axis=2)[:, :, 0]
    best = np.full(extreme.shape, np.inf, np.float32)
    d, codes = np.zeros(extreme.shape, np.float16), np.zeros_like(values)

    def offer(candidate: Float32, least_d: np.float16 = SMALLEST) -> None:
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
        if (np.abs(extreme) < 2 * SMALLEST * end).any():
            offer(extreme / np.float32(end), 2 * SMALLEST)
    if not np.isfinite(best).all():
        raise ValueError(
            "weight: its scales are more than float16 can hold; use another grid than k"
        )
    energy = (costs * codes * codes).sum(axis=2)
    offer((costs * values * codes).sum(axis=2) / np.where(energy > 0, energy, 1))
    return d, codes
