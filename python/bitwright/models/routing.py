"""Which experts a token passes, and how much each of them counts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import ExpertsConfig

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Routes:
    """The tokens of every expert, in order, and the weights of its outputs for them."""

    rows: tuple[NDArray[np.intp], ...]
    weights: tuple[Float32, ...]


def route(logits: Float32, config: ExpertsConfig, correction: Float32 | None = None) -> Routes:
    """Choose the experts of every token.

    Parameters
    ----------
    logits
        ``[tokens, experts]`` float32, the router's outputs.
    config
        How to choose.
    correction
        ``[experts]`` float32, added to the scores for the choice but not for the weights (DeepSeek-V3,
        section 2.1.2).

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
    scores: Float32
    if config.scores == "sigmoid":
        scores = np.float32(1) / (np.float32(1) + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    ranked = scores if correction is None else scores + correction
    if config.groups > 1:
        ranked = _in_best_groups(ranked, config)
    chosen = _top(ranked, config.chosen)
    weights: Float32 = np.take_along_axis(scores, chosen, axis=1)
    if config.normalized:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    weights = (weights * np.float32(config.scale)).astype(np.float32)
    order = np.argsort(chosen, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(chosen.reshape(-1), minlength=config.count))
    places = np.split(order, ends[:-1])
    return Routes(
        tuple(place // config.chosen for place in places),
        tuple(weights.reshape(-1)[place] for place in places),
    )


def _in_best_groups(scores: Float32, config: ExpertsConfig) -> Float32:
    """Return the scores with those of all but the best groups below every other."""
    grouped = scores.reshape(len(scores), config.groups, -1)
    best = -np.sort(-grouped, axis=2)[:, :, : 1 if config.group_score == "max" else 2].sum(axis=2)
    kept = np.zeros(best.shape, bool)
    np.put_along_axis(kept, _top(best, config.kept_groups), True, axis=1)
    return np.where(kept[:, :, None], grouped, -np.inf).reshape(scores.shape).astype(np.float32)


def _top(scores: Float32, count: int) -> NDArray[np.intp]:
    return np.argpartition(-scores, count - 1, axis=1)[:, :count]
