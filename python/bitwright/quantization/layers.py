"""The layers of a model, quantized one by one as a plan and a method say."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitwright import _kernels
from bitwright.blocks.drift import Drift
from bitwright.blocks.equalizing import Equalized, equalize, equalize_head, half_holds
from bitwright.blocks.output_metrics import OutputMetrics
from bitwright.blocks.scaling import AwqOptions, ScaledBlock, StageFacts
from bitwright.errors import BitwrightError
from bitwright.formats import Precision
from bitwright.grids.choice import GridChoice
from bitwright.grids.tables import fits_all_rows
from bitwright.grids.tensor import Grid, QuantizedTensor
from bitwright.loading.model import Model
from bitwright.methods.method import MethodOptions, Solver, StageInputs
from bitwright.methods.refined import refined
from bitwright.methods.rtn import rtn_solver
from bitwright.methods.two_sided import METRIC_ROWS
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.matrix_rows import MatrixRows, solved_rows
from bitwright.models.operations import Float32
from bitwright.precision.target import Target
from bitwright.process.memory import give_back
from bitwright.quantization.output import (
    Output,
    QuantizedLayer,
    energies_of_sample,
    error_energies,
    sampled_rows,
    summed,
)
from bitwright.quantization.small_weights import MOST_LOST, largest_of, require_kept
from bitwright.ranks import ROWS, current
from bitwright.statistics.imatrix import ModelImportance

Piece = tuple[slice, Float32]  # rows of a layer, and their weights
# Of weights: as they are, as they are stored, and as they were stored before.
Sample = tuple[Float32, Float32, Float32 | None]
Finish = Callable[[QuantizedLayer], None]


@dataclass(frozen=True, eq=False)
class MatrixPieces:
    """Pieces of an embedding or a head, times two to a power; each is read when it is its turn."""

    matrix: MatrixRows
    rows: Sequence[slice]
    power: int = 0

    def __iter__(self) -> Iterator[Piece]:
        for rows in self.rows:
            yield rows, self.floats(rows)

    def floats(self, rows: slice) -> Float32:
        """Return some rows."""
        weight = self.matrix.floats(rows)
        return np.ldexp(weight, self.power) if self.power else weight


@dataclass(frozen=True, eq=False)
class OwnSolver:
    """How to quantize a layer, or what is taken for it, and the gram that its error is reported by."""

    method: Solver | QuantizedTensor
    gram: Float32 | None

    def before(self, rows: slice) -> Float32 | None:
        """Return the weights of quantized rows that are taken over; None of a method."""
        if not isinstance(self.method, QuantizedTensor):
            return None
        return self.method.rows(rows.start, rows.stop).dequantize()

    def of(self, rows: slice) -> Solver:
        """Return how to quantize some of the layer's rows."""
        if not isinstance(self.method, QuantizedTensor):
            return self.method
        known = self.method.rows(rows.start, rows.stop)

        def solve(_: Any, bits: int, size: int | None, grid: Grid, dtype: Any) -> QuantizedTensor:
            # Symmetric by chance, among layers that are not.
            return replace(known, grid=grid) if grid == "zero_point" else known

        return solve


class Layers:
    """Quantizes the layers of a model and hands them on.

    Parameters
    ----------
    model
        In float.
    target
        What they are stored in.
    options, awq
        How they are quantized.
    output
        Where they go.
    quantized
        A quantized form of the model whose layers are taken as they are, in place of a method's.
    metrics
        Of the layers' outputs, in which they are refined, too.
    importance
        Of the inputs of layers of which nothing else is known.
    """

    def __init__(
        self,
        model: Model,
        target: Target,
        options: MethodOptions,
        awq: AwqOptions,
        output: Output,
        quantized: Model | None = None,
        metrics: OutputMetrics | None = None,
        importance: ModelImportance | None = None,
    ) -> None:
        self.model = model
        self.target = target
        self.options = options
        self.awq = awq if options.method.scales_first else None
        self.output = output
        self.ranks = current()
        self.changed: dict[str, Float32] = {}  # float tensors into which scales were folded
        self._quantized = quantized
        self._metrics = metrics
        self._importance = importance
        # Of the layers in this block: the powers of two by which they were multiplied, and those whose
        # weights are small for the dtype of scales all the same.
        self._powers: dict[str, int] = {}
        self._coarse: set[str] = set()
        self._wide: set[str] = set()  # those whose scales float16 cannot hold

    def is_planned(self, name: str) -> bool:
        """Tell whether a layer is quantized, by its full name."""
        return self.target.is_planned(name)

    def plans_any(self, prefix: str, names: Iterable[str]) -> bool:
        """Tell whether any of a block's layers is quantized."""
        return any(self.is_planned(prefix + name) for name in names)

    def method_solver(self, inputs: StageInputs) -> OwnSolver:
        """Return how the method quantizes layers with some inputs."""
        return OwnSolver(self.options.solver(inputs), inputs.gram)

    def known_solver(self, name: str, gram: Float32 | None) -> OwnSolver | None:
        """Return what takes a layer of the model that is quantized already."""
        if self._quantized is None:
            return None
        if name == self.model.names.embedding:
            name = self._quantized.embedding_name
        tensor = self._quantized.quantized(name)
        return None if tensor is None else OwnSolver(tensor, gram)

    def own_solver(self, name: str, gram: Float32 | None) -> OwnSolver:
        """Return how to quantize one layer: as it is known, or by the method."""
        return self.known_solver(name, gram) or self.method_solver(StageInputs(gram))

    def rounding(self) -> OwnSolver:
        """Return how to quantize a layer of whose inputs nothing is known."""
        return OwnSolver(rtn_solver(StageInputs(), self.options), None)

    def weighted(self, name: str, scale: Float32 | None = None) -> OwnSolver | None:
        """Return how to round a layer by an importance matrix, whose inputs are divided by a scale; None
        where there is none. It is the diagonal of the gram: every method has the same codes then."""
        known = None if self._importance is None else self._importance.of(name)
        if known is None:
            return None
        importance = known if scale is None else (known / np.square(scale)).astype(np.float32)
        options = self.options
        if options.grid_search is None:
            options = replace(options, grid_search=True)
        return OwnSolver(rtn_solver(StageInputs(importance=importance), options), None)

    def grid_choices(self, block: DecoderBlock, prefix: str) -> dict[str, GridChoice]:
        """Return the grid of each linear as AWQ's search rounds to it: with a search for ranges where one
        will follow."""
        choices = {}
        for stage in block.stages:
            for name in stage.linears:
                precision = self.target.plan[prefix + name]
                if precision is not None:
                    shape = block.layout.linears[name]
                    choices[name] = self._grid_choice(prefix + name, precision, shape)
        return choices

    def scaled_block(
        self, block: DecoderBlock, prefix: str, facts: Mapping[Stage, StageFacts], rope: Rotation
    ) -> ScaledBlock:
        """Return a block whose scales AWQ searches, given what its stages read and the rotary tables."""
        assert self.awq is not None
        return ScaledBlock(
            block,
            facts,
            self.grid_choices(block, prefix),
            lambda name: self.model.stored_dtype(prefix + name),
            rope,
            self.awq,
        )

    def take_scales(self, prefix: str, scaled: ScaledBlock) -> None:
        """Note the float tensors that AWQ's scales were folded into."""
        self.changed.update(
            (prefix + name, scaled.block.weights.read(name)) for name in scaled.changed
        )

    def equalized(self, block: DecoderBlock, prefix: str) -> Equalized:
        """Return a block whose weights scales can be stored for, which computes the same."""
        if self._quantized is not None:  # its codes are those of the weights as they are
            return Equalized(block)
        if self.target.wider_dtype is not None:
            self._wide = self._found_wide(block, prefix)
            return Equalized(block)
        found = equalize(
            block,
            self.grid_choices(block, prefix),
            lambda name: self.model.stored_dtype(prefix + name),
        )
        self.changed.update((prefix + name, found.block.weights[name]) for name in found.changed)
        found.block.weights.clear()
        self.output.divided += [prefix + name for name in found.divided]
        self._powers = {prefix + name: power for name, power in found.powers.items()}
        self._coarse = {prefix + name for name in found.coarse}
        return found

    def _found_wide(self, block: DecoderBlock, prefix: str) -> set[str]:
        """Return the layers of a block whose scales float16 cannot hold, with all of a stack of experts."""
        self._wide = set()
        choices = self.grid_choices(block, prefix)
        found = {
            prefix + name
            for name, choice in choices.items()
            if not half_holds(block.weights.read(f"{name}.weight"), choice)
        }
        block.weights.clear()
        return self.output.with_stacks(found, (prefix + name for name in choices))

    def equalized_head(self, name: str) -> int:
        """Return by which power of two the head is multiplied, and its norm divided."""
        precision = self.target.plan[name]
        if self._quantized is not None or precision is None or self.target.wider_dtype is not None:
            return 0
        shape = self.model.table_shape
        choice = self._grid_choice(name, precision, shape)
        power, changed, coarse = equalize_head(self.model, choice)
        self.changed.update(changed)
        self.output.divided += [self.model.names.final_norm] if power else []
        self._powers = {name: power}
        self._coarse = {name} if coarse else set()
        return power

    def quantize_stage(
        self,
        block: DecoderBlock,
        prefix: str,
        stage: Stage,
        gram: Float32 | None,
        finish: Finish,
        own_solver: Callable[[str], OwnSolver | None],
        *,
        replace: bool = False,
        few_tokens: bool = False,
        drift: Drift | None = None,
    ) -> None:
        """Quantize what is planned of a stage; `replace` the block's weights by what is stored."""
        planned = {name: self.target.plan[prefix + name] for name in stage.linears}
        pieces: dict[str, list[Piece]] = {}
        for name, precision in planned.items():
            if precision is not None:
                place = f"{name}.weight"
                weight = block.weights[place]
                if replace:
                    del block.weights[place]
                pieces[name] = self._pieces(weight, precision)
                del weight
                if drift is not None and gram is not None:
                    pieces[name] = [
                        (rows, drift.corrected(part, gram, rows)) for rows, part in pieces[name]
                    ]
        if drift is not None:
            drift.forget()
        shared = None
        for name, precision in planned.items():
            if precision is None:
                continue
            own = own_solver(name) or self.known_solver(prefix + name, gram) or shared
            if own is None:
                own = shared = self.method_solver(StageInputs(gram))
            tensor, stored = self._quantize(
                prefix + name, pieces.pop(name), own, precision, finish, few_tokens
            )
            if replace:
                block.weights[f"{name}.weight"] = tensor.dequantize() if stored is None else stored

    def quantize_matrix(self, name: str, source: str, own: OwnSolver, power: int = 0) -> MatrixRows:
        """Quantize embedding or head, times two to a power; return the rows that a reader will see.

        `source` is the layer's name in the original. The matrix is never all in float32 unless all its rows
        are looked at together."""
        precision = self.target.plan[name]
        assert precision is not None
        if self.target.wider_dtype is not None:
            matrix = self.model.rows(source)
            choice = self._grid_choice(name, precision, matrix.shape)
            rows = self._matrix_pieces(source, 0, False)
            held = all(half_holds(each, choice) for _, each in rows)
            self._wide = set() if all(self.ranks.gather(held)) else {name}
        pieces = self._matrix_pieces(source, power, self._is_whole(precision))
        tensor, _ = self._quantize(name, pieces, own, precision, self.output.finish)
        return MatrixRows(tensor.dequantize, tensor.shape, f"layer {name}")

    def output_error(self, layer: QuantizedLayer, weight: Float32, gram: Float32) -> float:
        """Return tr(Δ G Δᵀ), each rank adding up its share of the rows."""
        errors = []
        for rows in self.ranks.rows(len(weight)):
            change = layer.tensor.rows(rows.start, rows.stop).dequantize()
            change -= weight[rows]
            errors.append(float(_kernels.row_quadratic_forms(change, gram).sum()))
        return self.ranks.total(errors)

    def _scale_dtype(self, name: str) -> np.dtype[Any]:
        wider = self.target.wider_dtype
        return wider if wider is not None and name in self._wide else self.target.scale_dtype

    def _grid_choice(self, name: str, precision: Precision, shape: tuple[int, int]) -> GridChoice:
        if self.options.method.clips:
            # Also for the linears that are not clipped: scales chosen so are better (docs/experiments.md).
            ranges = self.awq is not None and self.awq.clip != "none"
        else:
            ranges = self.options.grid_search is not False
        return GridChoice.check(
            np.broadcast_to(np.float32(0), shape),
            precision.bits,
            precision.group_size,
            precision.grid,
            self._scale_dtype(name),
            ranges,
        )

    def _is_whole(self, precision: Precision) -> bool:
        """Tell whether the method or the grid looks at all rows of a layer together."""
        return self.options.method.whole_layers or fits_all_rows(precision.grid)

    def _pieces(self, weight: Float32, precision: Precision) -> list[Piece]:
        """Return this rank's pieces of a layer: all rows where these are looked at together."""
        whole = self._is_whole(precision)
        unit = ROWS if self._metrics is None else METRIC_ROWS  # whole blocks of a metric
        pieces = [slice(0, len(weight))] if whole else self.ranks.rows(len(weight), unit)
        return [(rows, weight[rows]) for rows in pieces]

    def _matrix_pieces(self, source: str, power: int, whole: bool) -> MatrixPieces:
        """Return this rank's pieces of the embedding or the head."""
        matrix = self.model.rows(source)
        count, width = matrix.shape
        if whole:
            return MatrixPieces(matrix, [slice(0, count)], power)
        step = solved_rows(width)
        rows = [
            slice(first, min(first + step, mine.stop))
            for mine in self.ranks.rows(count)
            for first in range(mine.start, mine.stop, step)
        ]
        return MatrixPieces(matrix, rows, power)

    def _quantize(
        self,
        name: str,
        pieces: list[Piece] | MatrixPieces,
        own: OwnSolver,
        precision: Precision,
        finish: Finish,
        few_tokens: bool = False,
    ) -> tuple[QuantizedTensor, Float32 | None]:
        """Quantize this rank's rows of a layer and hand on all of it; return that, and the weights that a
        reader will see where there was one piece."""
        shared = self.ranks.size > 1 and not self._is_whole(precision)
        own_rows = pieces.rows if isinstance(pieces, MatrixPieces) else [rows for rows, _ in pieces]
        last = max((rows.stop for rows in own_rows), default=0)
        out = max(self.ranks.gather(last)) if shared else last
        parts, stored = [], None
        samples: list[Sample] = []
        metric = None if self._metrics is None else self._metrics.of(name)

        def solve(rows: slice, weight: Float32) -> QuantizedTensor:
            part = None if metric is None else metric[rows]
            return refined(own.of(rows), own.gram, self.options, part)(
                weight,
                precision.bits,
                precision.group_size,
                precision.grid,
                self._scale_dtype(name),
            )

        for rows, weight in pieces:
            try:
                part = solve(rows, weight)
            except BitwrightError:
                raise
            except ValueError as error:
                folder = self.model.checkpoint.folder
                raise ValueError(f"{folder}: layer {name}: {error}") from error
            parts.append(part)
            stored = part.dequantize()
            chosen = sampled_rows(rows.start, out)
            known = own.before(rows)
            taken = None if known is None else known[chosen].copy()
            samples.append((weight[chosen].copy(), stored[chosen].copy(), taken))
            del weight, known  # before there is the next piece
        energies, before = self._energies(samples, own.gram)
        if shared:
            before = [each for others in self.ranks.gather(before) for each in others]
            parts = [part for each in self.ranks.gather(parts) for part in each]
            energies = [pair for each in self.ranks.gather(energies) for pair in each]
        if not parts:
            raise ValueError(f"{self.model.checkpoint.folder}: layer {name}: has no rows")
        tensor = parts[0]
        if len(parts) > 1:
            tensor, stored = QuantizedTensor.joined(parts), None
        del parts
        relative = summed(energies)
        if relative > MOST_LOST and not isinstance(own.method, QuantizedTensor):
            self._require_kept(name, pieces, solve, own.gram, tensor, relative, out)
        power, coarse = self._powers.get(name, 0), name in self._coarse
        error_before = summed(before) if before else None
        wide = name in self._wide
        finish(
            QuantizedLayer(name, tensor, relative, few_tokens, power, coarse, error_before, wide)
        )
        if isinstance(pieces, MatrixPieces):
            give_back()  # the heap has kept the room of pieces, and of what was written
        return tensor, stored

    def _energies(
        self, samples: list[Sample], gram: Float32 | None
    ) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Return `error_energies` of what is stored, and of what was before, from the chosen rows of this
        rank's pieces: of each by itself where sums must have the same terms on any number of ranks."""
        groups = [[each] for each in samples] if self.ranks.fixed_order else [samples]
        found, before = [], []
        for group in filter(None, groups):
            weight = np.concatenate([each[0] for each in group])
            found.append(energies_of_sample(weight, np.concatenate([s[1] for s in group]), gram))
            known = [each[2] for each in group if each[2] is not None]
            if known:
                before.append(energies_of_sample(weight, np.concatenate(known), gram))
        return found, before

    def _require_kept(
        self,
        name: str,
        pieces: list[Piece] | MatrixPieces,
        solve: Callable[[slice, Float32], QuantizedTensor],
        gram: Float32 | None,
        tensor: QuantizedTensor,
        lost: float,
        out: int,
    ) -> None:
        """Raise ValueError if a layer loses most of its energy because scales cannot be so small."""

        def lost_if_raised(power: int) -> float:
            energies = []
            for rows, weight in pieces:
                raised = np.ldexp(weight, power)
                found = solve(rows, raised).dequantize()
                energies.append(error_energies(raised, found, gram, rows.start, out))
            return summed([pair for each in self.ranks.gather(energies) for pair in each])

        largest = max(self.ranks.gather(largest_of(weight for _, weight in pieces)))
        place = f"{self.model.checkpoint.folder}: layer {name}"
        require_kept(place, self.target.format, tensor, lost, largest, lost_if_raised)
