"""A loss for gradients of models that have no teacher."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class SquaredLogits:
    """A loss that needs no teacher."""

    def __call__(self, first: int, logits: NDArray[Any], gradient: Any) -> NDArray[np.float64]:
        if gradient is not None:
            gradient[...] = 2 * logits
        return np.square(logits, dtype=np.float64).sum(axis=1)
