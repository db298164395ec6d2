"""Powers of two moved between the layers of a block, so that no weights are below the range of scales.

What a layer and the norm before it compute does not change if one is multiplied by a number and the other
divided by it (cross-layer equalization, Nagel et al. 2019, arXiv:1906.04721). With a power of two that is
exact."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.blocks.scaling import AwqOptions, ScaledBlock
from bitwright.grids.choice import GridChoice, smallest_scale
from bitwright.grids.tables import has_own_scales, has_superblocks
from bitwright.loading.model import Model
from bitwright.models.architecture import Attention
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.fold import FoldKind, fold_scale
from bitwright.models.layout import ScaleGroup, Stage
from bitwright.models.matrix_rows import piece_rows
from bitwright.models.operations import Float32

FLOAT16 = np.dtype(np.float16)
Pieces = Callable[
    [], Iterable[Float32]
]  # of a matrix, one after another, as often as they are wanted
COARSE = 64  # smallest scales; what has fewer of them has less than six bits
NORMAL = 2.0**-14  # the smallest number of full precision
MARGIN = 16
WIDTH = 6  # of a group's range, in root mean squares, to tell its scale by
LARGEST = 1024.0  # weight that another's gain may make; its scale is far from the end of float16
LARGEST_HALF = 2.0**15  # weight that groups have float16 scales and biases for, with some room
MOST_POWER = 60


@dataclass(frozen=True, eq=False)
class Equalized:
    """A block that computes the same with other weights.

    Parameters
    ----------
    block
        It.
    powers
        Of two, by which linears were multiplied, by name.
    scales
        What the inputs of stages are divided by, by the stage that reads them first.
    changed
        Names of the tensors in float that are no longer what they were.
    divided
        Names of the norms and linears that were divided.
    coarse
        Linears that no power was found for.
    """

    block: DecoderBlock
    powers: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[Stage, Float32] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    divided: tuple[str, ...] = ()
    coarse: frozenset[str] = frozenset()

    def scale(self, stage: Stage) -> Float32 | None:
        """Return what a stage's inputs are divided by, None for nothing."""
        return self.scales.get(first_reader(self.block.stages, stage))


def first_reader(stages: tuple[Stage, ...], stage: Stage) -> Stage:
    """Return the stage that a scale of a stage's inputs is kept under: the router, for what it reads."""
    routers = (each for each in stages if each.kind == "router")
    return next(routers, stage) if stage.reads_routed else stage


@dataclass
class _Size:
    """How large the weights of a matrix are, and should be for scales of full precision."""

    typical: float  # root mean square
    largest: float
    enough: float = 0.0  # typical size, for most scales to be of full precision
    wanted: float = 0.0  # for all of them
    coarse: bool = False

    @property
    def room(self) -> int:
        """The power of two that takes it to the wanted size; negative if it is larger."""
        if not (self.wanted and self.typical):
            return -MOST_POWER
        return math.ceil(math.log2(self.wanted / self.typical))

    @property
    def spare(self) -> int:
        """The power of two that it may be divided by."""
        if not self.enough:
            return MOST_POWER
        return math.floor(math.log2(self.typical / self.enough)) if self.typical else 0

    def move(self, power: int) -> None:
        self.typical = math.ldexp(self.typical, power)
        self.largest = math.ldexp(self.largest, power)
        self.coarse &= self.typical < self.enough * COARSE * smallest_scale(FLOAT16) / NORMAL


def is_coarse(weight: Float32 | Pieces, choice: GridChoice) -> bool:
    """Tell whether more than half of a layer's energy is in groups whose scales are coarse in float16."""
    limit = COARSE * smallest_scale(FLOAT16) * choice.steps / 2
    energy, count = 0.0, 0
    for part in _parts(weight):
        energy += _kernels.inner_product(part, part)
        count += part.size
    if energy > 2 * limit * limit * count:
        return False
    largest = _largest(weight)
    if largest == 0:
        return False
    in_small, total = 0.0, 0.0
    for part in _parts(weight):
        groups = np.abs(part).reshape(-1, choice.group_size)
        small = groups.max(axis=1) < limit
        groups /= np.float32(largest)
        energies = np.einsum("gi,gi->g", groups, groups)
        in_small += float(energies[small].sum())
        total += float(energies.sum())
    return in_small > 0.5 * total


def half_holds(weight: Float32 | Pieces, choice: GridChoice) -> bool:
    """Tell whether float16 scales can hold a layer, whose weights are neither too small nor too large."""
    return has_own_scales(choice.grid) or (
        _largest(weight) < LARGEST_HALF and not is_coarse(weight, choice)
    )


def _parts(weight: Float32 | Pieces) -> Iterable[Float32]:
    return (weight,) if isinstance(weight, np.ndarray) else weight()


def _largest(weight: Float32 | Pieces) -> float:
    return max(float(np.abs(part).max()) for part in _parts(weight))


def size_of(weight: Float32 | Pieces, choice: GridChoice | None = None) -> _Size:
    """Measure a matrix, whole or in pieces, and with a choice of grid what it should be."""
    largest = _largest(weight)
    unit = np.float32(largest or 1)
    squares, count = 0.0, 0
    for part in _parts(weight):
        squares += float(np.square(part / unit).mean()) * part.size
        count += part.size
    size = _Size(float(unit) * math.sqrt(squares / count), largest)
    if choice is not None:
        size.enough = NORMAL * choice.steps / WIDTH
        # A scale may be a code itself, times the number that is stored.
        parts = choice.scale_codes[1] if choice.scale_codes is not None else MARGIN
        size.wanted = size.enough * parts
        size.coarse = is_coarse(weight, choice)
    return size


def most_power(largest: float) -> int:
    """Return the power of two by which weights may be multiplied whose scales are not small."""
    return math.floor(math.log2(LARGEST / largest))


def has_float16_scales(choice: GridChoice) -> bool:
    """Tell whether the numbers that scales are made of are float16."""
    return choice.scale_dtype == FLOAT16 or has_superblocks(choice.grid)


def equalize(
    block: DecoderBlock,
    choices: Mapping[str, GridChoice],
    dtype_of: Callable[[str], np.dtype[Any]],
) -> Equalized:
    """Multiply linears whose weights are too small for float16 scales, and divide what is before them.

    Parameters
    ----------
    block
        In float; it is left as it is.
    choices
        The grid of every linear that will be quantized.
    dtype_of
        What a tensor of the block is stored in.

    Returns
    -------
    Equalized
        With the same block if nothing is too small.
    """
    read = block.weights.read
    known = {name: each for name, each in choices.items() if has_float16_scales(each)}
    coarse = {name for name, choice in known.items() if is_coarse(read(f"{name}.weight"), choice)}
    if not coarse:
        return Equalized(block)
    return _Equalizer(block, known, choices, dtype_of, coarse).equalized()


class _Equalizer:
    def __init__(
        self,
        block: DecoderBlock,
        known: Mapping[str, GridChoice],
        choices: Mapping[str, GridChoice],
        dtype_of: Callable[[str], np.dtype[Any]],
        coarse: set[str],
    ) -> None:
        self.scaled = ScaledBlock(block, {}, choices, dtype_of, Rotation(1, {}), AwqOptions())
        self.known = known
        self.choices = choices
        self.dtype_of = dtype_of
        self.coarse = coarse
        self.sizes: dict[str, _Size] = {}
        self.powers: dict[str, int] = {}
        self.divided: dict[str, None] = {}

    def equalized(self) -> Equalized:
        groups = self.scaled.block.layout.groups
        norms = [group for group in groups if group.kind != "linear"]
        for group in norms:  # what all readers lack is what the norm has
            if all(self._size(name).coarse for name in group.layers if self._is_live(name)):
                self._raise_readers(group)
        for group in groups:
            if group.kind == "linear":
                self._raise_either(group)
        self._raise_queries_or_keys()
        for group in norms:
            self._raise_readers(group)
        return Equalized(
            self.scaled.block,
            self.powers,
            self.scaled.scales,
            frozenset(self.scaled.changed),
            tuple(self.divided),
            frozenset(name for name in self.coarse if self.sizes[name].coarse),
        )

    def _is_live(self, name: str) -> bool:
        return name in self.known and self._size(name).largest > 0

    def _size(self, name: str) -> _Size:
        if name not in self.sizes:
            weight = self.scaled.block.weights.read(f"{name}.weight")
            size = self.sizes[name] = size_of(weight, self.known.get(name))
            size.coarse = name in self.coarse
        return self.sizes[name]

    def _raise_readers(self, group: ScaleGroup) -> None:
        """Multiply the readers of a norm."""
        power = max((self._need(name) for name in group.layers), default=0)
        if power <= 0:
            return
        largest = max(self._size(name).largest for name in (*group.layers, *group.floats))
        self._fold(group, min(power, most_power(largest)))

    def _raise_either(self, group: ScaleGroup) -> None:
        """Multiply what a linear reads another's outputs with, or the other, at the cost of its partner."""
        outputs = slice(None) if group.outputs is None else np.asarray(group.outputs)
        before = self._size(group.previous)
        if group.outputs is not None and before.coarse:
            before = size_of(
                self.scaled.block.weights.read(f"{group.previous}.weight")[outputs],
                self.known.get(group.previous),
            )
        after = self._size(group.layers[0])
        self._fold(group, balancing_power(before, after))

    def _raise_queries_or_keys(self) -> None:
        """Multiply queries and divide keys, or the other way: the scores stay what they are."""
        names = self.scaled.block.architecture.attention
        if not isinstance(names, Attention) or names.fused or names.query_norm or names.key_norm:
            return
        vectors = self.scaled.block.layout.vectors

        def holds(power: int) -> bool:
            return all(
                self._moves(tensor, sign * power)
                for sign, name in ((1, names.query), (-1, names.key))
                for tensor in (f"{name}.weight", f"{name}.bias")
                if tensor.endswith(".weight") or tensor in vectors
            )

        power = first_exact(balancing_power(self._size(names.key), self._size(names.query)), holds)
        for name, moved in ((names.query, power), (names.key, -power)) if power else ():
            self.scaled.multiply(name, 2.0**moved)
            self._move(name, moved)
            if moved < 0:
                self.divided[name] = None

    def _need(self, name: str) -> int:
        size = self._size(name) if name in self.known else None
        return size.room if size is not None and size.coarse else 0

    def _fold(self, group: ScaleGroup, power: int) -> None:
        """Multiply a group's layers by the largest power of two up to this one that changes nothing."""
        channels = self.scaled.channels(group)
        exact = first_exact(power, lambda each: self._is_exact(group, each)) if channels else 0
        if exact:
            self.scaled.fold(group, np.full(channels, 2.0**exact, np.float32))
            self.scaled.block.weights.clear()
            self._note(group, exact)

    def _note(self, group: ScaleGroup, power: int) -> None:
        moves = dict.fromkeys((*group.layers, *group.floats), power)
        if group.kind == "linear":
            moves[group.previous] = -power
        self.divided |= dict.fromkeys((group.previous,) if power > 0 else group.layers)
        for name, moved in moves.items():
            self._move(name, moved)

    def _move(self, name: str, power: int) -> None:
        self._size(name).move(power)
        if name in self.choices:
            self.powers[name] = self.powers.get(name, 0) + power

    def _is_exact(self, group: ScaleGroup, power: int) -> bool:
        """Tell whether every number that is multiplied or divided stays the same number of its dtype."""
        name, bias = f"{group.previous}.weight", f"{group.previous}.bias"
        if group.kind != "linear":
            gain = self.scaled.block.weights.read(name)
            if not gain_is_exact(group.kind, gain, power, self.dtype_of(name)):
                return False
        elif not self._moves(name, -power):
            return False
        if bias in self.scaled.block.layout.vectors and not self._moves(bias, -power):
            return False
        return all(self._moves(f"{each}.weight", power) for each in (*group.layers, *group.floats))

    def _moves(self, name: str, power: int) -> bool:
        array = self.scaled.block.weights.read(name)
        planned = name.removesuffix(".weight") in self.choices
        return moves_exactly(array, power, np.dtype(np.float32) if planned else self.dtype_of(name))


def balancing_power(before: _Size, after: _Size) -> int:
    """Return the power of two to multiply `after` and divide `before` by, so that both are large enough."""
    for sign, small, other in ((1, after, before), (-1, before, after)):
        power = min(small.room, other.spare)
        if small.coarse and power > 0:
            return sign * power
    return 0


def first_exact(power: int, is_exact: Callable[[int], bool]) -> int:
    """Return the largest power up to this one, or down to it if that is negative, that is exact."""
    step = -1 if power > 0 else 1
    return next(filter(is_exact, range(max(-MOST_POWER, min(power, MOST_POWER)), 0, step)), 0)


def moves_exactly(array: Float32, power: int, dtype: np.dtype[Any]) -> bool:
    """Tell whether an array times two to a power is exact in a dtype, and in float32."""
    with np.errstate(over="ignore", under="ignore"):
        moved = np.ldexp(array, power)
        stored = moved.astype(dtype).astype(np.float32)
    return bool(np.array_equal(stored, moved) and np.array_equal(np.ldexp(stored, -power), array))


def gain_is_exact(kind: FoldKind, gain: Float32, power: int, dtype: np.dtype[Any]) -> bool:
    """Tell whether a norm whose weight was divided by two to a power multiplies by exactly as much less."""
    one = np.float32(1 if kind == "offset_rms_norm" else 0)
    scale = np.full(gain.shape, 2.0**power, np.float32)
    folded = fold_scale(kind, scale, gain, None, dtype)[0]
    divided = (gain + one) / scale
    return bool(
        np.array_equal(folded + one, divided) and np.array_equal(divided * scale, gain + one)
    )


def equalize_head(
    model: Model, choice: GridChoice
) -> tuple[int, dict[str, NDArray[np.float32]], bool]:
    """Do as `equalize` does with the head and the norm before it.

    Returns
    -------
    power
        Of two, to multiply the head by.
    changed
        The norm's tensors.
    coarse
        Whether the head is too small and no power was found.
    """
    if not has_float16_scales(choice):
        return 0, {}, False
    matrix, step = model.rows(model.head_name), piece_rows(model.config.hidden_size)

    def pieces() -> Iterator[Float32]:
        count = model.config.vocab_size
        for first in range(0, count, step):
            yield matrix.floats(slice(first, min(first + step, count)))

    if not is_coarse(pieces, choice):
        return 0, {}, False
    size = size_of(pieces, choice)
    kind, norm = model.architecture.norm_kind, model.names.final_norm
    operations = model.final_operations()
    gain, bias = operations.weights[f"{norm}.weight"], operations.bias(norm)
    dtype = model.stored_dtype(f"{norm}.weight")

    def holds(power: int) -> bool:
        exact = bias is None or moves_exactly(bias, -power, model.stored_dtype(f"{norm}.bias"))
        return exact and gain_is_exact(kind, gain, power, dtype)

    # A tied head is the embedding, too, which nothing comes before.
    power = 0 if model.tied else first_exact(size.room, holds)
    if not power:
        return 0, {}, True
    scale = np.full(gain.shape, 2.0**power, np.float32)
    gain, moved, _ = fold_scale(kind, scale, gain, bias, dtype)
    changed = {f"{norm}.weight": gain} | ({} if moved is None else {f"{norm}.bias": moved})
    size.move(power)
    return power, changed, size.coarse
