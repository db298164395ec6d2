"""Quantizes what the native path does not describe: any decoder that transformers runs."""

import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.adapter.storable import warn_of_unstorable, without_unstorable
from bitwright.adapter.torch_memory import needed_bytes
from bitwright.adapter.torch_model import Input, Linear, Norm, Stream, TorchBlock, TorchModel
from bitwright.blocks.equalizing import (
    first_exact,
    gain_is_exact,
    half_holds,
    has_float16_scales,
    most_power,
    moves_exactly,
    size_of,
)
from bitwright.build import build_info
from bitwright.checkpoint import CheckpointWriter, copy_side_files
from bitwright.checkpoint.front_matter import CARD_NAME
from bitwright.checkpoint.hub import finds_models
from bitwright.errors import BitwrightError, NonFiniteError, check_choice
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.formats import FormatName, GroupSize, Precision
from bitwright.formats.engine_names import unfused
from bitwright.grids.choice import GridChoice
from bitwright.grids.tables import stored_scales
from bitwright.grids.tensor import Grid, QuantizedTensor
from bitwright.methods.awq import (
    DEFAULT_GRID,
    ScaleSearch,
    clip_solver,
    gram_loss,
    search_scale,
)
from bitwright.methods.method import Solver, StageInputs
from bitwright.methods.refined import refined
from bitwright.methods.registry import METHODS
from bitwright.methods.rtn import rtn_solver
from bitwright.models.config import plainly_spelled
from bitwright.models.fold import fold_scale
from bitwright.precision.options import PrecisionOptions
from bitwright.precision.recipe import check_plan, plan_shapes
from bitwright.precision.target import Target, as_written, check_stacks
from bitwright.quantization.options import QuantizationOptions
from bitwright.quantization.output import Output, QuantizedLayer, Trial, block_error, relative_error
from bitwright.quantization.small_weights import (
    MOST_LOST,
    largest_of,
    require_kept,
    warn_of_small_weights,
)
from bitwright.records.card import model_card, python_call
from bitwright.records.described import write_report
from bitwright.records.made_by import made_by
from bitwright.records.reports import QuantizationReport
from bitwright.runs.budget import Budget
from bitwright.runs.progress import Progressing, phase
from bitwright.spellings import Old, respelled
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import TokenSource, existing_file
from bitwright.text.text_files import TextFiles
from bitwright.warned import reports_warnings, warn

Float32 = NDArray[np.float32]

# Relative change of what a block adds to the hidden states, above which a folded scale is undone: the norm
# then has a reader that was not scaled.
MOST_CHANGE = 1e-3
JUDGED_TOKENS = 512  # that decide between a block with scales and one without
# The scores are a product of queries and keys, whose errors a search on one of them does not see.
NEVER_CLIPPED = ("q_proj", "k_proj", "query", "key", "qkv")


@reports_warnings
@expands_home
@finds_models
@same_inputs()
def quantize_with_transformers(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str = "gptq",
    bits: int = 4,
    group_size: GroupSize = "auto",
    format: FormatName = "mlx",
    calibration: TokenSource | None = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    grid: Grid | None = None,
    scale_dtype: DTypeLike | None = None,
    refine: bool | None = None,
    damping: float | None = None,
    act_order: bool = True,
    block_size: int = 128,
    grid_search: bool | None = None,
    n_grid: int = DEFAULT_GRID,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, int]] | None = None,
    allow_unfused: bool = False,
    memory: float | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progressing = True,
) -> QuantizationReport:
    """Quantize a checkpoint folder of any text model that transformers runs into another one.

    For architectures that `quantize` does not know. torch computes, with hooks on the model's layers;
    statistics, methods and formats are those of `quantize`. The whole model is in memory, in float32.

    Parameters
    ----------
    model
        Checkpoint folder in float (config.json and safetensors). Nothing is downloaded, and no code from
        the folder is run.
    out
        Folder to write; it appears when everything is done, or not at all.
    method
        ``"gptq"``, ``"rtn"``, ``"awq"`` or ``"awq+gptq"``. All but rtn need `calibration`.
    bits, group_size, format, calibration, samples, length, seed, bos, grid, scale_dtype
        As for `quantize`.
    refine, damping, act_order, block_size, grid_search, n_grid
        As for `quantize`; there is no drift correction here.
    include, exclude, overrides
        As for `quantize`; layers have the names that the checkpoint gives them.
    allow_unfused
        As for `quantize`.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free. What the whole model
        takes, and calibration and solving beside it, is known before weights are read.
    overwrite, threads, progress
        As for `quantize`.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    MissingExtraError
        If torch or transformers is not installed: ``pip install "bitwright[transformers]"``.
    UnsupportedModelError
        If the decoder blocks are not found or do not run one after the other, or transformers computes with
        other weights than those that are stored.
    MemoryBudgetError
        If the run would take more memory than it may; the message tells how much it needs.
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError, TypeError
        If anything is wrong with what was given; the message says what and where. Nothing is written then.

    Notes
    -----
    Each block is run twice over the samples, in chunks of a few. First in float, while hooks gather the
    second moments of what its linears read; then all its linears are quantized, and the quantized
    block computes what the next one reads. So inside a block statistics are those of the float block (the
    earlier blocks are quantized), other than in `quantize`, which goes on layer by layer. In memory are the
    whole model in float32 and the statistics of one block, with those of all its experts.

    Every nn.Linear in the blocks of the text decoder is quantized, and experts that are held in arrays
    ``gate_up_proj`` and ``down_proj``, each with the tokens that are routed to it. What chooses experts,
    embedding and head, and towers for images and sounds stay in float; the report names them. Layers
    that no token reaches are rounded to nearest, with a warning; those of shapes that the format does
    not store in groups of any size stay in float, with one, too.

    AWQ's scales are folded into norms: into one whose output is read by linears only, where its formula is
    that of rms_norm (with g or 1 + g) or layer_norm. A scale is undone if the block then computes something
    else, and the block falls back to its own weights where AWQ does not reduce its error.

    Examples
    --------
    >>> import bitwright
    >>> report = bitwright.quantize_with_transformers(  # doctest: +SKIP
    ...     "models/stablelm-2-1_6b", "stablelm-4bit", bits=4, calibration="text.txt", length=512,
    ... )
    >>> report.layer_bits_per_weight  # doctest: +SKIP
    4.5
    """
    arguments = dict(locals())
    start = time.perf_counter()
    offered = [each.name for each in METHODS.values() if each.through_transformers]
    check_choice("method", method, offered)
    options = QuantizationOptions.of({**arguments, "drift": False})
    if options.precision.kind.own_container:
        raise ValueError(
            f"format: {format} needs an architecture that bitwright and llama.cpp both know; with the "
            f"transformers backend choose another"
        )
    if isinstance(calibration, str | os.PathLike | Mapping | TextFiles):
        for path, _ in TextFiles.of(calibration).files:
            existing_file(path)
    CheckpointWriter(out, overwrite, source=Path(model)).check_place()
    tokens = None

    def before(outline: TorchModel) -> None:
        nonlocal tokens
        options.limits.set_threads()
        if threads is not None:
            outline.torch.set_num_threads(build_info().threads)
        if options.calibration is not None:
            tokens = options.calibration.load(outline).tokens
        budget = Budget.of(memory)
        budget.require(budget.base + needed_bytes(outline, options.method, tokens), outline.folder)

    original = TorchModel(model, before)  # which reads all weights
    target = _target(original, options.precision)
    with made_by(python_call(quantize_with_transformers, arguments)):
        return _write(original, target, options, tokens, Path(out), start)


def _target(model: TorchModel, asked: PrecisionOptions) -> Target:
    """Return what the model's layers are stored in."""
    kind = asked.kind
    shapes = {
        name: (linear.weight.shape[0], linear.weight.shape[1])
        for name, linear in model.linears().items()
    }
    channels = {shape[1] for shape in shapes.values()}
    default = kind.precision(asked.bits, asked.group_size, asked.grid, channels)
    model_type = str(model.checkpoint.config.get("model_type"))
    kind.check_head(model_type, model.tied)
    plan = plan_shapes(
        shapes,
        default,
        include=asked.include,
        exclude=asked.exclude,
        overrides=asked.overrides,
    )
    plan.update(dict.fromkeys(n for n in shapes if kind.keeps_in_float(model_type, n)))
    wished = plan
    plan = without_unstorable(wished, shapes, default, kind, asked.allow_unfused)
    check_plan(plan, shapes, kind, asked.allow_unfused)
    check_stacks(model, kind, plan)
    warn_of_unstorable(wished, plan, shapes, kind, model.folder)
    dtypes = model.dtype, asked.scale_dtype
    return Target(
        *(kind, plan, default, kind.chosen_scale_dtype(*dtypes)),
        wider_dtype=kind.wider_dtype(*dtypes),
    )


def _write(
    model: TorchModel,
    target: Target,
    options: QuantizationOptions,
    tokens: NDArray[np.int32] | None,
    out: Path,
    start: float,
) -> QuantizationReport:
    """Quantize the model and write the folder."""
    kind, checkpoint = target.format, model.checkpoint
    config = kind.spell(plainly_spelled(checkpoint.config))
    in_float: dict[str, Precision | None] = dict.fromkeys(model.never_quantized())
    layers = as_written(model, kind, {**in_float, **target.plan})
    blocks = kind.name_written(model.block_prefix, model.nested)
    config.update(kind.config(target.default, layers, blocks))
    stacks = kind.stacks_experts
    left_out = set(model.unused) if kind.refuses_unknown else set()
    weights = sum(
        math.prod(checkpoint.shape(name)) for name in checkpoint.names() if name not in left_out
    )
    metadata = {"format": kind.metadata}
    with CheckpointWriter(
        out, options.limits.overwrite, metadata=metadata, source=model.folder
    ) as writer:
        writer.inputs.watch_model(checkpoint)
        output = Output(
            writer,
            kind,
            model.experts if stacks else None,
            model.stack_size() if stacks else 0,
            model.nested,
            model.family,
        )
        run = _Run(model, output, target, options, tokens, left_out)
        run.go(options.limits.progress)
        writer.write_json("config.json", config)
        copy_side_files(checkpoint, writer)
        seconds = time.perf_counter() - start
        count = 0 if tokens is None else tokens.size
        name = options.method.method.name
        excluded = [each for each, precision in target.plan.items() if precision is None]
        report = replace(
            run.output.report(out, name, checkpoint, weights, count, seconds),
            in_float=(*excluded, *model.never_quantized()),
        )
        facts = {
            "grid": target.default.grid,
            "scales": stored_scales(target.default.grid, target.scale_dtype).name,
        }
        differ = bool(unfused(kind, target.plan))
        card = model_card(checkpoint, out, kind, [report], facts=facts, unfused=differ)
        writer.write_text(CARD_NAME, card)
        write_report(writer, report)
    return report


@respelled(Old("tokens", "calibration"))
@expands_home
@finds_models
def collect_grams(
    model: str | os.PathLike[str], calibration: TokenSource, *, bos: bool = True
) -> dict[str, NDArray[np.float32]]:
    """Return the second moments of what every linear of a float model reads, as transformers computes it.

    Parameters
    ----------
    model
        Checkpoint folder of any text model that transformers runs; see `quantize_with_transformers`.
    calibration
        Token ids ``[samples, length]``, or what else `load_tokens` reads.
    bos
        Begin every sample of a text with what the tokenizer puts first.

    Returns
    -------
    dict
        ``XᵀX / tokens`` ``[in, in]`` float32 by layer name as the checkpoint has it, of every layer that
        `quantize_with_transformers` can quantize. Layers that read the same array share theirs. An
        expert's is over the tokens routed to it, and of zeros if there is none.

    Raises
    ------
    MissingExtraError, UnsupportedModelError, CheckpointError, CalibrationError, NonFiniteError
        As `quantize_with_transformers`.

    Examples
    --------
    >>> import bitwright
    >>> demo = bitwright.demo_folder()
    >>> grams = bitwright.collect_grams(demo, [[1, 2, 3]])  # doctest: +SKIP
    >>> grams["model.layers.0.mlp.down_proj"].shape  # doctest: +SKIP
    (384, 384)
    """
    loaded = TorchModel(model)
    names = loaded.linears().keys()
    ids = CalibrationOptions(calibration, seed=None, bos=bos).load(loaded, most=None).tokens
    stream = Stream(loaded, ids)
    grams: dict[str, Float32] = {}
    for block in loaded.blocks:
        watch, outputs = stream.observe(block, names, kept=len(stream.chunks))
        inputs = watch.finish()
        _require_finite(inputs, loaded, block)
        for each in inputs:
            for linear in each.readers:
                if linear.name in names:
                    channels = linear.weight.shape[1]
                    empty = np.zeros((channels, channels), np.float32)
                    grams[linear.name] = empty if each.gram is None else each.gram
        stream.replace(outputs)
    return {name: grams[name] for name in names}


def _require_finite(inputs: Sequence[Input], model: TorchModel, block: TorchBlock) -> None:
    for each in inputs:
        if each.gram is not None and not np.isfinite(each.gram.diagonal()).all():
            raise NonFiniteError(
                f"{model.folder}: the inputs of {each.readers[0].name} (block {block.index}) are NaN or "
                f"infinite; check what transformers makes of the original with this text"
            )


@dataclass(frozen=True, eq=False)
class _Kept:
    """An array of the model, and what it held when it was looked at."""

    array: Float32
    values: Float32

    def restore(self) -> None:
        self.array[...] = self.values


class _Run:
    """One pass over a model."""

    def __init__(
        self,
        model: TorchModel,
        output: Output,
        target: Target,
        options: QuantizationOptions,
        tokens: NDArray[np.int32] | None,
        left_out: Collection[str],
    ) -> None:
        self.model = model
        self.left_out = left_out
        self.output = output
        self.plan = target.plan
        self.wanted = {name for name, precision in target.plan.items() if precision is not None}
        self.options = options.method
        self.n_grid = options.awq.n_grid
        self.scale_dtype = target.scale_dtype
        self.wider_dtype = target.wider_dtype
        self.tokens = tokens
        self.changed: dict[str, Float32] = {}  # float tensors into which scales were folded
        self.unread: list[str] = []  # layers that no token reached
        # The powers of two by which layers were multiplied, and those that are too small all the same.
        self.powers: dict[str, int] = {}
        self.coarse: set[str] = set()
        self.wide: set[str] = set()  # those whose scales float16 cannot hold

    def go(self, progress: Progressing) -> None:
        """Quantize and write all tensors."""
        model = self.model
        stream = None if self.tokens is None else Stream(model, self.tokens)
        scaled = self.options.method.scales_first
        if scaled and stream is not None and not stream.scale_groups:
            raise ValueError(
                f"method: {self.options.method.name} finds no norm in the blocks of "
                f"{type(model.module).__name__} that only linears read, so it has nothing to scale; "
                f"use gptq"
            )
        with phase("quantizing", progress, len(model.blocks), unit="blocks") as shown:
            for block in model.blocks:
                reported = len(self.output.layers)
                linears = block.all_linears()
                self.wide |= self._found_wide(linears)
                if stream is None:
                    self._solve([Input([linear]) for linear in linears], self.output.finish)
                else:
                    if self.wanted.isdisjoint(linear.name for linear in linears):
                        pass
                    elif scaled:
                        self._quantize_scaled(block, stream)
                    else:
                        inputs, _ = self._observe(block, stream)
                        self._equalize(block, stream, inputs)
                        self._solve(inputs, self.output.finish)
                    if block is not model.blocks[-1]:  # nobody reads the last hidden states
                        stream.advance(block)
                shown.step(block_error(self.output.layers[reported:]))
        self._carry()
        warn_of_small_weights(model.folder, self.output.format, self.output)
        if self.unread:
            warn(
                f"{model.folder}: no token of the calibration data reached {len(self.unread)} layers, "
                f"such as {self.unread[0]}; they were rounded to nearest"
            )

    def _observe(
        self, block: TorchBlock, stream: Stream, kept: int = 0
    ) -> tuple[list[Input], list[Any]]:
        """Return what a block's linears read, and what it makes of the first `kept` chunks."""
        scaled = self.options.method.scales_first
        watch, outputs = stream.observe(block, self.wanted, magnitudes=scaled, kept=kept)
        inputs = watch.finish()
        _require_finite(inputs, self.model, block)
        for each in inputs:
            if each.gram is None:
                self.unread += [
                    linear.name for linear in each.readers if linear.name in self.wanted
                ]
        return inputs, outputs

    def _solve(
        self,
        inputs: Sequence[Input],
        finish: Callable[[QuantizedLayer], None],
        clips: bool = False,
    ) -> None:
        """Quantize what is planned, put it in the place of the model's weights, and hand it on."""
        for each in inputs:
            shared: Solver | None = None
            for linear in each.readers:
                precision = self.plan.get(linear.name)
                if precision is None:
                    continue
                try:
                    if clips and each.gram is not None and _is_clipped(linear):
                        solve = clip_solver((each.gram,), self.n_grid)
                    else:
                        if shared is None:
                            shared = self._solver(each)
                        solve = shared
                    solve = refined(solve, each.gram, self.options)
                    tensor = self._solved(solve, linear.name, linear.weight, precision)
                except BitwrightError:
                    raise
                except ValueError as error:
                    raise ValueError(
                        f"{self.model.folder}: layer {linear.name}: {error}"
                    ) from error
                stored = tensor.dequantize()
                change = relative_error(linear.weight, stored, each.gram)
                if change > MOST_LOST:
                    self._require_kept(linear, each.gram, solve, precision, tensor, change)
                linear.weight[...] = stored
                finish(
                    QuantizedLayer(
                        linear.name,
                        tensor,
                        change,
                        power=self.powers.get(linear.name, 0),
                        coarse=linear.name in self.coarse,
                        wide=linear.name in self.wide,
                    )
                )

    def _solver(self, inputs: Input) -> Solver:
        """Return how to quantize linears; those that no token reached are rounded."""
        if inputs.gram is None:
            return rtn_solver(StageInputs(), self.options)
        return self.options.solver(StageInputs(inputs.gram))

    def _solved(
        self, solve: Solver, name: str, weight: Float32, precision: Precision
    ) -> QuantizedTensor:
        dtype = self._scale_dtype(name)
        return solve(weight, precision.bits, precision.group_size, precision.grid, dtype)

    def _scale_dtype(self, name: str) -> np.dtype[Any]:
        wider = self.wider_dtype
        return wider if wider is not None and name in self.wide else self.scale_dtype

    def _found_wide(self, linears: Sequence[Linear]) -> set[str]:
        """Return the linears of a block whose scales float16 cannot hold, with their stacks of experts."""
        if self.wider_dtype is None:
            return set()
        planned = [linear for linear in linears if self.plan.get(linear.name) is not None]
        found = {each.name for each in planned if not half_holds(each.weight, self._choice(each))}
        return self.output.with_stacks(found, (each.name for each in planned))

    def _require_kept(
        self,
        linear: Linear,
        gram: Float32 | None,
        solve: Solver,
        precision: Precision,
        tensor: QuantizedTensor,
        lost: float,
    ) -> None:
        """Raise ValueError if a layer loses most of its energy because scales cannot be so small."""

        def lost_if_raised(power: int) -> float:
            raised = np.ldexp(linear.weight, power)
            found = self._solved(solve, linear.name, raised, precision)
            return relative_error(raised, found.dequantize(), gram)

        place = f"{self.model.folder}: layer {linear.name}"
        largest = largest_of([linear.weight])
        require_kept(place, self.output.format, tensor, lost, largest, lost_if_raised)

    def _quantize_scaled(self, block: TorchBlock, stream: Stream) -> None:
        """Quantize a block with AWQ's scales, or without if they do not help."""
        judged = stream.first_chunks(JUDGED_TOKENS)
        inputs, originals = self._observe(block, stream, judged)
        self._equalize(block, stream, inputs)
        kept = [_Kept(array, array.copy()) for array in block.arrays()]
        plain: list[QuantizedLayer] = []
        self._solve(inputs, plain.append)
        loss_before = _loss(block, stream, originals)
        for each in kept:
            each.restore()
        searches, changed = self._scale(block, stream, inputs)
        scaled: list[QuantizedLayer] = []
        self._solve(inputs, scaled.append, clips=self.options.method.clips)
        loss_after = _loss(block, stream, originals)
        trials = Trial(plain, loss_before), Trial(scaled, loss_after)
        if self.output.finish_better(block.index, *trials, searches):
            self.changed.update({name: array.copy() for name, array in changed.items()})
            return
        for each in kept:
            each.restore()
        arrays = {linear.name: linear.weight for linear in block.all_linears()}
        for layer in plain:
            arrays[layer.name][...] = layer.tensor.dequantize()

    def _equalize(self, block: TorchBlock, stream: Stream, inputs: Sequence[Input]) -> None:
        """Multiply linears whose weights are too small for float16 scales, and divide what they read."""
        for each in inputs:
            needs = {}
            for linear in each.readers:
                if linear.name in self.wanted and has_float16_scales(self._choice(linear)):
                    size = size_of(linear.weight, self._choice(linear))
                    if size.coarse:
                        needs[linear.name] = size.room
            if not needs:
                continue
            largest = largest_of(linear.weight for linear in each.readers)
            changed = None
            if each.norm is not None and each.can_scale and each.gram is not None:
                power = self._exact_power(
                    each.norm, each.readers, min(max(needs.values()), most_power(largest))
                )
                if power > 0:
                    scale = np.full(each.norm.weight.shape, 2.0**power, np.float32)
                    changed = self._fold(block, stream, each, each.norm, scale)
            if changed is None or each.norm is None:
                self.coarse.update(needs)
                continue
            if each.mean_abs is not None:
                each.mean_abs = each.mean_abs / 2.0**power
            self.changed.update({name: array.copy() for name, array in changed.items()})
            self.output.divided.append(each.norm.name)
            self.powers |= {
                linear.name: power for linear in each.readers if linear.name in self.wanted
            }

    def _exact_power(self, norm: Norm, readers: Sequence[Linear], most: int) -> int:
        """Return the largest power of two up to `most` that norm and readers hold exactly; 0 for none."""

        def dtype_of(name: str) -> np.dtype[Any]:
            is_quantized = name.removesuffix(".weight") in self.wanted
            return np.dtype(np.float32) if is_quantized else self.model.checkpoint.dtype(name)

        def holds(power: int) -> bool:
            name, bias = f"{norm.name}.weight", f"{norm.name}.bias"
            return (
                gain_is_exact(norm.kind, norm.weight, power, dtype_of(name))
                and (norm.bias is None or moves_exactly(norm.bias, -power, dtype_of(bias)))
                and all(
                    moves_exactly(linear.weight, power, dtype_of(f"{linear.name}.weight"))
                    for linear in readers
                )
            )

        return first_exact(most, holds) if most > 0 else 0

    def _scale(
        self, block: TorchBlock, stream: Stream, inputs: Sequence[Input]
    ) -> tuple[dict[str, ScaleSearch], dict[str, Float32]]:
        """Search scales and fold them; return the searches, and the float tensors that are changed."""
        searches: dict[str, ScaleSearch] = {}
        changed: dict[str, Float32] = {}
        for each in inputs:
            planned = [linear for linear in each.readers if linear.name in self.wanted]
            if each.norm is None or not each.can_scale or not planned:
                continue
            if each.gram is None or each.mean_abs is None:
                continue
            loss = gram_loss(
                [linear.weight for linear in planned], [*map(self._choice, planned)], each.gram
            )
            search = search_scale(each.mean_abs, loss, n_grid=self.n_grid, coarse_to_fine=True)
            if search.ratio > 0:
                folded = self._fold(block, stream, each, each.norm, search.scale)
                if folded is None:
                    continue
                changed.update(folded)
            searches[planned[0].name.rpartition(".")[2]] = search
        return searches, changed

    def _choice(self, linear: Linear) -> GridChoice:
        """Return the grid of a linear, with a search for ranges where one will follow."""
        precision = self.plan[linear.name]
        assert precision is not None
        searches = self.options.grid_search is not False
        ranges = _is_clipped(linear) if self.options.method.clips else searches
        return GridChoice.check(
            linear.weight,
            precision.bits,
            precision.group_size,
            precision.grid,
            self._scale_dtype(linear.name),
            ranges,
        )

    def _fold(
        self, block: TorchBlock, stream: Stream, read: Input, norm: Norm, scale: Float32
    ) -> dict[str, Float32] | None:
        """Fold a scale into a norm and its readers; return the float tensors that are changed, or None if
        the block would compute something else then."""
        checkpoint = self.model.checkpoint
        arrays = [norm.weight, *([] if norm.bias is None else [norm.bias])]
        kept = [
            _Kept(array, array.copy())
            for array in (*arrays, *(linear.weight for linear in read.readers))
        ]

        def fold(dtype: np.dtype[Any]) -> Float32:
            weight, bias, exact = fold_scale(norm.kind, scale, norm.weight, norm.bias, dtype)
            norm.weight[...] = weight
            if norm.bias is not None and bias is not None:
                norm.bias[...] = bias
            for linear in read.readers:
                linear.weight *= exact
            return exact

        # Whether someone else reads the norm is a question of algebra, so it is asked before rounding.
        states = stream.before(0)
        expected = stream.run(block, 0)
        fold(np.dtype(np.float32))
        change = float((stream.run(block, 0) - expected).norm())
        for each in kept:
            each.restore()
        if not change <= MOST_CHANGE * float((expected - states).norm()):
            return None
        divisor = fold(checkpoint.dtype(f"{norm.name}.weight"))
        assert read.gram is not None
        read.gram = read.gram / divisor / divisor[:, None]
        changed = {f"{norm.name}.weight": norm.weight}
        if norm.bias is not None:
            changed[f"{norm.name}.bias"] = norm.bias
        for linear in read.readers:
            if linear.name not in self.wanted:
                name = f"{linear.name}.weight"
                linear.weight[...] = linear.weight.astype(checkpoint.dtype(name))
                changed[name] = linear.weight
        return changed

    def _carry(self) -> None:
        """Write the tensors that stay as they are, and the norms that are changed."""
        checkpoint = self.model.checkpoint
        for name in checkpoint.names():
            if name.removesuffix(".weight") in self.wanted or name in self.left_out:
                continue
            self.output.carry(checkpoint, name, self.changed)


def _is_clipped(linear: Linear) -> bool:
    last = linear.name.rpartition(".")[2].lower()
    return not any(part in last for part in NEVER_CLIPPED)


def _loss(block: TorchBlock, stream: Stream, originals: Sequence[Any]) -> float:
    """Return the mean squared difference of a block's outputs from the original ones."""
    total: float = sum(
        float((stream.run(block, number) - original).square().double().sum())
        for number, original in enumerate(originals)
    )
    return total / sum(int(original.numel()) for original in originals)
