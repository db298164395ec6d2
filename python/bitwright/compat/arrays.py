"""Salient-weight AWQ on arrays: symmetric INT4 in Marlin's order, weights as ``[in, out]``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.grids.choice import GridChoice
from bitwright.grids.tensor import pack, unpack
from bitwright.methods.awq import DEFAULT_GRID, gram_loss
from bitwright.methods.method import ActivationMethod
from bitwright.methods.moments import gram as gram_of
from bitwright.methods.salient import (
    BITS,
    Float32,
    as_matrix,
    as_tokens,
    check_ratio,
    compute_activation_stats,
    find_salient_weights,
    quantize_salient,
)

LOWEST, HIGHEST = -8, 7


COARSE = 2.0**-18  # 64 times the smallest number of float16


SMALLEST_NORMAL = 2.0**-14


MOST_LIFT = 12  # so that a lifted scale of outputs is a float16 itself


CODES_PER_WORD = 8


QUANT_TYPE = "awq_int4"


@dataclass(frozen=True, eq=False)
class AWQResult:
    """What `awq_quantize` returns.

    Parameters
    ----------
    Q
        ``[in / 8, out]`` uint32, `in` filled up to whole groups; eight codes along the input per word.
    scales
        ``[groups, out]`` float16.
    zeros
        ``[groups, out]`` float16, what is added to the weights: zeros, since the codes are signed.
    q_scale
        ``[out]`` float16, by which the weights of an output are divided after scaling.
    quantization_error
        ``‖Ŵ - W‖²``.
    salient_ratio
        As asked for.
    channel_scale
        ``[in]`` float32, by which the weights of an input are divided; None unless asked for.
    meta
        What `awq_dequantize` asks for.
    """

    Q: NDArray[np.uint32]
    scales: NDArray[np.float16]
    zeros: NDArray[np.float16]
    q_scale: NDArray[np.float16]
    quantization_error: float
    salient_ratio: float
    channel_scale: Float32 | None
    meta: dict[str, Any]


def compute_salient_scaling(
    weights: ArrayLike, mask: ArrayLike, scales: ArrayLike, group_size: int
) -> Float32:
    """Return the factor of each output that takes its largest salient weight to the code 7.

    Parameters
    ----------
    weights, mask
        ``[in, out]``, as for and from `find_salient_weights`.
    scales
        ``[groups, out]``, the size of a step of each group.
    group_size
        Consecutive input channels that share a scale.

    Returns
    -------
    NDArray
        ``[out]`` float32; 1 where nothing is salient.

    Raises
    ------
    ValueError
        If shapes do not match, or a scale is not above zero.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.compute_salient_scaling([[1.0], [2.0]], [[True], [False]], [[0.5]], group_size=2)
    array([3.5], dtype=float32)
    """
    matrix = as_matrix(weights)
    chosen, steps = np.asarray(mask, np.bool_), np.asarray(scales, np.float32)
    if chosen.shape != matrix.shape:
        raise ValueError(f"mask: has shape {list(chosen.shape)}, weights have {list(matrix.shape)}")
    _check_groups(steps, "scales", matrix.shape, group_size)
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError("scales: expected finite values above zero")
    per_weight = np.repeat(steps, group_size, axis=0)[: len(matrix)]
    largest = np.where(chosen, np.abs(matrix) / per_weight, 0).max(axis=0)
    factors = np.ones(matrix.shape[1], np.float32)
    np.divide(np.float32(HIGHEST), largest, out=factors, where=largest > 0)
    return factors


def pack_awq_weights(
    codes: NDArray[np.int8], scales: ArrayLike, zeros: ArrayLike, group_size: int = 128
) -> tuple[NDArray[np.uint32], dict[str, Any]]:
    """Pack codes -8..7, eight per word along the input channels.

    Parameters
    ----------
    codes
        ``[in, out]`` int8; the last group is filled up with zeros.
    scales, zeros
        ``[groups, out]``.
    group_size
        A multiple of 8.

    Returns
    -------
    Q
        ``[groups * group_size / 8, out]`` uint32; nibble i of a word holds channel i of eight, plus 8.
    meta
        ``in_features, out_features, group_size, quant_type``.

    Raises
    ------
    TypeError, ValueError
        If shapes do not match or a code is out of range.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> codes = np.arange(-8, 0, dtype=np.int8)[:, None]
    >>> words, meta = bitwright.pack_awq_weights(codes, np.ones((1, 1)), np.zeros((1, 1)), 8)
    >>> hex(words[0, 0])
    '0x76543210'
    """
    array = np.asarray(codes)
    if array.dtype != np.int8:
        raise TypeError(f"codes: expected int8, got {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"codes: expected shape [in, out], got {list(array.shape)}")
    if array.min() < LOWEST or array.max() > HIGHEST:
        raise ValueError(f"codes: from {array.min()} to {array.max()}, expected -8 to 7")
    _check_group_size(group_size)
    for name, each in (("scales", scales), ("zeros", zeros)):
        _check_groups(np.asarray(each), name, array.shape, group_size)
    padded = np.pad(array, ((0, -len(array) % group_size), (0, 0)))
    shifted = np.ascontiguousarray((padded - LOWEST).T.astype(np.uint8))
    words = np.ascontiguousarray(pack(shifted, BITS).T)
    return words, {
        "in_features": array.shape[0],
        "out_features": array.shape[1],
        "group_size": group_size,
        "quant_type": QUANT_TYPE,
    }


def unpack_awq_weights(Q: NDArray[np.uint32], meta: Mapping[str, Any]) -> NDArray[np.int8]:  # noqa: N803
    """Unpack what `pack_awq_weights` packed.

    Parameters
    ----------
    Q
        ``[in / 8, out]`` uint32.
    meta
        As returned with it.

    Returns
    -------
    NDArray
        ``[in_features, out_features]`` int8 codes -8..7.

    Raises
    ------
    ValueError
        If `meta` is of another kind, or contradicts the shape.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> codes = np.arange(-8, 8, dtype=np.int8)[:, None]
    >>> packed = bitwright.pack_awq_weights(codes, np.ones((1, 1)), np.zeros((1, 1)), 16)
    >>> bool((bitwright.unpack_awq_weights(*packed) == codes).all())
    True
    """
    channels, out, group_size = _meta_sizes(meta)
    words = np.asarray(Q)
    padded = channels + -channels % group_size
    if words.dtype != np.uint32 or words.shape != (padded // CODES_PER_WORD, out):
        raise ValueError(
            f"Q: expected uint32 [{padded // CODES_PER_WORD}, {out}] for meta, "
            f"got {words.dtype} {list(words.shape)}"
        )
    codes = unpack(np.ascontiguousarray(words.T), BITS).T[:channels]
    return np.ascontiguousarray(codes.astype(np.int8) + np.int8(LOWEST))


def awq_quantize(
    weights: ArrayLike,
    activations: ArrayLike,
    group_size: int = 128,
    salient_ratio: float = 0.01,
    activation_method: ActivationMethod = "rms",
    *,
    channel_scaling: bool = False,
) -> AWQResult:
    """Quantize a layer to symmetric INT4 so that its output suffers least, the salient weights' above all.

    Parameters
    ----------
    weights
        ``[in, out]`` float; any number of input channels.
    activations
        ``[batch, length, in]`` or ``[tokens, in]``, samples of the layer's input.
    group_size
        Input channels that share a scale, a multiple of 8; the last group is filled up.
    salient_ratio
        Share of the weights that are salient, from 0 to 1: their part of the output error counts twice,
        and with `channel_scaling` it is their channels that are scaled.
    activation_method
        How the inputs are measured to find them, see `compute_activation_stats`.
    channel_scaling
        Multiply the salient weights' input channels before rounding, which costs a float per channel.

    Returns
    -------
    AWQResult

    Raises
    ------
    ValueError
        If shapes do not match, a value is NaN or infinite, all activations are zero, or the ratio or group
        size is out of range.

    Notes
    -----
    Scaling a whole output, which is what `q_scale` is for, cannot change the error within a group, since
    the group's scale takes it up. So the salient weights are protected otherwise: ranges and codes are
    chosen by the activation-weighted error (GPTQ through the gram of the activations), and `q_scale`
    takes the factor that then brings each output closest to the original.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> rng = np.random.default_rng(0)
    >>> weights = rng.standard_normal((64, 16), dtype=np.float32)
    >>> activations = rng.standard_normal((4, 64, 64), dtype=np.float32)
    >>> result = bitwright.awq_quantize(weights, activations, group_size=32)
    >>> restored = bitwright.awq_dequantize(
    ...     result.Q, result.scales, result.zeros, result.q_scale, result.meta
    ... )
    >>> bool(np.linalg.norm(restored - weights) < 0.2 * np.linalg.norm(weights))
    True
    """
    matrix, tokens = as_matrix(weights), as_tokens(activations)
    check_ratio(salient_ratio)
    _check_group_size(group_size)
    channels, outputs = matrix.shape
    if tokens.shape[1] != channels:
        raise ValueError(
            f"activations: {tokens.shape[1]} channels wide, weights have {channels} input channels"
        )
    stats = compute_activation_stats(tokens, activation_method)
    if not stats.any():
        raise ValueError("activations: are all zero")
    mask, _ = find_salient_weights(matrix, stats, salient_ratio)
    padding = -channels % group_size
    padded = np.pad(matrix, ((0, padding), (0, 0)))
    mask = np.pad(mask, ((0, padding), (0, 0)))
    gram = np.pad(gram_of(tokens), (0, padding))
    rows = np.ascontiguousarray(padded.T)

    channel_scale = None
    if channel_scaling:
        channel_scale = _search_channel_scale(
            rows, gram, mask, np.pad(stats, (0, padding)), group_size
        )
        rows *= channel_scale
        gram /= np.outer(channel_scale, channel_scale)

    steps = np.abs(rows).reshape(outputs, -1, group_size).max(axis=2) / HIGHEST
    q_scale = compute_salient_scaling(rows.T, mask, np.where(steps > 0, steps, 1).T, group_size)
    q_scale *= _lift(steps.max(axis=1) * q_scale)
    q_scale = q_scale.astype(np.float16).astype(np.float32)
    rows *= q_scale[:, None]
    tensor = quantize_salient(rows, gram, mask.T, group_size, np.float16)
    q_scale = _best_gain(rows, tensor.dequantize(), gram, q_scale)

    codes = (tensor.codes.astype(np.int8) + np.int8(LOWEST)).T[:channels]
    scales = np.ascontiguousarray(tensor.scales.T)
    zeros = np.zeros_like(scales)
    words, meta = pack_awq_weights(codes, scales, zeros, group_size)
    if channel_scale is not None:
        channel_scale = channel_scale[:channels].copy()
        meta["channel_scale"] = channel_scale
    stored = q_scale.astype(np.float16)
    change = awq_dequantize(words, scales, zeros, stored, meta) - matrix
    lost, largest = float(np.square(change, dtype=np.float64).sum()), float(np.abs(rows).max())
    energy = float(np.square(matrix, dtype=np.float64).sum())
    if lost > 0.5 * energy and largest < HIGHEST * COARSE:
        raise ValueError(
            f"weights: {np.abs(matrix).max():.1e} at most, so small that float16 scales lose "
            f"{lost / energy:.0%} of their energy; multiply them by a power of two, and divide the result"
        )
    return AWQResult(
        Q=words,
        scales=scales,
        zeros=zeros,
        q_scale=stored,
        quantization_error=lost,
        salient_ratio=salient_ratio,
        channel_scale=channel_scale,
        meta=meta,
    )


def awq_dequantize(
    Q: NDArray[np.uint32],  # noqa: N803
    scales: ArrayLike,
    zeros: ArrayLike,
    q_scale: ArrayLike,
    meta: Mapping[str, Any],
    weights_dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """Return the weights that `awq_quantize` stored.

    Parameters
    ----------
    Q, scales, zeros, q_scale, meta
        From `AWQResult`. `meta` holds ``in_features, out_features, group_size, quant_type`` and, with
        channel scaling, ``channel_scale``.
    weights_dtype
        Of the result.

    Returns
    -------
    NDArray
        ``[in, out]``.

    Raises
    ------
    ValueError
        If shapes do not match `meta`.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> one, zero = np.ones((1, 1)), np.zeros((1, 1))
    >>> codes = np.full((8, 1), -8, np.int8)
    >>> words, meta = bitwright.pack_awq_weights(codes, one, zero, group_size=8)
    >>> bitwright.awq_dequantize(words, one, zero, [2.0], meta)[0]
    array([-4.], dtype=float32)
    """
    channels, out, group_size = _meta_sizes(meta)
    codes = unpack_awq_weights(Q, meta)
    arrays = []
    for name, each in (("scales", scales), ("zeros", zeros)):
        array = np.asarray(each, np.float32)
        _check_groups(array, name, (channels, out), group_size)
        arrays.append(np.repeat(array, group_size, axis=0)[:channels])
    divisor = np.asarray(q_scale, np.float32)
    if divisor.shape != (out,):
        raise ValueError(f"q_scale: expected [{out}], got shape {list(divisor.shape)}")
    weights = codes * arrays[0] / divisor + arrays[1]
    channel_scale = meta.get("channel_scale")
    if channel_scale is not None:
        per_channel = np.asarray(channel_scale, np.float32)
        if per_channel.shape != (channels,):
            raise ValueError(
                f"meta: channel_scale has shape {list(per_channel.shape)}, expected [{channels}]"
            )
        weights /= per_channel[:, None]
    return weights.astype(weights_dtype)


def _search_channel_scale(
    rows: Float32, gram: Float32, mask: NDArray[np.bool_], stats: Float32, group_size: int
) -> Float32:
    """Return the scales of the channels with salient weights, 1 elsewhere: their magnitude above the
    typical one, to the power with the least output error."""
    typical = np.exp(np.log(stats[stats > 0]).mean())
    excess = np.where(mask.any(axis=1), np.maximum(stats / typical, 1), 1)
    choice = GridChoice.check(rows, BITS, group_size, "symmetric", np.float16, search=True)
    loss = gram_loss([rows], [choice], gram)
    candidates = [
        (excess ** (step / DEFAULT_GRID)).astype(np.float32) for step in range(DEFAULT_GRID)
    ]
    return min(candidates, key=loss)


def _lift(steps: Float32) -> Float32:
    """Return a power of two for each output whose largest step would be coarse in float16, 1 for others."""
    coarse = (steps > 0) & (steps < COARSE)
    powers = np.frexp(np.float32(SMALLEST_NORMAL) / np.where(coarse, steps, 1))[1]
    lift: Float32 = np.where(coarse, np.ldexp(np.float32(1), np.clip(powers, 0, MOST_LIFT)), 1)
    return lift.astype(np.float32)


def _best_gain(rows: Float32, restored: Float32, gram: Float32, q_scale: Float32) -> Float32:
    """Return the divisor of each output, rounded to float16, that brings it closest to the original: with
    gain a, ``(aŵ - w) G (aŵ - w)ᵀ`` is least at ``a = ŵGwᵀ / ŵGŵᵀ``."""
    product = np.empty_like(restored)
    _kernels.linear(restored, gram, None, product, False)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = (product * rows).sum(axis=1) / (product * restored).sum(axis=1)
    usable = np.isfinite(gain) & (gain > 0.5) & (gain < 2)
    divisor: Float32 = (q_scale / np.where(usable, gain, 1)).astype(np.float16).astype(np.float32)
    return divisor


def _check_group_size(group_size: int) -> None:
    if group_size < CODES_PER_WORD or group_size % CODES_PER_WORD:
        raise ValueError(f"group_size: expected a multiple of 8, got {group_size}")


def _check_groups(array: NDArray[Any], name: str, shape: tuple[int, ...], group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")
    groups = -(-shape[0] // group_size)
    if array.shape != (groups, shape[1]):
        raise ValueError(f"{name}: expected shape [{groups}, {shape[1]}], got {list(array.shape)}")


def _meta_sizes(meta: Mapping[str, Any]) -> tuple[int, int, int]:
    try:
        sizes = int(meta["in_features"]), int(meta["out_features"]), int(meta["group_size"])
    except KeyError as error:
        raise ValueError(f"meta: lacks {error}") from error
    if meta.get("quant_type") != QUANT_TYPE:
        raise ValueError(f"meta: quant_type is {meta.get('quant_type')!r}, expected {QUANT_TYPE!r}")
    _check_group_size(sizes[2])
    return sizes
