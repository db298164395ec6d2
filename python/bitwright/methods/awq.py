"""AWQ: activation-aware weight quantization (Lin et al. 2024, arXiv:2306.00978)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.arrays import require_finite
from bitwright.grids.choice import GridChoice, check_importance
from bitwright.grids.tables import fits_whole_rows, has_superblocks, shares_rows
from bitwright.grids.tensor import Grid, QuantizedTensor
from bitwright.methods.gptq import gptq_solver, solving_operations
from bitwright.methods.method import Method, Solver
from bitwright.methods.metrics import Metric, channel_errors, find_metric, total_error
from bitwright.methods.rtn import quantize_rtn, rtn_solver

Float32 = NDArray[np.float32]
Loss = Callable[[Float32], float]

DEFAULT_GRID = 20
MOST_CLIP = 0.5  # of a group's largest magnitude; max_shrink in the paper's code
CLIP_ROWS = 256  # rows whose outputs are in memory at one time
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True, eq=False)
class ScaleSearch:
    """The result of a search over ratios.

    Parameters
    ----------
    scale
        ``[channels]`` float32: what the columns of the weights are to be multiplied by.
    ratio
        The exponent of the activations that gave it; 0 is no scaling at all.
    losses
        The loss of every ratio that was tried.
    """

    scale: Float32
    ratio: float
    losses: Mapping[float, float]


def awq_scale(mean_abs: ArrayLike, ratio: float) -> Float32:
    """Return the scale of each input channel, ``mean|x| ** ratio`` (arXiv:2306.00978, eq. 5).

    Parameters
    ----------
    mean_abs
        ``[channels]`` mean magnitude of each input channel.
    ratio
        From 0 (no scaling) to 1.

    Returns
    -------
    NDArray
        ``[channels]`` float32, divided by ``sqrt(max * min)`` as the paper's code does, so that
        weights grow and shrink about equally. Channels that never were active have scale 1.

    Raises
    ------
    ValueError
        If a magnitude is negative, NaN or infinite, or the ratio is out of range.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.awq_scale([1, 4, 16], 0.5)
    array([0.5, 1. , 2. ], dtype=float32)
    """
    magnitudes = np.asarray(mean_abs, np.float64)
    if magnitudes.ndim != 1 or not np.isfinite(magnitudes).all() or (magnitudes < 0).any():
        raise ValueError("mean_abs: expected one finite magnitude per channel")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected 0 to 1, got {ratio}")
    scale = np.ones(magnitudes.shape)
    live = magnitudes > 0
    if live.any():
        powers = np.maximum(magnitudes[live] ** ratio, SMALLEST_SCALE)
        scale[live] = powers / np.sqrt(powers.max() * powers.min())
    return scale.astype(np.float32)


def search_scale(
    mean_abs: ArrayLike, loss: Loss, *, n_grid: int = DEFAULT_GRID, coarse_to_fine: bool = False
) -> ScaleSearch:
    """Find the ratio whose scale has the least loss.

    Parameters
    ----------
    mean_abs
        ``[channels]`` mean magnitude of each input channel.
    loss
        From a scale ``[channels]`` float32 to a number, for example `gram_loss` or `token_loss`.
    n_grid
        The ratios are 0, 1 / n_grid, …, (n_grid - 1) / n_grid.
    coarse_to_fine
        Try every fourth ratio first, then the neighbours of the best at half the step, twice: 9
        losses instead of 20. The loss is smooth in the ratio, as a rule.

    Returns
    -------
    ScaleSearch

    Raises
    ------
    ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.search_scale([1, 4], lambda scale: abs(scale[1] - 1.6), n_grid=10).ratio
    0.7
    """
    if n_grid < 1:
        raise ValueError(f"n_grid: expected at least 1, got {n_grid}")
    losses: dict[int, float] = {}

    def try_out(steps: Iterable[int]) -> int:
        for step in steps:
            if 0 <= step < n_grid and step not in losses:
                losses[step] = float(loss(awq_scale(mean_abs, step / n_grid)))
        return min(losses, key=lambda step: (losses[step], step))

    if coarse_to_fine and n_grid > 4:
        best = try_out(range(0, n_grid, 4))
        for width in (2, 1):
            best = try_out((best - width, best + width))
    else:
        best = try_out(range(n_grid))
    return ScaleSearch(
        scale=awq_scale(mean_abs, best / n_grid),
        ratio=best / n_grid,
        losses={step / n_grid: losses[step] for step in sorted(losses)},
    )


def scaled_rounding(
    weight: Float32, scale: Float32, choice: GridChoice, importance: Float32 | None = None
) -> Float32:
    """Return ``Q(W diag(s)) diag(1/s) - W``, the rounding error of a scaled weight (eq. 4).

    Where `choice` searches for ranges, `importance` ``[in]`` weighs the squared errors.
    """
    change = np.empty_like(weight)
    _kernels.scaled_rounding_change(
        weight,
        scale,
        check_importance(importance, weight.shape[1]),
        choice.kernel_grid,  # of k grids, whose scales are fitted later, that of each group by itself
        change,
    )
    return change


def gram_loss(weights: Sequence[Float32], choices: Sequence[GridChoice], gram: Float32) -> Loss:
    """Return the layers' mean squared output error as a function of their common scale.

    Parameters
    ----------
    weights
        Of the linears that share an input, ``[out, in]`` float32.
    choices
        The grid of each.
    gram
        ``[in, in]`` float32, the second moments of the input. With it the loss is exact without the
        tokens: ``mean |ΔX|² = tr(Δ G Δᵀ) / out``, Δ the change of the weights.

    Returns
    -------
    Loss
        For `search_scale`.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> rng = np.random.default_rng(0)
    >>> weight = rng.standard_normal((8, 64), dtype=np.float32)
    >>> inputs = rng.standard_normal((256, 64), dtype=np.float32)
    >>> inputs[:, 3] *= 50
    >>> rounding = bitwright.GridChoice.check(weight, bits=3)
    >>> loss = bitwright.gram_loss([weight], [rounding], bitwright.gram(inputs))
    >>> bitwright.search_scale(np.abs(inputs).mean(axis=0), loss).ratio > 0
    True
    """
    diagonal = gram.diagonal()

    def loss(scale: Float32) -> float:
        changes = [
            scaled_rounding(weight, scale, choice, diagonal)
            for weight, choice in zip(weights, choices, strict=True)
        ]
        # One product of many rows is faster than several of few.
        change = changes[0] if len(changes) == 1 else np.concatenate(changes)
        return float(_kernels.row_quadratic_forms(change, gram).mean())

    return loss


def token_loss(
    weights: Sequence[Float32],
    choices: Sequence[GridChoice],
    activations: Float32,
    metric: str | Metric = "mse",
) -> Loss:
    """Return the layers' output error on tokens, in any metric, as a function of their common scale.

    Parameters
    ----------
    weights, choices
        As for `gram_loss`.
    activations
        ``[tokens, in]`` float32.
    metric
        Its name, or a function of reference and candidate outputs ``[tokens, out]``.

    Returns
    -------
    Loss
        For `search_scale`.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> weight, inputs = np.eye(32, dtype=np.float32), np.ones((4, 32), np.float32)
    >>> rounding = bitwright.GridChoice.check(weight, group_size=32)
    >>> loss = bitwright.token_loss([weight], [rounding], inputs, metric="mae")
    >>> loss(np.ones(32, np.float32)) < 1e-5
    True
    """
    measure = find_metric(metric)
    references = [_outputs(activations, weight) for weight in weights]
    energies = np.square(activations).mean(axis=0)
    outputs = sum(len(weight) for weight in weights)

    def loss(scale: Float32) -> float:
        total = 0.0
        for weight, choice, reference in zip(weights, choices, references, strict=True):
            change = scaled_rounding(weight, scale, choice, energies)
            error = total_error(measure, reference, reference + _outputs(activations, change))
            total += error * len(weight) / outputs
        return total

    return loss


def quantize_clipped(
    weight: Float32,
    gram: Float32 | None = None,
    bits: int = 4,
    group_size: int | None = 64,
    *,
    grid: Grid = "affine",
    scale_dtype: DTypeLike | None = None,
    activations: Float32 | None = None,
    metric: str | Metric = "mse",
    n_grid: int = DEFAULT_GRID,
) -> QuantizedTensor:
    """Round weights to grids whose ranges are clipped for the least error of each group's output.

    Parameters
    ----------
    weight
        ``[out, in]`` float32, C-contiguous.
    gram
        ``[in, in]`` float32 second moments of the inputs; of it the groups' blocks on the diagonal are
        read. For the metric ``"mse"``.
    bits, group_size, grid, scale_dtype
        As for `quantize_rtn`.
    activations
        ``[tokens, in]`` float32, for the other metrics.
    metric
        Its name, or a function of reference and candidate outputs ``[tokens, rows]`` of a group.
    n_grid
        Ranges from 1 down to 0.5 of a group's largest magnitude: first both ends together, in steps of
        1 / n_grid, then each by itself, in twice these steps.

    Returns
    -------
    QuantizedTensor

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or a value is NaN or infinite.

    Notes
    -----
    The paper's code clips symmetrically and rounds between what is then the least and the largest
    weight. Here each end has its own limit, and an affine grid may have zero as a point or not.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> rng = np.random.default_rng(0)
    >>> weight = rng.standard_normal((8, 64), dtype=np.float32)
    >>> inputs = rng.standard_normal((256, 64), dtype=np.float32)
    >>> def error(tensor):
    ...     return float(np.square(inputs @ (tensor.dequantize() - weight).T).sum())
    >>> clipped = bitwright.quantize_clipped(weight, bitwright.gram(inputs), bits=2)
    >>> error(clipped) < 0.8 * error(bitwright.quantize_rtn(weight, bits=2))
    True
    """
    choice = GridChoice.check(weight, bits, group_size, grid, scale_dtype, False)
    require_finite(weight, "weight")
    if n_grid < 1:
        raise ValueError(f"n_grid: expected at least 1, got {n_grid}")
    steps = max(1, int(MOST_CLIP * n_grid))
    if metric == "mse" and gram is not None:
        found = _kernels.quantize_clipped(
            weight, gram, _kernel_grid(choice), steps, 1 - steps / n_grid
        )
    elif activations is not None:
        shares = np.array([1 - step / n_grid for step in range(steps)], np.float32)
        found = _clip_on_tokens(weight, activations, choice, find_metric(metric), shares)
    else:
        raise ValueError("activations: metrics other than mse need them; mse takes gram as well")
    return QuantizedTensor(**choice.fields(*found))


def _clip_on_tokens(
    weight: Float32, activations: Float32, choice: GridChoice, metric: Metric, shares: Float32
) -> tuple[NDArray[np.uint8], Float32, Float32]:
    """Search as for the gram, group by group, by what the metric makes of the outputs."""
    size = choice.group_size
    codes = np.zeros(weight.shape, np.uint8)
    scales, offsets = np.ones((2, len(weight), weight.shape[1] // size), np.float32)
    for group in range(scales.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        inputs = np.ascontiguousarray(activations[:, columns])
        for first in range(0, len(weight), CLIP_ROWS):
            here = slice(first, first + CLIP_ROWS)
            rows = np.ascontiguousarray(weight[here, columns])
            errors = _output_errors(rows, inputs, choice, metric)
            found = _kernels.quantize_clipped_by(rows, _kernel_grid(choice), shares, errors)
            codes[here, columns], scales[here, [group]], offsets[here, [group]] = found
    return codes, scales, offsets


def _output_errors(
    rows: Float32, inputs: Float32, choice: GridChoice, metric: Metric
) -> Callable[[NDArray[np.uint8], Float32, Float32], NDArray[np.float64]]:
    """Return what the metric makes of codes, scales and offsets for rows of one group."""
    reference = _outputs(inputs, rows)

    def errors(codes: NDArray[np.uint8], scales: Float32, offsets: Float32) -> NDArray[np.float64]:
        tensor = QuantizedTensor(**choice.fields(codes, scales, offsets))
        found = channel_errors(metric, reference, _outputs(inputs, tensor.dequantize()))
        return np.ascontiguousarray(found, np.float64)

    return errors


def _kernel_grid(choice: GridChoice) -> _kernels.Grid:
    if has_superblocks(choice.grid) or shares_rows(choice.grid):
        raise ValueError(
            f"grid: expected affine, zero_point or symmetric, got {choice.grid}, whose scales are fitted "
            "together"
        )
    return choice.kernel_grid


def _outputs(inputs: Float32, weight: Float32) -> Float32:
    """Return a layer's outputs; a product of NumPy's would have other bits on more threads."""
    outputs = np.empty((len(inputs), len(weight)), np.float32)
    _kernels.linear(inputs, weight, None, outputs, False)
    return outputs


def clip_solver(
    blocks: Sequence[NDArray[np.float32]],
    n_grid: int,
    metric: str | Metric = "mse",
    activations: NDArray[np.float32] | None = None,
) -> Solver:
    """Round to nearest in clipped ranges, by blocks on the gram's diagonal; see `quantize_clipped`.

    Where they have superblocks, scales are fitted by the diagonal instead."""

    def solve(
        weight: NDArray[Any], bits: int, size: int | None, grid: Grid, dtype: np.dtype[Any]
    ) -> QuantizedTensor:
        if fits_whole_rows(
            grid
        ):  # ranges of single groups are no choice where scales are fitted together
            importance = np.concatenate([gram.diagonal() for gram in blocks])
            return quantize_rtn(
                weight,
                bits,
                size,
                grid=grid,
                scale_dtype=dtype,
                grid_search=True,
                importance=importance,
            )
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


def searching_operations(out: int, channels: int) -> float:
    """Return how many floating-point operations a layer's searches take, for the forecast of the time."""
    return 9 * min(out, 128) * channels**2 + 3000.0 * out * channels


METHODS = (
    Method(
        "awq",
        "AWQ",
        rtn_solver,
        scales_first=True,
        clips=True,
        corrects=True,
        copies=1,
        operations=searching_operations,
    ),
    Method(
        "awq+gptq",
        "AWQ and GPTQ",
        gptq_solver,
        needs_gram=True,
        factors_gram=True,
        scales_first=True,
        corrects=True,
        operations=lambda out, channels: (
            searching_operations(out, channels) + solving_operations(out, channels)
        ),
    ),
)
