"""Conversion between formats: lossless where the grids allow, otherwise with a report of what is lost."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.arrays import require_finite
from bitwright.checkpoint import CheckpointWriter, SafetensorsFiles, copy_side_files
from bitwright.checkpoint.front_matter import CARD_NAME
from bitwright.checkpoint.hub import finds_models
from bitwright.errors import check_choice
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.formats import FORMATS, Format, FormatName, Precision
from bitwright.formats.engine_names import check_fused, fused_groups, unfused
from bitwright.formats.stored import is_float
from bitwright.grids.choice import FLOAT_DTYPES
from bitwright.grids.regrid import ROUNDING, ROWS, is_rounding, lost, lost_in_pieces, regrid
from bitwright.grids.tensor import QuantizedTensor, stored_bits
from bitwright.loading.model import Model, load_model
from bitwright.methods.rtn import quantize_rtn
from bitwright.models.config import float_config, plainly_spelled
from bitwright.models.matrix_rows import piece_rows
from bitwright.precision.target import as_written
from bitwright.quantization.output import Output, QuantizedLayer
from bitwright.quantization.small_weights import MOST_LOST, largest_of, require_kept
from bitwright.records.card import model_card, python_call
from bitwright.records.described import write_report
from bitwright.records.made_by import made_by
from bitwright.records.reports import ConversionReport, ConvertedLayer
from bitwright.runs.budget import Budget
from bitwright.runs.progress import Progressing, phase
from bitwright.spellings import Old, respelled
from bitwright.warned import reports_warnings

FEW = 3  # layers that are in memory together
CODE_BYTES = 1.5  # of a weight that is quantized, with scales and biases of small groups
COMPARED_BYTES = 16  # of a weight as it is, in other codes, and of their difference
CODES_BYTES = 17 / 16  # of a weight that is quantized, alone
PIECE_BYTES = 12  # of a weight of a piece: as it is, as it is stored, and in float32 again
WIDE = 4096  # channels of a row, to compare what precisions take
Target = FormatName  # or "float"
Group = tuple[str, ...]  # layers that must have one precision


@respelled(Old("source", "model"))
@reports_warnings
@expands_home
@finds_models
@same_inputs()
def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Target,
    *,
    allow_requantize: bool = False,
    allow_unfused: bool = False,
    dtype: DTypeLike | None = None,
    memory: float | None = None,
    overwrite: bool = False,
    progress: Progressing = True,
) -> ConversionReport:
    """Store a model in another format.

    Nothing is lost where the new format can hold the grid: more bits hold fewer, small groups large ones,
    an integer zero is a bias and often the other way round. Where only the dtype of the scales does not
    fit, codes and zeros stay and the scales are rounded, if that is all that float16's rounding can cost:
    no weight s·c + b moves by more than 2⁻¹⁰ of its two terms, and a layer loses no more than 2⁻¹⁸ (4·10⁻⁶)
    of its energy. The report tells how much it is. Layers are read twice, and written as they are made; no
    more than one is in memory.

    Parameters
    ----------
    model
        Checkpoint folder or GGUF file, in any format that is read.
    out
        Folder to write; it appears when everything is done, or not at all.
    format
        One of the formats, or ``"float"`` for plain safetensors of the dequantized weights. A model in
        float can become ``"gguf"`` or ``"float"`` without being quantized.
    allow_requantize
        Also store what the format cannot hold so, as near as it can: with scales that are rounded by more,
        or with new codes. Without it that is an error, which tells what would be lost.
    allow_unfused
        Let layers differ that vLLM computes as one module, see `bitwright.quantize`. Without it they get
        the smallest precision that holds all of them, and one of them in float is an error.
    dtype
        Of the weights in float: float32, float16 or bfloat16. By default they stay as they are, and what
        was quantized becomes the model's dtype if that holds it, otherwise float32.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    overwrite, progress
        As for `bitwright.quantize`.

    Returns
    -------
    ConversionReport

    Raises
    ------
    MemoryBudgetError
        If the budget is too small, with the smallest that would work.
    CheckpointError, NonFiniteError, OutputError, ValueError
        If the model is damaged, or cannot be stored so; the message says what and where. Nothing is written
        then.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.quantize(
    ...         demo, f"{folder}/gptq", "rtn", 4, 64, "gptq", progress=False
    ...     )
    ...     converted = bitwright.convert(f"{folder}/gptq", f"{folder}/gguf", "gguf", progress=False)
    >>> converted.lossy, converted.layers[0].after
    ([], Precision(bits=4, group_size=32, grid='symmetric'))
    """
    arguments = dict(locals())
    check_choice("format", format, (*FORMATS, "float"))
    original = load_model(model)
    original.warn_of_unused()
    float_dtype = None if dtype is None else np.dtype(dtype)
    if float_dtype is not None and float_dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    kind = None if format == "float" else FORMATS[format]
    if not original.quantized_layers() and kind is not None and not kind.own_container:
        if decoded := original.checkpoint.decoded_type():
            raise ValueError(
                f"{original.checkpoint.folder}: has tensors of the type {decoded}, which the {format} "
                f"format cannot hold; convert to float, or round them again (bitwright quantize "
                f"--allow-requantize)"
            )
        raise ValueError(
            f"{original.checkpoint.folder}: is not quantized, so there is nothing to store in the {format} "
            f"format; quantize it (bitwright quantize)"
        )
    conversion = _Conversion(original, kind, float_dtype, allow_unfused)
    budget = Budget.of(memory)
    budget.require(budget.base + int(conversion.needed_bytes()), original.checkpoint.folder)
    files = SafetensorsFiles() if kind is None else kind.files(original.checkpoint)
    metadata = {"format": "pt" if kind is None else kind.metadata}
    with (
        CheckpointWriter(
            out, overwrite, metadata=metadata, source=original.checkpoint.source, container=files
        ) as writer,
        phase("converting", progress, 2 * len(conversion.layers)) as shown,
        made_by(python_call(convert, arguments)),
    ):
        writer.inputs.watch_model(original.checkpoint)
        plan = conversion.plan(lambda: shown.step("comparing grids"))
        if conversion.lost and not allow_requantize:
            raise ValueError(conversion.refusal(format))
        output = conversion.write(writer, plan, lambda: shown.step("writing"))
        writer.write_json("config.json", conversion.config(plan))
        copy_side_files(original.checkpoint, writer)
        report = ConversionReport(
            Path(out),
            "float" if original.format is None else original.format.name,
            format,
            tuple(conversion.report),
            output.size_bytes,
            original.checkpoint.stored_bytes(),
        )
        stored = [each.after for each in report.layers if each.after]
        card = model_card(
            original.checkpoint,
            out,
            kind,
            precisions=[(each.bits, each.group_size or 0) for each in stored],
            facts={"converted from": report.source_format, **report.changes()},
            unfused=kind is not None and bool(unfused(kind, conversion.everything(plan))),
        )
        writer.write_text(CARD_NAME, card)
        write_report(writer, report)
    return report


def precision_of(tensor: QuantizedTensor, kind: type[Format] | None) -> Precision:
    """Return how a tensor is stored; a group that is the whole row is None where the format has that."""
    whole = kind is not None and kind.whole_row and tensor.group_size not in kind.group_sizes
    size = None if whole and tensor.group_size == tensor.shape[1] else tensor.group_size
    return Precision(tensor.bits, size, tensor.stored_grid)


@dataclass(frozen=True)
class _Choice:
    """How layers may be stored: their codes with scales in a dtype, or new codes."""

    precision: Precision
    scale_dtype: np.dtype[Any]
    keeps_codes: bool
    fits: bool = False  # whether no more is lost than rounding scales may cost
    error: float | None = None  # of the layer that loses most; None where nobody has looked yet

    def words(self) -> str:
        """Return it as people write it."""
        kept = f"the same codes, with scales in {self.scale_dtype}, in "
        return (kept if self.keeps_codes else "") + self.precision.words()


@dataclass(eq=False)
class _Conversion:
    """A model, and what becomes of its layers in a format; in float for None."""

    model: Model
    kind: type[Format] | None
    dtype: np.dtype[Any] | None
    allow_unfused: bool = False

    def __post_init__(self) -> None:
        self.layers = self.model.quantized_layers()
        self.matrices = {self.model.embedding_name, self.model.head_name}
        self.lost: dict[str, _Choice] = {}
        self.report: list[ConvertedLayer] = []
        self.reordered = False
        self.stacked = self.model.stacked_tensors()
        self.left_out = set() if self.kind is None else self.model.left_out(self.kind)

    def needed_bytes(self) -> float:
        """Return the most that layers take while they are compared and written, or float tensors while
        they are carried."""
        sizes = {name: math.prod(shape) for name, shape in self.layers.items()}
        written = 4 if self.dtype is None else self.dtype.itemsize
        held = [0.0]
        for group in self._groups() if self.kind is not None else [(name,) for name in sizes]:
            largest = max(sizes[name] for name in group)
            if self._stays_in_float(group):
                width = self.layers[group[0]][1]
                piece = min(largest, _rows_at_once(width) * width)
                reading = 2 * CODES_BYTES * largest
                held.append(max(reading, (CODES_BYTES + written) * largest + PIECE_BYTES * piece))
                continue
            codes = sum(sizes[name] for name in group) if len(group) <= FEW else largest
            held.append(CODE_BYTES * codes + COMPARED_BYTES * largest)
        for name in self.model.checkpoint.names():
            count = math.prod(self.model.checkpoint.shape(name))
            cast = 0 if self.dtype is None else self.dtype.itemsize
            stored = self.model.checkpoint.dtype(name).itemsize
            held.append(count * (stored + cast + 1))  # and which are finite
        return max(held)

    def _stays_in_float(self, group: Group) -> bool:
        """Tell whether layers that are quantized are not in the new format."""
        kind = self.kind
        if kind is None or (not kind.embeddings and self.matrices.issuperset(group)):
            return True
        return kind.keeps_in_float(self.model.config.model_type, group[0])

    def plan(self, step: Any) -> dict[str, _Choice | None]:
        """Return what each layer becomes, and remember what that loses."""
        if self.kind is None:
            for _ in self.layers:
                step()
            return dict.fromkeys(self.layers)
        kind, plan = self.kind, dict[str, _Choice | None]()
        families = _families(kind)
        options: list[dict[Group, list[_Choice]]] = [{} for _ in families]
        for group in self._groups():
            for _ in group:
                step()
            if self._stays_in_float(group):
                plan |= {self._target(name): None for name in group}
                continue
            tensors, known = self._tensors(group), dict[Any, _Choice]()
            for family, option in zip(families, options, strict=True):
                option[group] = self._choices(kind, tensors, family, known)
        possible = [option for option in options if all(option.values())]
        if not possible:
            name = next(group[0] for group, choices in options[0].items() if not choices)
            kind.check(name, self.layers[name], families[0][0])  # which says why
            raise ValueError(f"{name}: fits none of the precisions of the {kind.name} format")
        for group, choices in min(possible, key=self._cost).items():
            choice = choices[0] if choices[0].fits else self._least(group, choices)
            if choice.error == np.inf:
                raise ValueError(
                    f"{self.model.checkpoint.folder}: the scales of layer {group[0]} are more than "
                    f"{choice.scale_dtype} can hold, which the {kind.name} format stores; convert to "
                    f"mlx or compressed-tensors, which store float32, or to float"
                )
            plan |= {self._target(name): choice for name in group}
            if not choice.fits:
                self.lost |= dict.fromkeys(group, choice)
        if not self.allow_unfused:
            check_fused(kind, self.everything(plan), "Quantize the original anew")
        return plan

    def _cost(self, option: Mapping[Group, list[_Choice]]) -> tuple[float, ...]:
        """Return what precisions that may be together cost: layers that do not fit, what the first of these
        loses, layers that are not the same, and room."""
        unfit = {group: each for group, each in option.items() if not each[0].fits}
        first = next((self._least(*each).error for each in unfit.items()), 0.0)
        rounded = sum(len(group) for group, each in option.items() if each[0].error != 0)
        room = sum(len(group) * _stored(each[0].precision) for group, each in option.items())
        return sum(map(len, unfit)), first or 0.0, rounded, room

    def _least(self, group: Group, choices: Sequence[_Choice]) -> _Choice:
        """Return the choice that loses least."""
        judged = []
        for choice in choices:
            if choice.error is None:
                choice = replace(choice, error=max(self._loss(name, choice) for name in group))
            judged.append(choice)
        return min(judged, key=lambda each: each.error or 0.0)

    def _loss(self, name: str, choice: _Choice) -> float:
        """Return what a layer loses by a choice; infinity if its dtype has no such scales."""
        try:
            return self._stored(self._tensor(name), choice)[1]
        except ValueError:  # of a group that spans too much
            return np.inf

    def write(
        self, writer: CheckpointWriter, plan: Mapping[str, _Choice | None], step: Any
    ) -> Output:
        """Write all tensors."""
        model, kind = self.model, self.kind
        stacks = model.experts if kind is not None and kind.stacks_experts else {}
        stack_size = model.config.experts.count if model.config.experts else 0
        family = model.config.family
        output = Output(writer, kind or Format, stacks, stack_size, model.nested, family)
        for name in self.layers:
            step()
            target = self._target(name)
            tensor, choice = self._tensor(name), plan[target]
            before = precision_of(tensor, None if model.format is None else type(model.format))
            if choice is None or kind is None:
                stored, error = self._in_float(tensor, name, target)
                output.add(f"{target}.weight", stored)
                del tensor, stored  # before there is the next
                self.report.append(ConvertedLayer(name, before, None, error))
                continue
            found, error = self._stored(tensor, choice)
            if error > MOST_LOST:
                self._require_kept(name, tensor.dequantize(), choice, found, error)
            self.reordered |= found.group_index is not None
            output.finish(QuantizedLayer(target, found, error))
            anew = not choice.keeps_codes
            self.report.append(ConvertedLayer(name, before, choice.precision, error, anew))
        packed = model.packed_tensors()
        for name in model.checkpoint.names():
            if name not in packed:
                self._carry(output, name)
        return output

    def config(self, plan: Mapping[str, _Choice | None]) -> dict[str, Any]:
        """Return config.json."""
        model = self.model
        config = plainly_spelled(float_config(model.checkpoint.config))
        if self.kind is None:
            wanted = str(self.dtype or np.dtype(np.float32))
            if self.layers or self.dtype is not None:
                key = "torch_dtype" if "torch_dtype" in config else "dtype"
                config = {**config, key: wanted}
            return config
        config = model.config_for(self.kind)
        if not plan:
            return config
        default = Counter(each.precision for each in plan.values() if each).most_common(1)[0][0]
        written = as_written(model, self.kind, self.everything(plan))
        blocks = self.kind.name_written(model.names.block.format(""), model.nested)
        said = self.kind.config(default, written, blocks)
        if self.reordered:
            said["quantization_config"]["desc_act"] = True
        return {**config, **said}

    def everything(self, plan: Mapping[str, _Choice | None]) -> dict[str, Precision | None]:
        """Return the precision of all layers, with those that stay in float."""
        planned = {name: None if each is None else each.precision for name, each in plan.items()}
        in_float = dict.fromkeys(self.model.linear_shapes())
        return {**in_float, **planned, **dict.fromkeys(self.model.never_quantized())}

    def refusal(self, format: str) -> str:
        """Say what would be lost, and which formats would lose nothing."""
        name, choice = next(iter(self.lost.items()))
        errors = [each.error or 0.0 for each in self.lost.values()]
        own = None if self.model.format is None else self.model.format.name
        others = [
            other.name
            for other in FORMATS.values()
            if other.name not in (format, own)
            and all(self._holds(other, each) for each in self.lost)
        ]
        why = ""
        if choice.keeps_codes and max(errors) <= ROUNDING:
            why = f", but some groups by more than rounding their scales to {choice.scale_dtype} should"
        hint = f"{', '.join(others)} or float" if others else "float"
        before = precision_of(self._tensor(name), self.kind).words()
        return (
            f"{self.model.checkpoint.folder}: {len(self.lost)} of {len(self.layers)} layers cannot be "
            f"stored in the {format} format as they are: {name}, {before}, would be rounded to "
            f"{choice.words()}. That changes the weights by {np.mean(errors):.2g} of their energy on "
            f"average, {max(errors):.2g} at most{why}; up to {ROUNDING:.2g} is done without asking. "
            f"Allow it (allow_requantize, --allow-requantize), or convert to {hint}, which loses no more "
            f"than that"
        )

    def _groups(self) -> Iterator[Group]:
        """Yield the layers that must have one precision: in one tensor, or one module of an engine."""
        if self.kind is not None and self.kind.fuses_shared_inputs and not self.allow_unfused:
            yield from fused_groups(self.layers).values()
            return
        stacks: dict[str, list[str]] = {}
        for name in self.layers:
            place = self.model.experts.get(name)
            stacked = place is not None and self.kind is not None and self.kind.stacks_experts
            key = place.stacked_name if place is not None and stacked else name
            stacks.setdefault(key, []).append(name)
        yield from map(tuple, stacks.values())

    def _target(self, name: str) -> str:
        """Return the name that a layer is written under: the embedding's for a tied matrix."""
        tied = self.model.tied and name in self.matrices
        return self.model.names.embedding if tied else name

    def _tensor(self, name: str) -> QuantizedTensor:
        return self.model.stored(name, self.layers[name])

    def _tensors(self, group: Group) -> Mapping[str, QuantizedTensor]:
        """Return some layers: a few are in memory, the experts of a layer are read one by one."""
        return _Tensors(self, group) if len(group) > FEW else {n: self._tensor(n) for n in group}

    def _holds(self, kind: type[Format], name: str) -> bool:
        """Tell whether a format holds a layer's codes, and its scales but for their rounding."""
        tensors, known = self._tensors((name,)), dict[Any, _Choice]()
        choices = (self._kept(kind, tensors, family, known) for family in _families(kind))
        return any(choice is not None and choice.fits for choice in choices)

    def _choices(
        self,
        kind: type[Format],
        tensors: Mapping[str, QuantizedTensor],
        precisions: Sequence[Precision],
        known: dict[Any, _Choice],
    ) -> list[_Choice]:
        """Return how a group of layers may be stored: in one way if one fits, none if no shape does."""
        kept = self._kept(kind, tensors, precisions, known)
        if kept is not None and kept.fits:
            return [kept]
        nearest = _nearest(kind, tensors, precisions)
        dtype = kind.scale_dtype(self.model.dtype)
        anew = None if nearest is None else _Choice(nearest, dtype, keeps_codes=False)
        return [each for each in (kept, anew) if each is not None]

    def _kept(
        self,
        kind: type[Format],
        tensors: Mapping[str, QuantizedTensor],
        precisions: Sequence[Precision],
        known: dict[Any, _Choice],
    ) -> _Choice | None:
        """Return the smallest precision that holds all of some layers exactly, otherwise but for the
        rounding of scales, otherwise with the least loss; None if none holds their codes.

        What is lost is a matter of the kind of grid and the dtype of scales alone; `known` remembers it.
        """
        if not kind.reorders and any(t.group_index is not None for t in tensors.values()):
            return None
        own = next(iter(tensors.values())).scales.dtype
        usual = (own, kind.scale_dtype(self.model.dtype), *kind.scale_dtypes)
        found: list[_Choice] = []
        for precision in sorted(precisions, key=_stored):
            for dtype in dict.fromkeys(each for each in usual if each in kind.scale_dtypes):
                choice = _Choice(precision, dtype, keeps_codes=True)
                if not all(
                    kind.stores(tensor.shape, precision)
                    and self._regridded(tensor, choice) is not None
                    for tensor in tensors.values()
                ):
                    break
                key = precision.grid, dtype
                if key not in known:
                    known[key] = self._judged(tensors, choice)
                if known[key].error == 0:
                    return replace(known[key], precision=precision)
                found.append(replace(known[key], precision=precision))
        fitting = [each for each in found if each.fits]
        of_one = [each for each in fitting if each.precision == fitting[0].precision]
        return min(of_one or found, key=lambda each: each.error or 0.0, default=None)

    def _judged(self, tensors: Mapping[str, QuantizedTensor], choice: _Choice) -> _Choice:
        """Return a choice that keeps codes with what is lost."""
        fits, error = True, 0.0
        for tensor in tensors.values():
            found, weight = self._regridded(tensor, choice), tensor.dequantize()
            assert found is not None
            stored = found.dequantize()
            change = lost(weight, stored)
            fits = fits and (change == 0 or is_rounding(tensor, weight, stored))
            error = max(error, change)
        return replace(choice, fits=fits, error=error)

    def _regridded(self, tensor: QuantizedTensor, choice: _Choice) -> QuantizedTensor | None:
        bits, grid = choice.precision.bits, choice.precision.grid
        size = choice.precision.group_for(tensor.shape[1])
        return regrid(tensor, bits, size, grid, choice.scale_dtype)

    def _stored(self, tensor: QuantizedTensor, choice: _Choice) -> tuple[QuantizedTensor, float]:
        """Return a layer as it is stored, and what that loses."""
        weight = tensor.dequantize()
        found = self._regridded(tensor, choice) if choice.keeps_codes else None
        if found is None:
            return _rounded(weight, choice)
        return found, lost(weight, found.dequantize())

    def _require_kept(
        self,
        name: str,
        weight: NDArray[np.float32],
        choice: _Choice,
        rounded: QuantizedTensor,
        error: float,
    ) -> None:
        """Raise ValueError if a layer loses most of its energy because scales cannot be so small."""
        place = f"{self.model.checkpoint.folder}: layer {name}"
        require_kept(
            place,
            self.kind,
            rounded,
            error,
            largest_of([weight]),
            lambda power: _rounded(np.ldexp(weight, power), choice)[1],
        )

    def _in_float(
        self, tensor: QuantizedTensor, name: str, target: str
    ) -> tuple[NDArray[Any], float]:
        """Return a layer in float, and what that loses: in the dtype that is asked for, or else in the
        model's, if that holds it, or in float32. Rows are dequantized some at a time."""
        where = f"{self.model.checkpoint.folder}: quantized layer {name}"

        def pieces() -> Iterator[tuple[slice, NDArray[np.float32]]]:
            out, width = tensor.shape
            for first in range(0, out, _rows_at_once(width)):
                rows = slice(first, min(first + _rows_at_once(width), out))
                yield rows, tensor.dequantize(rows.start, rows.stop)

        dtype = self.dtype or self.model.dtype
        with np.errstate(over="ignore"):
            for _, piece in pieces():
                require_finite(piece, where)
                if self.dtype is None and not np.array_equal(piece.astype(dtype), piece):
                    dtype = np.dtype(np.float32)
                del piece  # before there is the next
            stored = np.empty(tensor.shape, dtype)

            def written() -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
                for rows, piece in pieces():
                    stored[rows] = piece
                    yield piece, stored[rows].astype(np.float32)
                    del piece

            error = lost_in_pieces(written())
        if self.dtype is not None:
            require_finite(stored, f"{target} as {self.dtype}")
        return stored, error

    def _cast(
        self, array: NDArray[Any], name: str, dtype: np.dtype[Any] | None = None
    ) -> NDArray[Any]:
        dtype = dtype or self.dtype
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        require_finite(cast, f"{name} as {dtype}")
        return cast

    def _carry(self, output: Output, name: str) -> None:
        """Write a float tensor; a tied matrix once."""
        model, target = self.model, self.model.written_name(name)
        if target is None or name in self.left_out:
            return
        if self.kind is not None and self.kind.own_container and name in self.stacked:
            dtype = self.dtype or model.stored_dtype(name)
            for layer in self.stacked[name]:
                weight = model.weight(layer, model.linear_shapes()[layer])
                output.add(f"{layer}.weight", self._cast(weight, layer, dtype))
            return
        if self.dtype is not None and is_float(model.checkpoint.dtype(name)):
            output.add(target, self._cast(model.checkpoint.read(name), name))
            return
        output.carry(model.checkpoint, name, {}, target)


class _Tensors(Mapping[str, QuantizedTensor]):
    """Layers that are read whenever they are asked for."""

    def __init__(self, conversion: _Conversion, names: Group) -> None:
        self._conversion, self._names = conversion, names

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._conversion._tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _rows_at_once(width: int) -> int:
    return max(1, piece_rows(width) // ROWS) * ROWS


def _rounded(weight: NDArray[np.float32], choice: _Choice) -> tuple[QuantizedTensor, float]:
    """Return a weight in new codes, and what that loses."""
    precision = choice.precision
    found = quantize_rtn(
        weight,
        precision.bits,
        precision.group_size,
        grid=precision.grid,
        scale_dtype=choice.scale_dtype,
        grid_search=True,
    )
    return found, lost(weight, found.dequantize())


def _families(kind: type[Format]) -> list[list[Precision]]:
    """Return the precisions that may be together in one folder."""
    known = kind.precisions()
    if kind.one_precision:
        return [[each] for each in known]
    if kind.one_grid:
        return [[each for each in known if each.grid == grid] for grid in kind.grids]
    return [known]


def _nearest(
    kind: type[Format], tensors: Mapping[str, QuantizedTensor], precisions: Sequence[Precision]
) -> Precision | None:
    """Return what layers that no precision holds are rounded to, None if their shapes fit none."""
    facts = [(tensor.shape, tensor.bits, tensor.group_size) for tensor in tensors.values()]
    shape, bits, group_size = max(facts, key=lambda fact: fact[1])

    def distance(precision: Precision) -> tuple[bool, int, bool, int]:
        size = precision.group_for(shape[1])
        fewer, coarser = precision.bits < bits, size > group_size
        return fewer, abs(precision.bits - bits), coarser, abs(size - group_size)

    known = [
        precision
        for precision in precisions
        if all(kind.stores(each, precision) for each, _, _ in facts)
    ]
    return min(known, key=distance, default=None)


def _stored(precision: Precision) -> float:
    size = precision.group_for(WIDE)
    return stored_bits(precision.bits, size, precision.grid, np.float16)
