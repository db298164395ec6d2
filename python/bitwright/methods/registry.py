"""Methods by name: from a layer's statistics to a function that quantizes the layers that share them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.grids.tensor import Grid, QuantizedTensor
from bitwright.methods.awq import quantize_clipped
from bitwright.methods.gptq import factor_gram, quantize_gptq
from bitwright.methods.metrics import Metric
from bitwright.methods.refine import refine
from bitwright.methods.rtn import quantize_rtn
from bitwright.methods.salient import ActivationMethod, find_salient_weights, quantize_salient

# What the paper of GPTQ takes. Corrected weights carry the noise of what they were estimated from along
# directions that inputs hardly have, and want more.
DAMPING, CORRECTED_DAMPING = 0.01, 0.05


@dataclass(frozen=True)
class MethodOptions:
    """What a run sets once for all layers; see `quantize_gptq` and `awq_quantize` for the meaning.

    `grid_search` None stands for the method's own default.
    """

    method: str = "gptq"
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

    @property
    def clips(self) -> bool:
        """Whether ranges are clipped after AWQ's scales; GPTQ searches for them itself."""
        return self.method == "awq"


Solver = Callable[[NDArray[Any], int, int | None, Grid, np.dtype[Any]], QuantizedTensor]


def rtn_solver(gram: NDArray[np.float32] | None, options: MethodOptions) -> Solver:
    """Round to nearest; the statistics only weigh the grid search."""
    importance = None if gram is None else gram.diagonal()

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        return quantize_rtn(
            weight,
            bits,
            size,
            grid=grid,
            scale_dtype=dtype,
            # The scales of k grids are fitted in any case.
            grid_search=grid == "k" if options.grid_search is None else options.grid_search,
            importance=importance,
        )

    return solve


def gptq_solver(gram: NDArray[np.float32] | None, options: MethodOptions) -> Solver:
    """GPTQ, with the gram factored once for all layers that share it."""
    if gram is None:
        raise ValueError("method: gptq needs calibration data")
    factor = factor_gram(gram, damping=options.damping, act_order=options.act_order)

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        return quantize_gptq(
            weight,
            factor,
            bits,
            size,
            grid=grid,
            scale_dtype=dtype,
            block_size=options.block_size,
            grid_search=options.grid_search is not False,
        )

    return solve


def clip_solver(
    blocks: Sequence[NDArray[np.float32]],
    n_grid: int,
    metric: str | Metric = "mse",
    activations: NDArray[np.float32] | None = None,
) -> Solver:
    """Round to nearest in clipped ranges, by blocks on the gram's diagonal; see `quantize_clipped`."""

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        parts, first = [], 0
        for gram in blocks:
            channels = slice(first, first + len(gram))
            parts.append(
                quantize_clipped(
                    np.ascontiguousarray(weight[:, channels]),
                    gram,
                    bits,
                    size,
                    grid=grid,
                    scale_dtype=dtype,
                    activations=None
                    if activations is None
                    else np.ascontiguousarray(activations[:, channels]),
                    metric=metric,
                    n_grid=n_grid,
                )
            )
            first = channels.stop
        return parts[0] if len(parts) == 1 else QuantizedTensor.joined(parts, axis=1)

    return solve


def salient_solver(
    gram: NDArray[np.float32] | None,
    options: MethodOptions,
    stats: NDArray[np.float32] | None = None,
) -> Solver:
    """Symmetric 4 bits that protect the salient weights, found by `stats` or else by the gram's rms."""
    if gram is None:
        raise ValueError("method: salient needs calibration data or activations")
    magnitudes = np.sqrt(gram.diagonal()) if stats is None else stats

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        mask, _ = find_salient_weights(weight.T, magnitudes, options.salient_ratio)
        tensor = quantize_salient(weight, gram, mask.T, size or weight.shape[1], dtype)
        # Where only affine grids are stored the same grid is written with its bias, which is exact: -8 s.
        return tensor if grid != "affine" else tensor.as_affine()

    return solve


def refined(solve: Solver, gram: NDArray[np.float32] | None, options: MethodOptions) -> Solver:
    """Follow a method with `refine`, where it is asked for and there is a gram."""
    if not options.refine or gram is None:
        return solve
    known = gram

    def solve_and_refine(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        tensor = solve(weight, bits, size, grid, dtype)
        target = np.ascontiguousarray(weight, np.float32)
        return refine(tensor, target, known, damping=options.damping, overwrite_gram=True)[0]

    return solve_and_refine


METHODS: dict[str, Callable[[NDArray[np.float32] | None, MethodOptions], Solver]] = {
    "gptq": gptq_solver,
    "rtn": rtn_solver,
    "awq": rtn_solver,
    "awq+gptq": gptq_solver,
    "salient": salient_solver,
}
Preset = Literal["fast", "default", "best"]
PRESETS: tuple[Preset, ...] = ("fast", "default", "best")
CORRECTED_METHODS = ("gptq", "awq", "awq+gptq")  # with refinement and drift correction by default
SCALED_METHODS = ("awq", "awq+gptq")  # these quantize weights that AWQ has scaled
