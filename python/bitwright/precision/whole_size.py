"""The choice of precisions within the size of whole files, embedding and head among the layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright.distill.losses import DistillationLoss, TopTokens, next_tokens
from bitwright.distill.targets import DEFAULT_K
from bitwright.formats import Precision
from bitwright.grids.tensor import Grid
from bitwright.loading.model import Model
from bitwright.methods.method import Method
from bitwright.methods.rtn import quantize_rtn
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.network import Network
from bitwright.models.operations import Float32
from bitwright.precision.choices import (
    ERROR_ROWS,
    Candidate,
    Choices,
    Item,
    allocated,
    check_model,
    dynamic_choices,
    fineness,
    rounding_error,
)
from bitwright.precision.options import PrecisionOptions
from bitwright.precision.recipe import Recipe, named_shapes
from bitwright.precision.sensitivities import Sensitivities
from bitwright.precision.size import file_bytes, layer_bytes
from bitwright.precision.target import Target
from bitwright.runs.budget import gigabytes, told_apart
from bitwright.warned import warn

JUDGED_SAMPLES = 4  # that embedding and head are judged on
FINER_BITS = (5, 6, 8)  # that embedding and head may have, too


@dataclass(frozen=True, eq=False)
class WholeSize:
    """What may be chosen within a number of bytes.

    Parameters
    ----------
    model, options, method
        What is quantized, how it is stored, and by what.
    target_size
        Bytes of all weight files.
    choices
        Precisions of the layers in the blocks.
    ends
        Those of embedding and head, by name, from coarse to fine.
    free
        The names of all that is chosen for; the rest is what the options say.
    fixed
        The bytes of that, with the files' headers.
    """

    model: Model
    options: PrecisionOptions
    method: Method
    target_size: int
    choices: Choices
    ends: Mapping[str, Sequence[Candidate]]
    free: frozenset[str]
    fixed: int

    @classmethod
    def of(
        cls,
        model: Model,
        options: PrecisionOptions,
        method: Method,
        candidates: Sequence[Candidate] | None = None,
    ) -> "WholeSize":
        """Find what may be chosen within the target size of some options.

        Raises
        ------
        ValueError
            If the size is out of reach, which the message tells, or a candidate cannot be stored.
        """
        kind, target_size = options.kind, int(options.target_size or 0)

        def near(bpw: float) -> WholeSize:
            asked = model, bpw, candidates, kind.name, options.grid, options.scale_dtype
            choices = dynamic_choices(*asked, nearest=True)
            return cls._with(model, options, method, target_size, choices)

        coarse, fine = near(0.0), near(np.inf)
        low, high = coarse.bytes_at(0), fine.bytes_at(-1)
        if not low <= target_size <= high:
            asked = gigabytes(target_size)
            reach = [gigabytes(each) for each in (low, high)]
            if asked == reach[0]:
                reach[0], asked = told_apart(low, target_size)
            elif asked == reach[1]:
                asked, reach[1] = told_apart(target_size, high)
            raise ValueError(
                f"target_size: {asked} is out of reach; the weights take from {reach[0]} to {reach[1]} in "
                f"the {kind.name} format"
            )
        shapes = named_shapes(model)
        weights = sum(math.prod(shapes[name]) for name in coarse.free)
        return near(8 * (target_size - coarse.fixed) / weights)

    @classmethod
    def _with(
        cls,
        model: Model,
        options: PrecisionOptions,
        method: Method,
        target_size: int,
        choices: Choices,
    ) -> "WholeSize":
        ends = _end_candidates(model, options, choices)
        whole = cls(model, options, method, target_size, choices, ends, frozenset(), 0)
        layers = [whole.layers_at(end) for end in (0, -1)]
        targets = [whole.target_at(end) for end in (0, -1)]
        free = frozenset(
            name
            for name in layers[0]
            if all(
                (planned := target.plan.get(name)) is not None
                and (planned.bits, planned.group_size) == known[name]
                for target, known in zip(targets, layers, strict=True)
            )
        )
        if not free:
            raise ValueError("target_size: the options leave no layer to choose a precision for")
        whole = replace(whole, free=free)
        taken = sum(whole.taken(name, layers[0][name]) for name in free)
        return replace(whole, fixed=whole.bytes_at(0) - taken)

    def layers_at(self, end: int) -> dict[str, Candidate]:
        """Return all layers in their coarsest precision (0), or in their finest (-1)."""
        layers = dict.fromkeys(self.model.linear_shapes(), self.choices.ends[end])
        return layers | {name: each[end] for name, each in self.ends.items()}

    def target_at(self, end: int) -> Target:
        """Return what is stored then, where the options do not say otherwise."""
        recipe = Recipe(self.layers_at(end), 0.0, 0.0)
        options = replace(self.options, recipe=recipe, grid=self.choices.grid, target_size=None)
        return options.for_model(self.model, self.method).target(self.model, self.method)

    def bytes_at(self, end: int) -> int:
        """Return the bytes of the files then."""
        return file_bytes(self.model, self.target_at(end))

    def precision(self, candidate: Candidate) -> Precision:
        """Return what bits and group size of a recipe stand for."""
        bits, size = candidate
        if candidate in self.choices.candidates:
            return Precision(bits, size, self.choices.grid)
        finest = Precision(*self.choices.ends[1], self.choices.grid)
        return replace(self.options.kind.with_bits(finest, bits), group_size=size)

    def taken(self, name: str, candidate: Candidate) -> int:
        """Return the bytes of a layer."""
        shape, dtype = named_shapes(self.model)[name], self.choices.scale_dtype
        return layer_bytes(self.options.kind, shape, self.precision(candidate), dtype)

    def compare(self, folder: Path) -> None:
        """Warn if the files that were written are larger than the target, which float32 scales can do."""
        files = [path for end in ("safetensors", "gguf") for path in folder.glob(f"*.{end}")]
        size = sum(path.stat().st_size for path in files)
        if size > self.target_size:
            more, asked = told_apart(size, self.target_size)
            warn(
                f"{self.model.checkpoint.folder}: the weights take {more}, more than {asked}, as float16 "
                f"scales cannot hold some layers; a target that is smaller by as much makes up for it"
            )

    def chosen(self, sensitivities: Sensitivities, tokens: NDArray[np.int32]) -> Recipe:
        """Return precisions with which all files take no more than the target: what embedding and head cost
        is measured on some `tokens` ``[samples, length]``.

        Raises
        ------
        SensitivityError
            If the sensitivities are those of another model.
        """
        model, grid = self.model, self.choices.grid
        check_model(sensitivities, model)
        ends = {name: self.ends[name] for name in self.ends if name in self.free}
        coarsest = {name: (each[0], grid) for name, each in ends.items()}
        lost = divergences(model, tokens[:JUDGED_SAMPLES], coarsest)
        items = []
        for name, known in ends.items():
            rows = _some_rows(model, name)
            errors = [rounding_error(rows, each, self.precision(each).grid) for each in known]
            costs = [lost[name] * each / errors[0] if errors[0] > 0 else 0.0 for each in errors]
            items.append(Item(name, costs, [self.taken(name, each) for each in known], known))
        layers = allocated(
            model,
            sensitivities,
            self.choices,
            self.options.kind,
            self.target_size - self.fixed,
            allow_unfused=self.options.allow_unfused,
            only=self.free,
            taken=self.taken,
            more=items,
        )
        linears = [name for name in layers if name in model.linear_shapes()]
        shapes = named_shapes(model)
        weights = sum(math.prod(shapes[name]) for name in linears)
        reached = 8 * sum(self.taken(name, layers[name]) for name in linears) / max(weights, 1)
        return Recipe(layers, reached, reached)


def divergences(
    model: Model, tokens: NDArray[np.int32], rounded: Mapping[str, tuple[Candidate, Grid]]
) -> dict[str, float]:
    """Return the KL divergence, in nats per token, that rounding embedding or head alone makes.

    Parameters
    ----------
    model
        In float.
    tokens
        ``[samples, length]``.
    rounded
        The precisions, by name.
    """
    found = dict.fromkeys(rounded, 0.0)
    reference, head = Network(model), model.rows(model.head_name)
    count = min(DEFAULT_K, model.config.vocab_size)
    for ids in (tokens[number : number + 1] for number in range(len(tokens))):
        states = reference.final_states(ids)

        def teacher(start: int, stop: int, states: Float32 = states) -> TopTokens:
            return TopTokens.of(model.head_logits(states[start:stop], head), count)

        for name, (candidate, grid) in rounded.items():
            source = model.embedding_name if name == model.names.embedding else model.head_name

            def rows(
                matrix: str,
                source: str = source,
                candidate: Candidate = candidate,
                grid: Grid = grid,
            ) -> MatrixRows:
                plain = model.rows(matrix)
                if matrix != source:
                    return plain

                def read(first: int, last: int) -> Float32:
                    weight = np.ascontiguousarray(plain.floats(slice(first, last)))
                    return quantize_rtn(weight, *candidate, grid=grid).dequantize()

                return MatrixRows(read, plain.shape, matrix)

            loss = DistillationLoss(teacher, next_tokens(ids), "kl")
            losses = Network(model, rows=rows).losses(ids, loss)
            found[name] += float(losses.mean()) / len(tokens)
    return found


def _some_rows(model: Model, name: str) -> Float32:
    source = model.embedding_name if name == model.names.embedding else model.head_name
    matrix = model.rows(source)
    step = -(-matrix.shape[0] // ERROR_ROWS)
    rows = matrix.gather(np.arange(0, matrix.shape[0], step, dtype=np.int32))
    return np.ascontiguousarray(rows, np.float32)


def _end_candidates(
    model: Model, options: PrecisionOptions, choices: Choices
) -> dict[str, tuple[Candidate, ...]]:
    """Return what embedding and head may have: the precisions of the layers, and finer ones; without one
    whose bits are given, or that stays in float."""
    kind = options.kind
    if not kind.embeddings or options.float_embeddings:
        return {}
    matrix = model.table_shape
    finest = Precision(*choices.ends[1], choices.grid)
    known = [Precision(*each, choices.grid) for each in choices.candidates]
    known += [kind.with_bits(finest, bits) for bits in FINER_BITS if bits > finest.bits]
    stored = {(each.bits, each.group_size): None for each in known if kind.stores(matrix, each)}
    given = {
        model.names.embedding: options.embedding_bits,
        model.names.head: options.embedding_bits if model.tied else options.head_bits,
    }
    found = tuple(sorted(stored, key=fineness))
    return {
        name: found
        for name in named_shapes(model)
        if name in given and given[name] is None and found
    }
