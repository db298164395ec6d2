"""Rotary position embeddings: frequencies of every type, and the cosines and sines made of them."""

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.errors import CheckpointError, UnsupportedModelError
from bitwright.models.config import RopeConfig


def rope_frequencies(
    rope: RopeConfig, rotary_dim: int, max_position_embeddings: int, length: int = 0
) -> tuple[NDArray[np.float64], float]:
    """Compute the rotary frequencies: the angle by which each pair of channels turns per position.

    Computed in float32, as transformers does, so that angles at far positions agree with it.

    Parameters
    ----------
    rope : RopeConfig
        RoPE parameters.
    rotary_dim : int
        Rotated channels of one attention head, even.
    max_position_embeddings : int
        Stands in for the original length where ``rope`` has none.
    length : int
        Of the text: longrope has other factors beyond the original length, and dynamic RoPE is
        computed up to it only.

    Returns
    -------
    frequencies : numpy.ndarray
        float64 [rotary_dim / 2] with float32 values, radians per position, decreasing.
    attention_factor : float
        Multiplies cosines and sines.

    Raises
    ------
    CheckpointError
        If the parameters overflow.
    UnsupportedModelError
        If the text is longer than dynamic RoPE leaves as it is.

    Examples
    --------
    >>> rope_frequencies(RopeConfig(), 4, 2048)[0].round(6)
    array([1.  , 0.01])
    """
    if rope.rope_type == "dynamic" and length > max_position_embeddings:
        raise UnsupportedModelError(
            f"samples of {length} tokens: dynamic RoPE (config.json) turns otherwise beyond "
            f"max_position_embeddings, {max_position_embeddings} tokens, which is not computed; choose "
            f"a length of at most {max_position_embeddings}"
        )
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    with np.errstate(all="ignore"):
        periods = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1) / periods
        attention_factor = 1.0
        original = rope.original_max_position_embeddings or max_position_embeddings
        if rope.rope_type == "linear":
            frequencies = frequencies / np.float32(rope.factor)
        elif rope.rope_type == "llama3":
            frequencies = _llama3(frequencies, rope, original)
        elif rope.rope_type == "yarn":
            frequencies = _yarn(periods, rope, original, rotary_dim)
            attention_factor = _yarn_attention_factor(rope)
        elif rope.rope_type == "proportional":
            turning = int(rope.share * rotary_dim // 2)
            frequencies = np.where(np.arange(rotary_dim // 2) < turning, frequencies, np.float32(0))
            frequencies = frequencies / np.float32(rope.factor)
        elif rope.rope_type == "longrope":
            factors = rope.long_factor if length > original else rope.short_factor
            frequencies = np.float32(1) / (np.asarray(factors, np.float32) * periods)
            attention_factor = _longrope_attention_factor(rope, original)
    if not (np.isfinite(frequencies).all() and math.isfinite(attention_factor)):
        raise CheckpointError(f"the rotary frequencies are not finite; check config.json: {rope}")
    return frequencies.astype(np.float64), attention_factor


def rope_tables(
    rope: RopeConfig, rotary_dim: int, length: int, max_position_embeddings: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tabulate the rotations of the first positions.

    Parameters
    ----------
    rope : RopeConfig
        RoPE parameters.
    rotary_dim : int
        Rotated channels of one attention head, even.
    length : int
        Number of positions, from 0.
    max_position_embeddings : int
        As in `rope_frequencies`.

    Returns
    -------
    cosines, sines : numpy.ndarray
        float32 [length, rotary_dim / 2], multiplied by the attention factor.

    Raises
    ------
    CheckpointError
        If the parameters overflow.

    Examples
    --------
    >>> cosines, sines = rope_tables(RopeConfig(), 64, 512, 2048)
    >>> cosines.shape, float(cosines[0, 0]), float(sines[0, 0])
    ((512, 32), 1.0, 0.0)
    """
    frequencies, attention_factor = rope_frequencies(
        rope, rotary_dim, max_position_embeddings, length
    )
    positions = np.arange(length, dtype=np.float32)
    # The angle is rounded to float32, as in transformers; its cosine is not approximated in it.
    angles = (positions[:, None] * frequencies.astype(np.float32)).astype(np.float64)
    scale = np.float32(attention_factor)
    return np.cos(angles).astype(np.float32) * scale, np.sin(angles).astype(np.float32) * scale


def query_scale(rope: RopeConfig, length: int, dtype: DTypeLike) -> NDArray[Any] | None:
    """Return the factors of the queries of the first positions, which grow by the logarithm of how many
    times the original length they are beyond it (Llama 4); None where all are 1."""
    original = rope.original_max_position_embeddings
    if not rope.position_scale or original is None or length <= original:
        return None
    turns = np.floor(np.arange(length) / original)
    return (1 + rope.position_scale * np.log1p(turns)).astype(dtype)


def _llama3(
    frequencies: NDArray[np.float32], rope: RopeConfig, original: int
) -> NDArray[np.float32]:
    """Keep short wavelengths, divide long ones by the factor, and blend in between (Llama 3.1)."""
    if rope.low_freq_factor is None or rope.high_freq_factor is None:
        raise CheckpointError(f"llama3 needs low_freq_factor and high_freq_factor: {rope}")
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    factor = np.float32(rope.factor)
    # Reciprocals, then products: torch divides a number by a tensor so, and the last bit shows.
    wavelengths = np.float32(1) / frequencies * np.float32(2 * math.pi)
    blend = (np.float32(1) / wavelengths * np.float32(original) - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    long = wavelengths > np.float32(original / rope.low_freq_factor)
    short = wavelengths < np.float32(original / rope.high_freq_factor)
    return np.where(long, frequencies / factor, np.where(short, frequencies, blended))


def _yarn(
    periods: NDArray[np.float32], rope: RopeConfig, original: int, rotary_dim: int
) -> NDArray[np.float32]:
    """Blend, by a ramp over the channels, the frequencies with those divided by the factor."""

    def channel(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    channels = np.arange(rotary_dim // 2, dtype=np.float32)
    ramp = np.clip((channels - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1) - ramp
    divided = np.float32(1) / (np.float32(rope.factor) * periods)
    blended: NDArray[np.float32] = divided * (1 - kept) + np.float32(1) / periods * kept
    return blended


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope_attention_factor(rope: RopeConfig, original: int) -> float:
    """Return the attention factor of LongRoPE (Ding et al. 2024, arXiv:2402.13753) for longer texts."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1 or original <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(original))
