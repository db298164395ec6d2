"""The choice of precisions by sensitivities, within a size."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.checkpoint.fingerprint import model_checksum, model_fingerprint
from bitwright.checkpoint.hub import finds_models
from bitwright.errors import SensitivityError, check_choice
from bitwright.files.home import expands_home
from bitwright.formats import FORMATS, Format, FormatName, Precision
from bitwright.formats.engine_names import fused_groups
from bitwright.grids.tables import TABLES
from bitwright.grids.tensor import Grid, stored_bits
from bitwright.loading.model import Model, load_model
from bitwright.methods.rtn import quantize_rtn
from bitwright.precision.allocation import allocate, check_target
from bitwright.precision.recipe import Recipe, check_candidates
from bitwright.precision.sensitivities import Sensitivities

USUAL_BITS = (3, 4, 5)  # of the candidates, where a format has them and the target lies among them
WINDOW = 3  # default candidates
ERROR_ROWS = 64  # of each weight, on which candidates are compared
LEAST_SHARE = 1e-3  # of the median alignment, for layers whose own is not positive
Candidate = tuple[int, int | None]


@expands_home
@finds_models
def choose_precisions(
    model: str | os.PathLike[str] | Model,
    sensitivities: Sensitivities,
    target_bpw: float,
    candidates: Sequence[Candidate] | None = None,
    *,
    format: FormatName = "mlx",
    grid: Grid | None = None,
    scale_dtype: DTypeLike | None = None,
    allow_unfused: bool = False,
) -> Recipe:
    """Choose a precision for every layer so that they take no more than a target together.

    What a layer adds to the divergence in low precision is half its alignment; in another precision it is
    taken to shrink as the rounding error of its weights does. Layers that a format or its engines must
    store alike get one precision: experts in one tensor (mlx), and what vLLM fuses (gptq,
    compressed-tensors).

    Parameters
    ----------
    model
        The original.
    sensitivities
        Of this model.
    target_bpw
        Bits per weight over the layers in the blocks, scales and biases or zeros included.
    candidates
        ``(bits, group_size)`` to choose from; group size None or -1 is the whole row. By default three
        precisions that the format stores and that have the target among them: 3, 4 and 5 bits where they
        do, otherwise those nearest to it.
    format, grid, scale_dtype
        How it will be stored; they decide what scales take.
    allow_unfused
        Choose for each layer by itself what vLLM fuses; it then refuses the result.

    Returns
    -------
    Recipe

    Raises
    ------
    SensitivityError
        If the sensitivities are those of another model.
    ValueError
        If the target is out of reach, which the message tells, or a candidate cannot be stored.

    Examples
    --------
    >>> import bitwright
    >>> demo = bitwright.demo_folder()
    >>> found = bitwright.estimate_sensitivities(
    ...     demo, demo / "calibration.txt", samples=4, length=64, progress=False
    ... )
    >>> recipe = bitwright.choose_precisions(demo, found, 4.5, [(3, 64), (5, 64)])
    >>> recipe.layers["model.layers.0.self_attn.v_proj"]
    (5, 64)
    """
    original = model if isinstance(model, Model) else load_model(model)
    check_model(sensitivities, original)
    choices = dynamic_choices(original, target_bpw, candidates, format, grid, scale_dtype)
    kind, shapes = FORMATS[format], original.linear_shapes()
    total = _weights(shapes).sum()
    sizes = dict(zip(shapes, _sizes(shapes, choices), strict=True))
    places = {candidate: column for column, candidate in enumerate(choices.candidates)}

    def taken(name: str, candidate: Candidate) -> float:
        return float(sizes[name][places[candidate]])

    layers = allocated(
        *(original, sensitivities, choices, kind, target_bpw * total),
        allow_unfused=allow_unfused,
        taken=taken,
    )
    reached = sum(taken(name, each) for name, each in layers.items()) / total
    return Recipe(layers, target_bpw, float(reached))


@dataclass(frozen=True)
class Item:
    """A matrix outside the blocks that a precision is chosen for, too.

    Parameters
    ----------
    name
        Its full name.
    costs, sizes
        What each candidate adds to the divergence, and takes of the budget.
    candidates
        From coarse to fine.
    """

    name: str
    costs: Sequence[float]
    sizes: Sequence[float]
    candidates: Sequence[Candidate]


def allocated(
    original: Model,
    sensitivities: Sensitivities,
    choices: "Choices",
    kind: type[Format],
    budget: float,
    *,
    taken: Callable[[str, Candidate], float],
    allow_unfused: bool = False,
    only: Collection[str] | None = None,
    more: Sequence[Item] = (),
) -> dict[str, Candidate]:
    """Choose a precision for every layer, or for some, so that together they take no more than a budget.

    Parameters
    ----------
    original, sensitivities, choices, kind, allow_unfused
        See `choose_precisions`.
    budget
        What all of them may take.
    taken
        Returns what a layer takes of it in a precision.
    only
        The layers to choose for; by default all.
    more
        What is to be chosen for beside them.
    """
    shapes = {
        name: shape
        for name, shape in original.linear_shapes().items()
        if only is None or name in only
    }
    low_grid: Grid = "affine" if choices.grid == "k" else choices.grid  # k has its own group sizes
    sizes = np.array(
        [[taken(name, each) for each in choices.candidates] for name in shapes], np.float64
    ).reshape(len(shapes), -1)
    errors = np.empty_like(sizes)
    for row, (name, shape) in enumerate(shapes.items()):
        matrix = original.weight(name, shape)
        some = np.ascontiguousarray(matrix[:: -(-len(matrix) // ERROR_ROWS)])
        low_error = rounding_error(some, sensitivities.low, low_grid)
        for column, candidate in enumerate(choices.candidates):
            error = rounding_error(some, candidate, choices.grid)
            errors[row, column] = error / low_error if low_error > 0 else 0.0
    alignments = np.array([sensitivities.alignments[name] for name in shapes])
    positive = alignments[alignments > 0]
    least = LEAST_SHARE * float(np.median(positive)) if positive.size else 1.0
    costs = 0.5 * np.maximum(alignments, least)[:, None] * errors
    moving = _moving_together(original, kind, allow_unfused)
    groups = [[name for name in group if name in shapes] for group in moving]
    groups = [group for group in groups if group]
    places = {name: row for row, name in enumerate(shapes)}
    rows = [[places[name] for name in group] for group in groups]
    width = max([len(choices.candidates), *(len(each.candidates) for each in more)])

    def padded(values: ArrayLike) -> NDArray[np.float64]:
        """Repeat the last candidate, which is as good as that."""
        found = np.asarray(values, np.float64)
        return np.concatenate([found, np.full(width - len(found), found[-1])])

    picked = allocate(
        [
            *(padded(costs[group].sum(axis=0)) for group in rows),
            *(padded(each.costs) for each in more),
        ],
        [
            *(padded(sizes[group].sum(axis=0)) for group in rows),
            *(padded(each.sizes) for each in more),
        ],
        budget,
    )
    found: dict[str, Candidate] = {}
    for group, column in zip(groups, picked, strict=False):
        chosen = choices.candidates[min(column, len(choices.candidates) - 1)]
        found |= dict.fromkeys(group, chosen)
    layers = {name: found[name] for name in shapes}
    for each, column in zip(more, picked[len(groups) :], strict=True):
        layers[each.name] = each.candidates[min(column, len(each.candidates) - 1)]
    return layers


@dataclass(frozen=True)
class Choices:
    """Precisions to choose from for each layer: all on one grid, with scales of one dtype."""

    candidates: tuple[Candidate, ...]
    grid: Grid
    scale_dtype: np.dtype[Any]

    @property
    def ends(self) -> tuple[Candidate, Candidate]:
        """The coarsest and the finest."""
        return min(self.candidates, key=fineness), max(self.candidates, key=fineness)


def dynamic_choices(
    model: Model,
    target_bpw: float,
    candidates: Sequence[Candidate] | None,
    format: FormatName,
    grid: Grid | None = None,
    scale_dtype: DTypeLike | None = None,
    nearest: bool = False,
) -> Choices:
    """Return the precisions to choose from, from shapes alone; see `choose_precisions`. With `nearest` a
    target out of reach gives those that come nearest to it.

    Raises
    ------
    ValueError
        If the format cannot store one of them, or the target is out of their reach.
    """
    check_choice("format", format, FORMATS)
    kind, shapes = FORMATS[format], model.linear_shapes()
    given = [(bits, None if size == -1 else size) for bits, size in candidates or ()]
    chosen = tuple(dict.fromkeys(given))
    if candidates is not None and not chosen:
        raise ValueError("candidates: none given")
    if kind.one_precision and len(chosen) != 1:
        several = ", ".join(each.name for each in FORMATS.values() if not each.one_precision)
        raise ValueError(
            f"format: {format} has one precision for all layers, so there is nothing to choose. Quantize "
            f"to it with bitwright quantize (preset best trains its scales, too), or choose a format with "
            f"several: {several}"
        )
    check_choice("grid", grid or kind.grids[0], kind.grids)
    dtype = kind.chosen_scale_dtype(model.dtype, scale_dtype)
    if not chosen:
        return _default_choices(kind, shapes, target_bpw, grid, dtype, nearest)
    first = grid or kind.default_grid(max(bits for bits, _ in chosen), model.input_channels())
    possible = [
        each
        for each in ([first] if grid else [first, *kind.grids])
        if all(_is_stored(kind, shapes, Precision(*one, each)) for one in chosen)
    ]
    if not possible:
        # This says why.
        check_candidates((Precision(*each, first) for each in chosen), shapes, kind)
    choices = Choices(chosen, possible[0], dtype)
    if not nearest:
        check_target(target_bpw, *_reach(shapes, choices))
    return choices


def _default_choices(
    kind: type[Format],
    shapes: Mapping[str, tuple[int, int]],
    target_bpw: float,
    grid: Grid | None,
    dtype: np.dtype[Any],
    nearest: bool,
) -> Choices:
    reaches, known = [], []
    # Tables have one precision each, of which nothing can be chosen.
    for each in [grid] if grid else [known for known in kind.grids if known not in TABLES]:
        ladder: list[Candidate] = []
        for bits in sorted(kind.bits):
            usual = kind.default_group_size(bits, each)
            sizes = [usual, *sorted((s for s in kind.group_sizes if s < usual), reverse=True)]
            stored = (s for s in sizes if _is_stored(kind, shapes, Precision(bits, s, each)))
            size = next(stored, None)
            if size is not None:
                ladder.append((bits, size))
        usual_ones = [candidate for candidate in ladder if candidate[0] in USUAL_BITS]
        windows = [ladder[i : i + WINDOW] for i in range(max(1, len(ladder) - WINDOW + 1))]
        if len(usual_ones) == len(USUAL_BITS):
            windows.insert(0, usual_ones)
        found = []
        for window in filter(None, windows):
            choices = Choices(tuple(window), each, dtype)
            least, most = _reach(shapes, choices)
            reaches += [least, most]
            known.append((least, most, choices))
            with suppress(ValueError):
                check_target(target_bpw, least, most)
                if window is usual_ones:
                    return choices
                found.append((abs(target_bpw - (least + most) / 2), choices))
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    if not reaches:
        raise ValueError(
            f"candidates: the {kind.name} format has no precision that fits all layers; leave those that "
            f"it does not fit in float, with bitwright quantize --exclude"
        )
    if nearest:
        lowest = min(known, key=lambda each: each[0])
        return lowest[2] if target_bpw < lowest[0] else max(known, key=lambda each: each[1])[2]
    raise ValueError(
        f"target_bpw: {target_bpw:g} bits per weight is out of reach; the {kind.name} format reaches from "
        f"{min(reaches):.4g} to {max(reaches):.4g} over the quantized layers by default, scales included"
    )


def _is_stored(
    kind: type[Format], shapes: Mapping[str, tuple[int, int]], precision: Precision
) -> bool:
    return all(kind.stores(shape, precision) for shape in set(shapes.values()))


def _weights(shapes: Mapping[str, tuple[int, int]]) -> NDArray[np.float64]:
    return np.array([float(np.prod(shape)) for shape in shapes.values()])


def _sizes(shapes: Mapping[str, tuple[int, int]], choices: Choices) -> NDArray[np.float64]:
    """Return the bits ``[layers, candidates]`` that they take."""
    per_weight = [
        [
            stored_bits(bits, size or channels, choices.grid, choices.scale_dtype)
            for bits, size in choices.candidates
        ]
        for _, channels in shapes.values()
    ]
    return np.array(per_weight) * _weights(shapes)[:, None]


def _reach(shapes: Mapping[str, tuple[int, int]], choices: Choices) -> tuple[float, float]:
    """Return the fewest and the most bits per weight that all layers together can have."""
    sizes, total = _sizes(shapes, choices), _weights(shapes).sum()
    return float(sizes.min(axis=1).sum() / total), float(sizes.max(axis=1).sum() / total)


def check_model(sensitivities: Sensitivities, model: Model) -> None:
    known = sensitivities.model == model_fingerprint(model.checkpoint)
    if known and sensitivities.checksum is not None:
        known = sensitivities.checksum == model_checksum(model.checkpoint)
    if not known or set(model.linear_shapes()) != set(sensitivities.alignments):
        raise SensitivityError(
            f"sensitivities: are not those of {model.checkpoint.folder}; estimate them again"
        )


def fineness(candidate: Candidate) -> tuple[int, float]:
    """Return the sort key of candidates, from coarse to fine."""
    bits, size = candidate
    return bits, 1 / size if size else 0.0


def rounding_error(weight: np.ndarray[Any, Any], candidate: Candidate, grid: Grid) -> float:
    """Return the squared error of a matrix that is rounded."""
    change = quantize_rtn(weight, *candidate, grid=grid).dequantize() - weight
    return _kernels.inner_product(change, change)


def _moving_together(model: Model, kind: type[Format], allow_unfused: bool) -> list[list[str]]:
    """Return all layers in groups of those that must have one precision."""
    names = model.linear_shapes()
    if kind.fuses_shared_inputs and not allow_unfused:
        return [list(parts) for parts in fused_groups(names).values()]
    groups: dict[str, list[str]] = {}
    for name in names:
        place = model.experts.get(name) if kind.stacks_experts else None
        groups.setdefault(name if place is None else place.stacked_name, []).append(name)
    return list(groups.values())
