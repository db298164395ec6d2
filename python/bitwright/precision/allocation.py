"""Dynamic precision: allocation of bits to layers within a size, by Lagrangian relaxation."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

STEPS = 200  # of a bisection: more than a float64 has bits


def estimate_threshold(
    sensitivities: Mapping[str, float],
    parameters: Mapping[str, int],
    low_bpw: float,
    high_bpw: float,
    target_bpw: float,
) -> float:
    """Find the least threshold so that the target holds if all layers above it get the higher precision.

    Parameters
    ----------
    sensitivities
        Per million parameters, by layer.
    parameters
        Number of weights of each layer.
    low_bpw, high_bpw
        Bits per weight of both precisions, scales included.
    target_bpw
        Bits per weight of all these layers together.

    Returns
    -------
    float
        Layers whose sensitivity is larger get `high_bpw`.

    Raises
    ------
    ValueError
        If no threshold reaches the target; the message gives the range.

    Examples
    --------
    >>> import bitwright
    >>> threshold = bitwright.estimate_threshold(
    ...     {"a": 1.0, "b": 3.0, "c": 2.0}, {"a": 10, "b": 10, "c": 10}, 3, 6, 4
    ... )
    >>> 2 <= threshold < 3
    True
    """
    check_target(target_bpw, low_bpw, high_bpw)
    total = sum(parameters[name] for name in sensitivities)

    def size(threshold: float) -> float:
        high = sum(parameters[name] for name, value in sensitivities.items() if value > threshold)
        return low_bpw + (high_bpw - low_bpw) * high / total

    least, most = min(sensitivities.values()), max(sensitivities.values())
    if size(np.nextafter(least, -np.inf)) <= target_bpw:
        return float(np.nextafter(least, -np.inf))
    for _ in range(STEPS):
        middle = (least + most) / 2
        if size(middle) > target_bpw:
            least = middle
        else:
            most = middle
    return float(most)


def allocate(costs: ArrayLike, sizes: ArrayLike, budget: float) -> NDArray[np.intp]:
    """Choose a candidate for every item: costs add up to little, and sizes to no more than the budget.

    By Lagrangian relaxation: for a price of a bit every item takes what is cheapest, and the price is
    bisected. What the budget then has left goes to the upgrades that gain most for their size, until none
    fits: the result is within the smallest item's step of the budget.

    Parameters
    ----------
    costs
        ``[items, candidates]``.
    sizes
        ``[items, candidates]``, what each takes of the budget.
    budget
        For all items together.

    Returns
    -------
    NDArray
        ``[items]``, indices of candidates.

    Raises
    ------
    ValueError
        If even the smallest candidates take more than the budget.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.allocate([[9, 1], [5, 4], [3, 0]], [[2, 4], [2, 4], [2, 4]], 10)
    array([1, 0, 1])
    """
    cost, size = np.asarray(costs, np.float64), np.asarray(sizes, np.float64)
    rows = np.arange(len(cost))

    def cheapest(price: float) -> NDArray[np.intp]:
        # Of equal prices the smaller one, or an item without gain would take all of the budget.
        total = cost + price * size
        return np.lexsort((size, total), axis=1)[:, 0]

    def spent(chosen: NDArray[np.intp]) -> float:
        return float(size[rows, chosen].sum())

    smallest = size.argmin(axis=1)
    if spent(smallest) > budget * (1 + 1e-12):
        raise ValueError(
            f"budget: the smallest candidates take {spent(smallest):g}, not {budget:g}"
        )
    chosen = cheapest(0.0)
    if spent(chosen) > budget:
        gaps = np.diff(np.sort(size, axis=1), axis=1)
        low, high = 0.0, float(np.ptp(cost) + 1) / max(float(gaps[gaps > 0].min(initial=1)), 1e-300)
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(cheapest(middle)) > budget else (low, middle)
        chosen = cheapest(high)
        if spent(chosen) > budget:
            chosen = smallest
    left = budget * (1 + 1e-12) - spent(chosen)
    while True:
        more = size - size[rows, chosen][:, None]
        gain = cost[rows, chosen][:, None] - cost
        fits = (more > 0) & (more <= left) & (gain > 0)
        if not fits.any():
            return chosen
        worth = np.where(fits, gain / np.where(more > 0, more, 1), -np.inf)
        item, candidate = np.unravel_index(int(worth.argmax()), worth.shape)
        left -= more[item, candidate]
        chosen[item] = candidate


def check_target(target_bpw: float, least: float, most: float) -> None:
    """Raise ValueError unless a target can be reached."""
    if not least * (1 - 1e-9) <= target_bpw <= most * (1 + 1e-9):
        raise ValueError(
            f"target_bpw: {target_bpw:g} bits per weight is out of reach; the candidates reach from "
            f"{least:.4g} to {most:.4g} over the quantized layers, scales included"
        )
