"""A method that is followed by refinement."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.grids.tables import vectors_of
from bitwright.grids.tensor import Grid, QuantizedTensor
from bitwright.methods.method import MethodOptions, Solver
from bitwright.methods.refine import refine
from bitwright.methods.two_sided import refine_two_sided


def refined(
    solve: Solver,
    gram: NDArray[np.float32] | None,
    options: MethodOptions,
    output_metric: NDArray[np.float32] | None = None,
) -> Solver:
    """Follow a method with `refine`, where it is asked for and there is a gram, and with
    `refine_two_sided`, where there is an output metric of the rows too."""
    if not options.refine or gram is None:
        return solve
    known = gram

    def solve_and_refine(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        tensor = solve(weight, bits, size, grid, dtype)
        target = np.ascontiguousarray(weight, np.float32)
        damping = options.damping
        tensor, _ = refine(tensor, target, known, damping=damping, overwrite_gram=True)
        # Vectors have no sweep over single codes in the metric of outputs.
        if output_metric is not None and vectors_of(tensor.grid) is None:
            tensor, _ = refine_two_sided(
                tensor, target, known, output_metric, damping=damping, overwrite_gram=True
            )
        return tensor

    return solve_and_refine
