"""Adam (Kingma and Ba 2015, arXiv:1412.6980)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


@dataclass(eq=False)
class Adam:
    """Moments of some parameters' gradients, and the steps that follow from them.

    Parameters
    ----------
    parameters
        Float32 arrays by name; they are changed in place.
    momentum, decay
        β₁ and β₂ of the paper. Runs are short, so β₂ is smaller than in training from scratch.
    epsilon
        Added to the root of the second moment; gradients are of any magnitude, so it is tiny.

    Examples
    --------
    >>> import numpy as np
    >>> values = {"x": np.ones(2, np.float32)}
    >>> Adam(values).step({"x": np.array([2, -3], np.float32)}, 0.1)
    >>> values["x"]
    array([0.9, 1.1], dtype=float32)
    """

    parameters: Mapping[str, Float32]
    momentum: float = 0.9
    decay: float = 0.95
    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        self.steps = 0
        self.first = {name: np.zeros_like(array) for name, array in self.parameters.items()}
        self.second = {name: np.zeros_like(array) for name, array in self.parameters.items()}

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite shows in the next loss
    def step(self, gradients: Mapping[str, Float32], learning_rate: float) -> None:
        """Change every parameter once (algorithm 1 of the paper)."""
        self.steps += 1
        rate = np.float32(learning_rate / (1 - self.momentum**self.steps))
        unbias = np.float32(1 / (1 - self.decay**self.steps))
        for name, gradient in gradients.items():
            first, second = self.first[name], self.second[name]
            first += np.float32(1 - self.momentum) * (gradient - first)
            second += np.float32(1 - self.decay) * (np.square(gradient) - second)
            size = np.sqrt(second * unbias) + np.float32(self.epsilon)
            self.parameters[name][...] -= rate * first / size
