"""The error metrics of AWQ's searches, by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Metric = Callable[[Float32, Float32], Any]

HUBER_THRESHOLD = 0.1  # in units of each channel's root mean square


def mse(reference: Float32, candidate: Float32) -> Float32:
    """Mean squared error: what the paper minimizes, and the only one that the gram gives exactly."""
    return _mean(np.square(candidate - reference))


def mae(reference: Float32, candidate: Float32) -> Float32:
    """Mean absolute error: a few tokens with huge outputs do not decide alone."""
    return _mean(np.abs(candidate - reference))


def relative(reference: Float32, candidate: Float32) -> Float32:
    """Squared error over the channel's energy: quiet channels count as much as loud ones.

    Good where a later norm brings all channels to one level.
    """
    energy: Float32 = np.maximum(_mean(np.square(reference)), _TINY)
    return np.divide(mse(reference, candidate), energy, dtype=np.float32)


def cosine(reference: Float32, candidate: Float32) -> Float32:
    """One minus the cosine over the tokens: the direction alone, whatever the gain.

    Good where a norm follows, which takes the gain out again.
    """
    product = _mean(reference * candidate)
    lengths = np.sqrt(_mean(np.square(reference)) * _mean(np.square(candidate)))
    result: Float32 = np.where(lengths > 0, 1 - product / np.maximum(lengths, _TINY), 0)
    return result


def huber(reference: Float32, candidate: Float32) -> Float32:
    """Squared error up to a tenth of the channel's root mean square, linear beyond.

    As exact as mse for the many small errors, as tolerant as mae of the few large ones.
    """
    threshold = HUBER_THRESHOLD * np.sqrt(_mean(np.square(reference)))
    size = np.abs(candidate - reference)
    return _mean(np.where(size <= threshold, size * size, threshold * (2 * size - threshold)))


METRICS: dict[str, Metric] = {
    "mse": mse,
    "mae": mae,
    "relative": relative,
    "cosine": cosine,
    "huber": huber,
}
_TINY = np.float32(np.finfo(np.float32).tiny)


def find_metric(metric: str | Metric) -> Metric:
    """Return the metric of that name, or the callable itself; ValueError if there is none."""
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise ValueError(
            f"metric: expected one of {', '.join(METRICS)} or a function, got {metric!r}"
        )
    return METRICS[metric]


def channel_errors(metric: Metric, reference: Float32, candidate: Float32) -> NDArray[np.float64]:
    """Return the metric's errors ``[channels]`` of outputs ``[tokens, channels]``.

    A function of the user's that returns a single number is asked channel by channel.

    Raises
    ------
    ValueError
        If it returns something else, or NaN.
    """
    channels = reference.shape[1]
    errors = np.asarray(metric(reference, candidate), np.float64)
    if errors.ndim == 0 and channels > 1:
        errors = np.array(
            [
                metric(reference[:, i : i + 1], candidate[:, i : i + 1])
                for i in range(reference.shape[1])
            ],
            np.float64,
        )
    if errors.size != channels or np.isnan(errors).any():
        raise ValueError(
            f"metric: for outputs {list(reference.shape)} it must return one number, or one for each "
            f"of {channels} channels; got shape {list(errors.shape)} with "
            f"{int(np.isnan(errors).sum())} NaN"
        )
    return errors.reshape(channels)


def total_error(metric: Metric, reference: Float32, candidate: Float32) -> float:
    """Return the metric's error of whole outputs, the mean over the channels."""
    errors = np.asarray(metric(reference, candidate), np.float64)
    if errors.size not in (1, reference.shape[1]) or np.isnan(errors).any():
        return float(channel_errors(metric, reference, candidate).mean())  # raises, in words
    return float(errors.mean())


def _mean(values: Float32) -> Float32:
    result: Float32 = values.mean(axis=0)
    return result
