"""The choice of the next token from logits."""

import numpy as np

from bitwright.models.operations import Float32


class Sampler:
    """Chooses tokens; the same seed chooses the same.

    Parameters
    ----------
    temperature
        Divides the logits; 0 takes the likeliest token.
    top_k
        Only the likeliest so many are chosen from; 0 for all.
    top_p
        Only the fewest likeliest whose probabilities add up to this are chosen from (Holtzman et al. 2020,
        arXiv:1904.09751).
    seed
        Of the choice.

    Raises
    ------
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> Sampler(temperature=0).choose(np.array([0.1, 2, 1], np.float32))
    1
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature: expected 0 or more, got {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def choose(self, logits: Float32) -> int:
        """Return the token that comes next, given its logits ``[vocabulary]``."""
        if self._temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if self._top_k:
            order = order[: self._top_k]
        scaled = (logits[order].astype(np.float64) - float(logits[order[0]])) / self._temperature
        shares = np.exp(scaled)
        shares /= shares.sum()
        # The token that reaches the sum is one of them.
        kept = 1 + int(np.searchsorted(np.cumsum(shares), self._top_p))
        shares = shares[:kept] / shares[:kept].sum()
        place = int(np.searchsorted(np.cumsum(shares), self._random.random(), side="right"))
        return int(order[min(place, len(shares) - 1)])
