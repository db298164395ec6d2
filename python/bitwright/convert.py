"""From one format to another: the same weights where the grids allow, and otherwise what that costs."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.card import CARD_NAME, made_by, model_card, python_call
from bitwright.checkpoint import (
    CheckpointWriter,
    SafetensorsFiles,
    copy_side_files,
    float_config,
    plainly_spelled,
)
from bitwright.errors import check_choice
from bitwright.formats import FORMATS, Format, FormatName, Precision
from bitwright.methods.grid import FLOAT_DTYPES
from bitwright.methods.regrid import regrid
from bitwright.methods.rtn import quantize_rtn
from bitwright.models.model import Model, load_model
from bitwright.output import Output, QuantizedLayer, relative_error
from bitwright.pipeline import as_written
from bitwright.progress import progress_bar
from bitwright.report import ConversionReport, ConvertedLayer
from bitwright.statistics import require_finite
from bitwright.tensor import QuantizedTensor, stored_bits
from bitwright.warned import reports_warnings

WIDE = 4096  # channels of a row, to compare what precisions take
Target = FormatName | Literal["float"]
Group = tuple[str, ...]  # layers that must have one precision


@reports_warnings
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Target,
    *,
    allow_requantize: bool = False,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ConversionReport:
    """Store a model in another format.

    Nothing is lost where the new format can hold the grid: more bits hold fewer, small groups large ones,
    an integer zero is a bias and often the other way round. Layers are read twice, and written as they are
    made; no more than one is in memory.

    Parameters
    ----------
    source
        Checkpoint folder or GGUF file, in any format that is read.
    out
        Folder to write; it appears when everything is done, or not at all.
    format
        One of the formats, or ``"float"`` for plain safetensors of the dequantized weights. A model in
        float can become ``"gguf"`` or ``"float"`` without being quantized.
    allow_requantize
        Round the layers that the format cannot hold exactly to the nearest that it has. Without it that
        is an error, which tells what would be lost.
    dtype
        Of the weights in float: float32, float16 or bfloat16. By default they stay as they are, and what
        was quantized becomes the model's dtype if that holds it, otherwise float32.
    overwrite, progress
        As for `bitwright.quantize`.

    Returns
    -------
    ConversionReport

    Raises
    ------
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
    model = load_model(source)
    float_dtype = None if dtype is None else np.dtype(dtype)
    if float_dtype is not None and float_dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    kind = None if format == "float" else FORMATS[format]
    if not model.quantized_layers() and kind is not None and format != "gguf":
        raise ValueError(
            f"{model.checkpoint.folder}: is not quantized, so there is nothing to store in the {format} "
            f"format; quantize it (bitwright quantize)"
        )
    conversion = _Conversion(model, kind, float_dtype)
    files = SafetensorsFiles() if kind is None else kind.files(model.checkpoint)
    metadata = {"format": "pt" if kind is None else kind.metadata}
    shown = progress_bar("converting", progress, "layers")
    with (
        CheckpointWriter(
            out, overwrite, metadata=metadata, source=model.checkpoint.source, container=files
        ) as writer,
        shown as bar,
        made_by(python_call(convert, arguments)),
    ):
        task = bar.add_task("", total=2 * len(conversion.layers), figures="comparing grids")
        plan = conversion.plan(lambda: bar.update(task, advance=1))
        if conversion.lost and not allow_requantize:
            raise ValueError(conversion.refusal(format))
        bar.update(task, figures="writing")
        output = conversion.write(writer, plan, lambda: bar.update(task, advance=1))
        writer.write_json("config.json", conversion.config(plan))
        copy_side_files(model.checkpoint, writer)
        stored = [each.after for each in conversion.report if each.after]
        card = model_card(
            model.checkpoint,
            out,
            kind,
            precisions=[(each.bits, each.group_size or 0) for each in stored],
            facts={"converted from": "float" if model.format is None else model.format.name},
        )
        writer.write_text(CARD_NAME, card)
    return ConversionReport(
        Path(out),
        "float" if model.format is None else model.format.name,
        format,
        tuple(conversion.report),
        output.size_bytes,
        model.checkpoint.nbytes(),
    )


def precision_of(tensor: QuantizedTensor, kind: type[Format] | None) -> Precision:
    """Return how a tensor is stored; a group that is the whole row is None where the format has that."""
    whole = kind is not None and kind.whole_row and tensor.group_size not in kind.group_sizes
    size = None if whole and tensor.group_size == tensor.shape[1] else tensor.group_size
    return Precision(tensor.bits, size, "k" if tensor.superblocks is not None else tensor.grid)


class _Conversion:
    """A model, and what becomes of its layers in a format; in float for None."""

    def __init__(
        self, model: Model, kind: type[Format] | None, dtype: np.dtype[Any] | None
    ) -> None:
        self.model = model
        self.kind = kind
        self.dtype = dtype
        self.layers = model.quantized_layers()
        self.matrices = {model.embedding_name, model.head_name}
        self.lost: dict[str, tuple[Precision, Precision, float]] = {}
        self.report: list[ConvertedLayer] = []
        self.reordered = False

    def plan(self, step: Any) -> dict[str, Precision | None]:
        """Return what each layer becomes, and remember what that loses."""
        if self.kind is None:
            for _ in self.layers:
                step()
            return dict.fromkeys(self.layers)
        kind, plan = self.kind, dict[str, Precision | None]()
        families = _families(kind)
        held: list[dict[str, Precision | None]] = [{} for _ in families]
        options: list[dict[str, Precision | None]] = [{} for _ in families]
        for group in self._groups():
            for _ in group:
                step()
            if not kind.embeddings and self.matrices.issuperset(group):
                plan |= {self._target(name): None for name in group}
                continue
            tensors = {name: self._tensor(name) for name in group}
            for place, family in enumerate(families):
                choice = self._held(kind, tensors, family)
                held[place] |= dict.fromkeys(group, choice)
                options[place] |= {
                    name: choice or _nearest(kind, name, tensor, family)
                    for name, tensor in tensors.items()
                }
        possible = [place for place, option in enumerate(options) if all(option.values())]
        if not possible:
            name = next(name for name, choice in options[0].items() if choice is None)
            kind.check(name, self.layers[name], families[0][0])  # which says why
            raise ValueError(f"{name}: fits none of the precisions of the {kind.name} format")
        best = min(
            possible,
            key=lambda place: (
                sum(choice is None for choice in held[place].values()),
                self._lost(held[place], options[place]),
                sum(_stored(each) for each in options[place].values() if each),
            ),
        )
        plan |= {self._target(name): precision for name, precision in options[best].items()}
        for name, precision in options[best].items():
            if held[best][name] is None and precision is not None:
                tensor = self._tensor(name)
                loss = self._rounded(tensor, precision)[1]
                self.lost[name] = precision_of(tensor, kind), precision, loss
        return plan

    def _lost(
        self, held: Mapping[str, Precision | None], option: Mapping[str, Precision | None]
    ) -> float:
        """Estimate the loss of a choice by the first layer that is rounded."""
        for name, precision in option.items():
            if held[name] is None and precision is not None:
                return self._rounded(self._tensor(name), precision)[1]
        return 0.0

    def write(
        self, writer: CheckpointWriter, plan: Mapping[str, Precision | None], step: Any
    ) -> Output:
        """Write all tensors."""
        model, kind = self.model, self.kind
        stacks = model.experts if kind is not None and kind.stacks_experts else {}
        stack_size = model.config.experts.count if model.config.experts else 0
        output = Output(writer, kind or Format, stacks, stack_size)
        for name in self.layers:
            step()
            target = self._target(name)
            tensor, precision = self._tensor(name), plan[target]
            before = precision_of(tensor, None if model.format is None else type(model.format))
            if precision is None or kind is None:
                weight = tensor.dequantize()
                require_finite(weight, f"{model.checkpoint.folder}: quantized layer {name}")
                stored = self._in_float(weight, target)
                output.add(f"{target}.weight", stored)
                error = 0.0
                if not np.array_equal(stored.astype(np.float32), weight):
                    error = relative_error(weight, stored.astype(np.float32), None)
                self.report.append(ConvertedLayer(name, before, None, error))
                continue
            found, error = self._fitted(kind, tensor, precision), 0.0
            if found is None:
                found, error = self._rounded(tensor, precision)
            self.reordered |= found.group_index is not None
            output.finish(QuantizedLayer(target, found, error))
            self.report.append(ConvertedLayer(name, before, precision, error))
        packed = model.packed_tensors()
        for name in model.checkpoint.names():
            if name not in packed:
                self._carry(output, name)
        return output

    def config(self, plan: Mapping[str, Precision | None]) -> dict[str, Any]:
        """Return config.json."""
        model = self.model
        config = plainly_spelled(float_config(model.checkpoint.config))
        if self.kind is None:
            wanted = str(self.dtype or np.dtype(np.float32))
            if self.layers or self.dtype is not None:
                key = "torch_dtype" if "torch_dtype" in config else "dtype"
                config = {**config, key: wanted}
            return config
        config = self.kind.spell(config)
        if not plan:
            return config
        everything: dict[str, Precision | None] = dict.fromkeys(model.linear_shapes())
        everything |= dict(plan) | dict.fromkeys(model.never_quantized())
        default = Counter(each for each in plan.values() if each).most_common(1)[0][0]
        written = as_written(model, self.kind, everything)
        said = self.kind.config(default, written, model.names.block.format(""))
        if self.reordered:
            said["quantization_config"]["desc_act"] = True
        return {**config, **said}

    def refusal(self, format: str) -> str:
        """Say what would be lost, and which formats would lose nothing."""
        name, (before, after, _) = next(iter(self.lost.items()))
        errors = [error for _, _, error in self.lost.values()]
        others = [
            other.name
            for other in FORMATS.values()
            if other.name != format
            and all(
                any(self._held(other, {each: self._tensor(each)}, f) for f in _families(other))
                for each in self.lost
            )
        ]
        hint = f"{', '.join(others)} or float" if others else "float"
        return (
            f"{self.model.checkpoint.folder}: {len(self.lost)} of {len(self.layers)} layers cannot be "
            f"stored in the {format} format as they are: {name}, {before.words()}, would be rounded to "
            f"{after.words()}. That changes the weights by {np.mean(errors):.2g} of their energy on "
            f"average, {max(errors):.2g} at most. Allow it (allow_requantize, --allow-requantize), or "
            f"convert to {hint}, which loses nothing"
        )

    def _groups(self) -> Iterator[Group]:
        """Yield the layers that are stored as one tensor together."""
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

    def _held(
        self,
        kind: type[Format],
        tensors: Mapping[str, QuantizedTensor],
        precisions: Sequence[Precision],
    ) -> Precision | None:
        """Return the smallest precision that holds all of some layers exactly."""
        for precision in sorted(precisions, key=_stored):
            if all(
                _stores(kind, name, tensor.shape, precision)
                and self._fitted(kind, tensor, precision) is not None
                for name, tensor in tensors.items()
            ):
                return precision
        return None

    def _fitted(
        self, kind: type[Format], tensor: QuantizedTensor, precision: Precision
    ) -> QuantizedTensor | None:
        if tensor.group_index is not None and not kind.reorders:
            return None
        usual = kind.scale_dtype(self.model.dtype)
        dtypes = [
            d for d in (tensor.scales.dtype, usual, *kind.scale_dtypes) if d in kind.scale_dtypes
        ]
        size = precision.group_for(tensor.shape[1])
        return regrid(tensor, precision.bits, size, precision.grid, dtypes)

    def _rounded(
        self, tensor: QuantizedTensor, precision: Precision
    ) -> tuple[QuantizedTensor, float]:
        assert self.kind is not None
        weight = tensor.dequantize()
        rounded = quantize_rtn(
            weight,
            precision.bits,
            precision.group_size,
            grid=precision.grid,
            scale_dtype=self.kind.scale_dtype(self.model.dtype),
            grid_search=True,
        )
        return rounded, relative_error(weight, rounded.dequantize(), None)

    def _in_float(self, weight: NDArray[np.float32], name: str) -> NDArray[Any]:
        if self.dtype is not None:
            return self._cast(weight, name)
        with np.errstate(over="ignore"):
            usual = weight.astype(self.model.dtype)
        return usual if np.array_equal(usual.astype(np.float32), weight) else weight

    def _cast(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            cast = array.astype(self.dtype)
        require_finite(cast, f"{name} as {self.dtype}")
        return cast

    def _carry(self, output: Output, name: str) -> None:
        """Write a float tensor; a tied matrix once."""
        model, target = self.model, self.model.written_name(name)
        if target is None:
            return
        if self.dtype is not None and model.checkpoint.dtype(name) in FLOAT_DTYPES:
            output.add(target, self._cast(model.checkpoint.read(name), name))
            return
        output.carry(model.checkpoint, name, {}, target)


def _families(kind: type[Format]) -> list[list[Precision]]:
    """Return the precisions that may be together in one folder."""
    known = kind.precisions()
    if kind.one_precision:
        return [[each] for each in known]
    if kind.one_grid:
        return [[each for each in known if each.grid == grid] for grid in kind.grids]
    return [known]


def _stores(kind: type[Format], name: str, shape: tuple[int, int], precision: Precision) -> bool:
    try:
        kind.check(name, shape, precision)
    except ValueError:
        return False
    return True


def _nearest(
    kind: type[Format], name: str, tensor: QuantizedTensor, precisions: Sequence[Precision]
) -> Precision | None:
    """Return what a layer that no precision holds is rounded to, None if its shape fits none."""

    def distance(precision: Precision) -> tuple[bool, int, bool, int]:
        size = precision.group_for(tensor.shape[1])
        fewer, coarser = precision.bits < tensor.bits, size > tensor.group_size
        return fewer, abs(precision.bits - tensor.bits), coarser, abs(size - tensor.group_size)

    known = [each for each in precisions if _stores(kind, name, tensor.shape, each)]
    return min(known, key=distance, default=None)


def _stored(precision: Precision) -> float:
    size = precision.group_for(WIDE)
    return stored_bits(precision.bits, size, precision.grid, np.float16)
