"""Routing of tokens to experts, and the weights of their outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitwright.models.config import ExpertsConfig

Float: TypeAlias = NDArray[Any]  # float32 or float64
LEAST_SUM = 1e-20  # of the weights of a token, before they are divided by it


@dataclass(frozen=True, eq=False)
class Routes:
    """The tokens of every expert, in order, and the weights of its outputs for them; the scores ``[tokens,
    experts]`` that these come from, and which experts each token has chosen ``[tokens, chosen]``."""

    rows: tuple[NDArray[np.intp], ...]
    weights: tuple[Float, ...]
    scores: Float
    chosen: NDArray[np.intp]


def route(logits: Float, config: ExpertsConfig, correction: Float | None = None) -> Routes:
    """Choose the experts of every token.

    Parameters
    ----------
    logits
        ``[tokens, experts]`` float32 or float64, the router's outputs.
    config
        How to choose.
    correction
        ``[experts]``, added to the scores for the choice but not for the weights (DeepSeek-V3,
        arXiv:2412.19437, section 2.1.2).

    Returns
    -------
    Routes

    Examples
    --------
    >>> import numpy as np
    >>> config = ExpertsConfig(3, 1, 8, 0, "softmax", True, 1.0, 1, 1, "max")
    >>> route(np.array([[0, 2, 1], [3, 1, 0]], np.float32), config).rows
    (array([1]), array([0]), array([], dtype=int64))
    """
    scores: Float
    if config.scores == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    ranked = scores if correction is None else scores + correction
    if config.groups > 1:
        ranked = _in_best_groups(ranked, config)
    chosen = _top(ranked, config.chosen)
    weights: Float = np.take_along_axis(scores, chosen, axis=1)
    if config.normalized:
        weights = weights / (weights.sum(axis=1, keepdims=True) + logits.dtype.type(LEAST_SUM))
    weights = weights * logits.dtype.type(config.scale)
    places = _places(chosen, config)
    return Routes(
        tuple(place // config.chosen for place in places),
        tuple(weights.reshape(-1)[place] for place in places),
        scores,
        chosen,
    )


def route_backward(
    routes: Routes, config: ExpertsConfig, gradients: Sequence[Float | None]
) -> Float:
    """Return the gradient of the logits.

    Parameters
    ----------
    routes, config
        What was chosen, and how. The choice itself has no gradient.
    gradients
        Of every expert's weights, None for zeros.

    Returns
    -------
    NDArray
        ``[tokens, experts]``.
    """
    scores, chosen = routes.scores, routes.chosen
    weighed = np.zeros(chosen.size, scores.dtype)
    for place, gradient in zip(_places(chosen, config), gradients, strict=True):
        if gradient is not None:
            weighed[place] = gradient
    weighed = weighed.reshape(chosen.shape) * scores.dtype.type(config.scale)
    if config.normalized:  # w = s / Σ s
        kept = np.take_along_axis(scores, chosen, axis=1)
        total = kept.sum(axis=1, keepdims=True) + scores.dtype.type(LEAST_SUM)
        weighed = (weighed - (weighed * kept).sum(axis=1, keepdims=True) / total) / total
    result = np.zeros_like(scores)
    np.put_along_axis(result, chosen, weighed, axis=1)
    if config.scores == "sigmoid":
        return np.asarray(result * scores * (1 - scores))
    return np.asarray(scores * (result - (result * scores).sum(axis=1, keepdims=True)))


def _places(chosen: NDArray[np.intp], config: ExpertsConfig) -> list[NDArray[np.intp]]:
    """Return where each expert is in `chosen`, read row by row."""
    order = np.argsort(chosen, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(chosen.reshape(-1), minlength=config.count))
    return np.split(order, ends[:-1])


def _in_best_groups(scores: Float, config: ExpertsConfig) -> Float:
    """Return the scores with those of all but the best groups below every other."""
    grouped = scores.reshape(len(scores), config.groups, -1)
    best = -np.sort(-grouped, axis=2)[:, :, : 1 if config.group_score == "max" else 2].sum(axis=2)
    kept = np.zeros(best.shape, bool)
    np.put_along_axis(kept, _top(best, config.kept_groups), True, axis=1)
    return np.where(kept[:, :, None], grouped, -np.inf).reshape(scores.shape)


def _top(scores: Float, count: int) -> NDArray[np.intp]:
    return np.argpartition(-scores, count - 1, axis=1)[:, :count]
