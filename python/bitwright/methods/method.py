"""A method: from statistics of a layer's inputs to a function that quantizes the layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import check_choice
from bitwright.grids.tensor import Grid, QuantizedTensor

# Relative to the mean of the diagonal, as in GPTQ (arXiv:2210.17323, section 4). Corrected weights carry
# the noise of their estimate along directions that inputs hardly have, and need more: docs/experiments.md.
DAMPING, CORRECTED_DAMPING = 0.01, 0.05

ActivationMethod = Literal["mean", "max", "rms"]
ACTIVATION_METHODS: tuple[ActivationMethod, ...] = ("mean", "max", "rms")

Solver = Callable[[NDArray[Any], int, int | None, Grid, np.dtype[Any]], QuantizedTensor]
"""Quantizes a weight ``[out, in]``, given bits, group size, grid and the dtype of scales."""


@dataclass(frozen=True, eq=False)
class StageInputs:
    """All that a method sees of its layers' inputs. Drift is corrected in the weights it is given.

    Parameters
    ----------
    gram
        ``XᵀX / tokens`` ``[in, in]`` float32; None without statistics.
    magnitudes
        ``[in]`` float32, sizes of the channels other than the roots of the gram's diagonal.
    importance
        ``[in]`` float32, the gram's diagonal where no more of it is known.
    """

    gram: NDArray[np.float32] | None = None
    magnitudes: NDArray[np.float32] | None = None
    importance: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Method:
    """A method of quantization, with the properties that a run depends on.

    Parameters
    ----------
    name
        What users call it.
    description
        What model cards call it.
    solver
        Returns a function that quantizes the layers with some inputs.
    needs_inputs
        Whether it asks for calibration data or statistics.
    needs_gram
        Whether `solver` works with more of the gram than its diagonal.
    factors_gram
        Whether `solver` holds a factor of the gram beside it.
    scales_first
        Whether the weights are multiplied by AWQ's scales before.
    clips
        Whether ranges are clipped after AWQ's scales; others search for them themselves.
    corrects
        Whether refinement and drift correction follow by default.
    whole_layers
        Whether it looks at all rows of a layer together.
    uses_magnitudes
        Whether it takes sizes of channels as `ActivationMethod` says.
    through_transformers
        Whether it is offered for models that transformers runs.
    bits, grid
        The only number of bits that it has, and its grid where a format stores that.
    copies
        How many float32 copies of a layer it works on.
    operations
        Returns how many floating-point operations a layer ``(out, in)`` takes beside rounding, those of
        slow kernels as so many more: for the forecast of the time.
    """

    name: str
    description: str
    solver: Callable[[StageInputs, "MethodOptions"], Solver]
    needs_inputs: bool = True
    needs_gram: bool = False
    factors_gram: bool = False
    scales_first: bool = False
    clips: bool = False
    corrects: bool = False
    whole_layers: bool = False
    uses_magnitudes: bool = False
    through_transformers: bool = True
    bits: int | None = None
    grid: Grid | None = None
    copies: int = 2
    operations: Callable[[int, int], float] = lambda out, channels: 0.0


@dataclass(frozen=True)
class MethodOptions:
    """What a run sets once for all layers; see `bitwright.quantize` for the meaning.

    `grid_search` None stands for the method's own default.
    """

    method: Method
    damping: float = DAMPING
    act_order: bool = True
    block_size: int = 128
    grid_search: bool | None = None
    salient_ratio: float = 0.01
    activation_method: ActivationMethod = "rms"
    refine: bool = False
    drift: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping: expected a finite value from 0 on, got {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {self.block_size}")
        if not 0 <= self.salient_ratio <= 1:
            raise ValueError(f"salient_ratio: expected 0 to 1, got {self.salient_ratio}")
        check_choice("activation_method", self.activation_method, ACTIVATION_METHODS)

    def solver(self, inputs: StageInputs) -> Solver:
        """Return how the method quantizes layers with some inputs."""
        return self.method.solver(inputs, self)

    def identity(self) -> dict[str, object]:
        """Return the options as what a run that is resumed compares."""
        return {**vars(self), "method": self.method.name}
