"""Streams a model through a method, block by block."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from rich.console import Console

from bitwright import _kernels
from bitwright.activations import ActivationFile
from bitwright.build import set_num_threads
from bitwright.calibration import TokenSource, load_samples
from bitwright.card import CARD_NAME, made_by, model_card, python_call
from bitwright.checkpoint import CheckpointWriter, copy_side_files, float_config
from bitwright.checkpoint.fingerprint import digest, model_fingerprint
from bitwright.checkpoint.inputs import InputFiles
from bitwright.checkpoint.reader import require_model
from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.distributed import current
from bitwright.drift import Drift, OriginalStream, drift_rows
from bitwright.equalizing import Equalized, equalize, equalize_head
from bitwright.errors import BitwrightError, check_choice
from bitwright.evaluate import parameter_count
from bitwright.formats import FORMATS, Format, FormatName, GroupSize, Precision
from bitwright.formats.engine_names import unfused
from bitwright.gathering import advance, head_moments, require_finite_inputs
from bitwright.home import expands_home
from bitwright.journal import Journal, kept_when_interrupted
from bitwright.known_inputs import FEW_TOKENS, KnownInputs
from bitwright.memory import give_back
from bitwright.methods.awq import DEFAULT_GRID
from bitwright.methods.grid import GridChoice
from bitwright.methods.metrics import Metric
from bitwright.methods.salient import (
    ACTIVATION_METHODS,
    ActivationMethod,
    compute_activation_stats,
)
from bitwright.methods.salient import BITS as SALIENT_BITS
from bitwright.methods.solver import (
    CORRECTED_DAMPING,
    CORRECTED_METHODS,
    DAMPING,
    METHODS,
    PRESETS,
    SCALED_METHODS,
    MethodOptions,
    Preset,
    Solver,
    refined,
    salient_solver,
)
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.matrix_rows import MatrixRows, solved_rows
from bitwright.models.model import Model, load_model
from bitwright.models.operations import Float32
from bitwright.output import (
    Output,
    QuantizedLayer,
    block_error,
    energies_of_sample,
    error_energies,
    sampled_rows,
    summed,
)
from bitwright.planner import RunPlan, Work, describe, plan_run
from bitwright.progress import progress_bar
from bitwright.recipe import Recipe, check_recipe, plan_layers
from bitwright.report import BlockReport, QuantizationReport
from bitwright.scaling import (
    AwqOptions,
    Clip,
    Objective,
    ScaledBlock,
    divide_channels,
    observe_block,
)
from bitwright.small_weights import (
    MOST_LOST,
    largest_of,
    require_kept,
    warn_of_small_weights,
)
from bitwright.states import ChunkPlan, States, read_states
from bitwright.statistics import LayerStatistics, Moments
from bitwright.statistics import gram as gram_of
from bitwright.statistics_files import Statistics
from bitwright.targets import tokens_fingerprint
from bitwright.tensor import Grid, QuantizedTensor
from bitwright.warned import reports_warnings

DEFAULT_SAMPLES = 128
JUDGED_CHUNKS = 1  # that decide between a block with AWQ's scales and one without
_only_checking: ContextVar[bool] = ContextVar("only_checking", default=False)


class _AllIsWell(Exception):  # noqa: N818 - it is no error
    """Ends a call of `quantize` that was only to be checked."""


def check_quantization(
    model: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any
) -> None:
    """Raise what `quantize` would before its first block; nothing is written.

    For those who call it after work of their own, which would be lost."""
    token = _only_checking.set(True)
    try:
        quantize(model, out, **{**options, "progress": False})
    except _AllIsWell:
        pass
    finally:
        _only_checking.reset(token)


@reports_warnings
@expands_home
def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: Literal["gptq", "rtn", "awq", "awq+gptq", "salient"] = "gptq",
    bits: int = 4,
    group_size: GroupSize = "auto",
    format: FormatName = "mlx",
    calibration: TokenSource | None = None,
    *,
    preset: Preset = "default",
    refine: bool | None = None,
    drift: bool | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    grid: Grid | None = None,
    scale_dtype: DTypeLike | None = None,
    damping: float | None = None,
    act_order: bool = True,
    block_size: int = 128,
    grid_search: bool | None = None,
    n_grid: int = DEFAULT_GRID,
    coarse_to_fine: bool = True,
    clip: Clip = "default",
    metric: str | Metric = "mse",
    objective: Objective = "layer",
    salient_ratio: float = 0.01,
    activation_method: ActivationMethod = "rms",
    activations: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    propagate: Literal["quantized", "original"] | None = None,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, int]] | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    allow_requantize: bool = False,
    allow_unfused: bool = False,
    memory: float | None = None,
    resume: bool = True,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a checkpoint folder into another one.

    Weights are read, quantized and written one decoder block at a time. Inside a block the layers are
    taken in the order of the computation, each group of layers with one input together: their statistics
    come from what the already quantized layers before them produce.

    Parameters
    ----------
    model
        Checkpoint folder (config.json and safetensors) or GGUF file, in float.
    out
        Folder to write; it appears when everything is done, or not at all.
    method
        ``"gptq"``, ``"rtn"``, ``"awq"``, ``"awq+gptq"`` (AWQ's scales, then GPTQ on the scaled weights) or
        ``"salient"`` (see `awq_quantize`; 4 bits). All but rtn need `calibration`.
    bits, group_size
        Of every linear layer in the decoder blocks; group size None or -1 is the whole row, ``"auto"`` 64
        or what the format asks for.
    format
        ``"mlx"`` (mlx-lm), ``"gptq"``, ``"awq"`` or ``"compressed-tensors"`` (transformers, vLLM),
        ``"gguf"`` (llama.cpp), ``"marlin"`` (vLLM up to 0.10.1); see docs/formats.md.
    calibration
        A ``.txt``, ``.jsonl`` or ``.npy`` file, token ids ``[samples, length]``, or a list of texts; see
        `bitwright.load_tokens`. For ``"rtn"`` it only serves the grid search and the reported errors.
    preset
        ``"fast"`` is the method by itself. ``"default"`` adds `refine` and `drift` to gptq, awq and
        awq+gptq. ``"best"`` chooses the precision of every layer within the same size, too, and trains
        the scales afterwards; see `bitwright.quantize_best`.
    refine
        After a layer is quantized, improve codes and scales in the metric of its gram, see `refine`. By
        default as the preset says; for every method if it is True.
    drift
        Quantize weights that make up for what the errors of the layers before have changed in a layer's
        inputs; needs `propagate` to be ``"quantized"``. By default as the preset says.
    samples, length, seed
        Take so many samples of so many tokens, chosen by the seed. By default at most 128 samples, of 512
        tokens, or as many as the model knows positions, where `calibration` is text.
    bos
        Begin every sample of a text with what the tokenizer puts first, see `load_tokens`.
    grid
        One that the format stores; its first by default (mlx: affine; gptq: symmetric, or zero_point;
        awq: zero_point, or symmetric; gguf: k where rows are multiples of 256, or affine or symmetric).
    scale_dtype
        Dtype of scales and biases, by default what the format asks for.
    damping
        As for `quantize_gptq`, and for `bitwright.refine`; by default 0.01, and 0.05 with drift correction.
    act_order, block_size, grid_search
        As for `quantize_gptq`; `grid_search` is on by default for gptq and awq+gptq, off for the others.
    n_grid, coarse_to_fine
        AWQ's scales are searched over so many ratios, see `search_scale`; and clipping over half as many
        limits.
    clip
        Clip the range of each group, see `quantize_clipped`: by ``"default"`` of all linears but query and
        key, of ``"all"`` or of ``"none"``. For awq+gptq the grid search takes its place.
    metric
        AWQ's error metric: ``"mse"``, ``"mae"``, ``"relative"``, ``"cosine"``, ``"huber"``, or a function
        of reference and candidate outputs ``[tokens, channels]`` that returns an error per channel. All but
        mse are computed on some of the tokens.
    objective
        What AWQ's metric judges: the outputs of each ``"layer"``, which is exact through the gram, or
        the real outputs of attention and MLP (``"block"``).
    salient_ratio, activation_method
        As for `awq_quantize`; methods other than rms need `activations`.
    activations
        An .npz of layer inputs (see `collect_activations`) in place of `calibration`; not for AWQ's scales.
    statistics
        Folder of statistics of the same model (see `collect_statistics`) in place of `calibration`. They
        are those of the original's layers, so there is no drift correction.
    propagate
        What feeds the next layers: the ``"quantized"`` ones (default) or the ``"original"`` ones.
    embedding_bits, head_bits
        Quantize the embedding (round-to-nearest) and the head (with `method`) too; they stay in float by
        default. A tied head follows the embedding.
    include, exclude
        Shell globs over layer names: quantize only, and leave in float.
    overrides
        ``{glob: {"bits": …, "group_size": …}}`` for layers that differ; the last match wins.
    recipe
        The precision of every layer, see `bitwright.Recipe`, or a file of it, in place of bits and
        group_size; `overrides` count more.
    allow_requantize
        Take a model that is quantized already, in any format that is read, as if its weights were the
        original's. What its first rounding lost stays lost: use the original where there is one.
    allow_unfused
        Let layers differ that vLLM computes as one module (query, key and value; gate and up; all experts
        of a layer), in the formats that it loads. It refuses such a folder; other engines may not.
    memory
        Gigabytes (10⁹ bytes) that the process may take: hidden states that do not fit go to files beside
        `out`. By default three quarters of what is free.
    resume
        Go on where an interrupted run with the same arguments has stopped, after its last complete block,
        with the bytes that an undisturbed run gives; it is refused where anything else than memory, threads
        or ranks has changed. False starts over.
    overwrite
        Replace an existing checkpoint folder `out`, once the new one is complete.
    threads
        Number of threads from now on, in the whole process.
    progress
        Show a progress bar with the time left and each block's error, on standard error.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    MemoryBudgetError
        If the run would take more memory than it may; the message tells how much it needs.
    ResumeError
        If an interrupted run had other arguments or inputs; the message tells which.
    CheckpointError, CalibrationError, StatisticsError, NonFiniteError, OutputError, ValueError, TypeError
        If anything is wrong with what was given; the message says what and where. Nothing is written then,
        but what a run needs to go on from after an interruption, in ``.NAME.work`` beside `out`.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.quantize(
    ...         demo, f"{folder}/q", bits=4, calibration=demo / "calibration.txt", samples=8,
    ...         length=128, progress=False,
    ...     )
    >>> report.layer_bits_per_weight
    4.5
    """
    arguments = dict(locals())
    start = time.perf_counter()
    require_model(model)
    for name, value, known in (
        ("method", method, tuple(METHODS)),
        ("format", format, tuple(FORMATS)),
        ("propagate", propagate or "quantized", ("quantized", "original")),
        ("preset", preset, PRESETS),
    ):
        check_choice(name, value, known)
    if statistics is not None:
        _check_statistics_alone(arguments)
    if preset == "best":
        from bitwright.best import quantize_best  # which calls this function again

        with made_by(python_call(quantize, arguments)):
            del arguments["preset"]
            return quantize_best(**arguments)
    if threads is not None:
        set_num_threads(threads)
    awq = AwqOptions(n_grid, coarse_to_fine, clip, metric, objective)
    corrected = drift
    if drift is None:
        corrected = preset != "fast" and method in CORRECTED_METHODS
        corrected &= propagate != "original" and statistics is None
    elif drift and propagate == "original":
        raise ValueError("drift: with propagate original there is none to correct")
    if damping is None:
        damping = CORRECTED_DAMPING if corrected else DAMPING
    options = MethodOptions(
        method,
        damping,
        act_order,
        block_size,
        grid_search,
        salient_ratio,
        activation_method,
        preset != "fast" and method in CORRECTED_METHODS if refine is None else refine,
        bool(corrected),
    )
    unknown = calibration is None and activations is None and statistics is None
    _check_inputs(options, calibration, activations, unknown)
    if refine and unknown:
        raise ValueError("refine: needs calibration data")
    if drift and calibration is None:
        raise ValueError("drift: needs calibration data, which the model is run on")

    original = load_model(model)
    original.warn_of_unused()
    declared = original.checkpoint.config != float_config(original.checkpoint.config)
    if original.format and (declared or original.quantized_layers()) and not allow_requantize:
        raise ValueError(
            f"{original.checkpoint.folder}: is quantized already ({original.format.name}); start from the "
            f"original, or say that it may be rounded again: allow_requantize (--allow-requantize). "
            f"bitwright convert changes the format alone"
        )
    kind = FORMATS[format]
    if grid is None and method == "salient" and "symmetric" in kind.grids:
        grid = "symmetric"
    if recipe is not None:
        per_layer = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        check_recipe(per_layer, original)
        bits, group_size = per_layer.most_common
        overrides = per_layer.overrides() | dict(overrides or {})
    default = kind.precision(bits, group_size, grid, original.input_channels())
    plan = plan_layers(
        original,
        kind,
        default,
        include=include,
        exclude=exclude,
        overrides=overrides,
        embedding_bits=embedding_bits,
        head_bits=head_bits,
        allow_unfused=allow_unfused,
    )
    if method == "salient":
        for name, planned in plan.items():
            rounded = name == original.names.embedding
            if planned and planned.bits != SALIENT_BITS and not rounded:
                raise ValueError(
                    f"{name}: method salient stores {SALIENT_BITS} bits, no other number"
                )
    dtype = kind.scale_dtype(original.dtype)
    if scale_dtype is not None:
        dtype = kind.check_scale_dtype(np.dtype(scale_dtype))
    found = None
    if statistics is not None:
        found = Statistics(statistics)
        found.check(original)
    loaded = None
    if calibration is not None:
        loaded = load_samples(
            calibration,
            tokenizer=original.checkpoint.folder,
            length=length,
            samples=samples,
            seed=seed,
            vocab_size=original.config.vocab_size,
            positions=original.positions,
            bos=bos,
            most=DEFAULT_SAMPLES,
        )

    facts = {"preset": preset, "grid": default.grid, "scales": dtype.name}
    with (
        nullcontext() if activations is None else ActivationFile(activations) as inputs,
        made_by(python_call(quantize, arguments)),
    ):
        run = Run(
            original,
            kind,
            plan,
            options,
            awq,
            dtype,
            None if loaded is None else loaded.tokens,
            inputs,
            propagate != "original" and found is None,
            memory=memory,
            resume=resume,
            statistics=found,
        )
        identity = {
            "bits": bits,
            "group_size": group_size,
            "grid": default.grid,
            "bos": None if loaded is None else loaded.bos,
        }
        return run.write(out, default, overwrite, progress, start, facts, identity)


def as_written(
    model: Model, format: type[Format], plan: Mapping[str, Precision | None]
) -> dict[str, Precision | None]:
    """Return the plan by the names that are written: of experts that are stacked, those of the stacks."""
    places = model.experts if format.stacks_experts else {}
    return {
        format.name_written(
            places[name].stacked_name if name in places else name, model.nested
        ): precision
        for name, precision in plan.items()
    }


def _check_experts(
    model: Model, format: type[Format], plan: Mapping[str, Precision | None]
) -> None:
    """Raise ValueError unless the experts of a layer that are stored as one tensor are planned alike."""
    if not format.stacks_experts:
        return
    seen: dict[str, Precision | None] = {}
    for name, place in model.experts.items():
        if seen.setdefault(place.stacked_name, plan[name]) != plan[name]:
            raise ValueError(
                f"{name}: the {format.name} format stores all experts of a layer in one tensor, so "
                f"include, exclude and overrides must treat them alike"
            )


def _check_inputs(
    options: MethodOptions,
    calibration: TokenSource | None,
    activations: str | os.PathLike[str] | None,
    unknown: bool,
) -> None:
    method = options.method
    if method != "rtn" and unknown:
        raise ValueError(f"calibration: {method} needs text or token ids; method rtn does without")
    if activations is not None and calibration is not None:
        raise ValueError("activations: take the place of calibration; pass one of the two")
    if activations is not None and method in SCALED_METHODS:
        raise ValueError(f"activations: {method} runs the model, so it needs calibration instead")
    if method != "salient":
        return
    if not 0 <= options.salient_ratio <= 1:
        raise ValueError(f"salient_ratio: expected 0 to 1, got {options.salient_ratio}")
    check_choice("activation_method", options.activation_method, ACTIVATION_METHODS)
    if activations is None and options.activation_method != "rms":
        raise ValueError("activation_method: mean and max need activations; calibration gives rms")


def _check_statistics_alone(given: Mapping[str, Any]) -> None:
    """Raise ValueError if what statistics stand for, or what they cannot do, is asked for beside them."""
    instead = [name for name in ("calibration", "activations") if given[name] is not None]
    if instead:
        raise ValueError(f"statistics: take the place of {instead[0]}; pass one of the two")
    chosen = [name for name in ("samples", "length", "seed") if given[name]]
    chosen += ["bos"] if not given["bos"] else []
    if chosen:
        raise ValueError(
            f"{chosen[0]}: the tokens of statistics were chosen when they were collected"
        )
    reasons = {
        "preset": (given["preset"] == "best", "best trains on tokens"),
        "drift": (bool(given["drift"]), "there are only the original's layers in statistics"),
        "propagate": (given["propagate"] == "quantized", "statistics are of the original's layers"),
    }
    if given["method"] in SCALED_METHODS:
        reasons |= {
            "metric": (given["metric"] != "mse", "statistics are enough for mse only"),
            "objective": (given["objective"] != "layer", "statistics are enough for layer only"),
        }
    for name, (is_asked, reason) in reasons.items():
        if is_asked:
            raise ValueError(f"{name}: {reason}, so it needs calibration data instead")


Piece = tuple[slice, Float32]  # rows of a layer, and their weights


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


class Run:
    """One pass over a model.

    Of the calibration it holds the hidden states before the current block and the inner states of the
    current stage, for all tokens or as many as fit; of the weights, those of a stage.

    Parameters
    ----------
    model
        What is quantized.
    format, plan, options, awq, scale_dtype
        How.
    tokens, activations
        What the layers' inputs are known from; both None for none.
    propagate
        Whether layers see what the quantized ones before them compute.
    quantized
        A quantized form of the model whose layers are taken as they are, in place of a method's.
    memory
        Gigabytes that the run may take; by default three quarters of what is free.
    resume
        Whether to go on where an interrupted run of the same identity has stopped.
    statistics
        What the layers' inputs are known from in place of tokens.
    """

    def __init__(
        self,
        model: Model,
        format: type[Format],
        plan: Mapping[str, Precision | None],
        options: MethodOptions,
        awq: AwqOptions,
        scale_dtype: np.dtype[Any],
        tokens: NDArray[np.int32] | None,
        activations: ActivationFile | None,
        propagate: bool,
        quantized: Model | None = None,
        memory: float | None = None,
        resume: bool = True,
        statistics: Statistics | None = None,
    ) -> None:
        self.model = model
        self.format = format
        self.quantized = quantized
        self.plan = plan
        self.options = options
        self.scale_dtype = scale_dtype
        self.tokens = tokens
        self.activations = activations
        self.statistics = statistics
        self.propagate = propagate
        self.awq = awq if options.method in SCALED_METHODS else None
        self.memory = memory
        self.resume = resume
        self.ranks = current()
        self.changed: dict[str, Float32] = {}  # float tensors into which scales were folded
        # Of the layers in this block: the powers of two by which they were multiplied, and those whose
        # weights are small for the dtype of scales all the same.
        self.powers: dict[str, int] = {}
        self.coarse: set[str] = set()
        self.output: Output
        self.resident: int | None = None
        self.states: States | None = None
        self.original: States | None = None
        self.packed = model.packed_tensors()
        self.stacked = model.stacked_tensors()
        self.left_out = model.left_out(format)
        self.shapes = model.linear_shapes()

    def write(
        self,
        out: str | os.PathLike[str],
        default: Precision,
        overwrite: bool,
        progress: bool,
        start: float,
        facts: Mapping[str, object],
        identity: Mapping[str, object],
    ) -> QuantizationReport:
        """Write the folder.

        `default` is the precision that config.json takes for granted, `facts` are for the model card, and
        `identity` is what decides the result beside what the run knows itself."""
        model, kind = self.model, self.format
        config = model.config_for(kind)
        _check_experts(model, kind, self.plan)
        written = as_written(model, kind, self.plan)
        blocks = kind.name_written(model.names.block.format(""), model.nested)
        config.update(kind.config(default, written, blocks))
        experts = model.experts if kind.stacks_experts else None
        stack_size = model.config.experts.count if model.config.experts else 0
        work = WorkFolder(out)
        self._watch(work.inputs)
        first_writer = CheckpointWriter(
            out,
            overwrite,
            metadata={"format": kind.metadata},
            source=model.checkpoint.source,
            container=kind.files(model.checkpoint),
            work=work,
        )
        self.ranks.on_first(first_writer.check_place)
        self._check_activations()
        planned = self._planned(Path(out), progress)
        if _only_checking.get():
            raise _AllIsWell
        self.resident = planned.resident
        writer = first_writer if self.ranks.is_first else None
        with work, kept_when_interrupted(work):
            journal = Journal(work, self._identity(identity), start)
            state = journal.begin(self.resume)
            with nullcontext() if writer is None else writer:
                self.output = Output(writer, kind, experts, stack_size, model.nested)
                self._go(journal, state, writer, progress)
                # There may be more to do before the folder appears.
                self.states = self.original = None
                warn_of_small_weights(model.checkpoint.folder, kind, self.output)
                report = self.output.report(
                    Path(out),
                    self.options.method if self.quantized is None else "refine",
                    model.checkpoint,
                    parameter_count(model, self.left_out),
                    self._calibration_tokens(),
                    journal.seconds(),
                )
                if writer is not None:
                    writer.write_json("config.json", config)
                    copy_side_files(model.checkpoint, writer)
                    differ = bool(unfused(kind, self.plan))
                    card = model_card(
                        model.checkpoint, out, kind, [report], facts=facts, unfused=differ
                    )
                    writer.write_text(CARD_NAME, card)
        self.output.verify(out)
        return replace(self.ranks.broadcast(report), seconds=journal.seconds())

    def _check_activations(self) -> None:
        """Raise CalibrationError unless the activations file has the inputs of all layers."""
        if self.activations is None:
            return
        for index, layout in enumerate(self.model.layouts):
            prefix = self.model.block_prefix(index)
            for stage in layout.stages:
                for name in stage.linears:
                    if self.plan[prefix + name]:
                        names = (prefix + name, *(prefix + other for other in stage.linears))
                        self.activations.require(names, layout.linears[name][1])
        head = self.model.names.head
        if self.plan.get(head) is not None:
            self.activations.require((head,), self.model.config.hidden_size)

    def _planned(self, out: Path, progress: bool) -> RunPlan:
        """Plan memory, disk and, if it is shown, time."""
        tokens = self.tokens
        samples, length = (0, 0) if tokens is None else tokens.shape
        work = Work(
            self.model,
            self.plan,
            self.options,
            self.propagate,
            samples * length,
            length,
            self.scale_dtype,
            known=self.statistics is not None or self.activations is not None,
            seen_bytes=0 if self.activations is None else self.activations.largest_bytes(),
        )
        plan = plan_run(work, self.memory, out, timed=progress)
        if progress and self.ranks.is_first:
            Console(stderr=True).print(describe(plan), highlight=False, soft_wrap=True)
        return plan

    def _calibration_tokens(self) -> int:
        if self.statistics is not None:
            return self.statistics.tokens
        if self.activations is not None:
            return self.activations.token_count()
        return 0 if self.tokens is None else self.tokens.size

    def _identity(self, identity: Mapping[str, object]) -> dict[str, object]:
        """Return what decides the result, in words for whoever changes it between two runs."""
        layers = {name: precision and asdict(precision) for name, precision in self.plan.items()}
        return {
            "version of bitwright": version("bitwright"),
            "model": model_fingerprint(self.model.checkpoint),
            "quantized model": self.quantized and model_fingerprint(self.quantized.checkpoint),
            "calibration": None if self.tokens is None else tokens_fingerprint(self.tokens),
            "activations": self.activations and self.activations.fingerprint(),
            "statistics": self.statistics and self.statistics.fingerprint(),
            "format": self.format.name,
            **asdict(self.options),
            **{name: _named(value) for name, value in asdict(self.awq or AwqOptions()).items()},
            "scale_dtype": self.scale_dtype.name,
            "propagate": self.propagate,
            "fixed_order": self.ranks.fixed_order,
            **identity,
            "precision of layers": digest(json.dumps(layers, sort_keys=True).encode()),
        }

    def _watch(self, inputs: InputFiles) -> None:
        """Note the files that nobody may change meanwhile."""
        inputs.watch_model(self.model.checkpoint)
        if self.quantized is not None:
            inputs.watch_model(self.quantized.checkpoint)
        if self.statistics is not None:
            inputs.watch(sorted(self.statistics.folder.iterdir()))
        if self.activations is not None:
            inputs.watch([self.activations.path])

    def _go(
        self,
        journal: Journal,
        state: Mapping[str, Any] | None,
        writer: CheckpointWriter | None,
        progress: bool,
    ) -> None:
        """Quantize and write all tensors."""
        model = self.model
        count = model.config.num_hidden_layers
        prefixes = tuple(model.block_prefix(index) for index in range(count))
        rope = None if self.tokens is None else model.rotation(self.tokens.shape[1])
        first = 0
        if state is not None:
            with journal.going_on():
                first = int(state["blocks"])
                self.output.restore(state["output"])
                if writer is not None:
                    writer.restore(state["writer"])
                journal.check_files(state)
        self._begin(journal, state, rope)
        bar = progress_bar("quantizing", progress and self.ranks.is_first, "blocks")
        with bar:
            task = bar.add_task("", total=count, completed=first, figures="")
            for index, prefix in list(enumerate(prefixes))[first:]:
                reported = len(self.output.layers)
                equalized = self._equalized(model.block(index), prefix)
                block = equalized.block
                if self.statistics is not None:
                    inputs = KnownInputs(self.statistics, model, index, equalized)
                    self._quantize_by_statistics(block, index, inputs)
                elif self.states is None or rope is None:
                    for stage in block.stages:
                        solvers = self._solvers_from_file(equalized, prefix, stage)
                        self._quantize_stage(
                            block, prefix, stage, None, self.output.finish, solvers.get, False
                        )
                        block.release(stage)
                else:
                    self._calibrate_block(block, index, self.states, rope)
                self._carry(name for name in model.checkpoint.names() if name.startswith(prefix))
                bar.update(task, advance=1, figures=block_error(self.output.layers[reported:]))
                followed = self._is_followed(index)
                kept = {"hidden": self.states, "original": self.original} if followed else {}
                journal.commit(index + 1, self.output, writer, kept)
        self._quantize_head()
        self._carry(name for name in model.checkpoint.names() if not name.startswith(prefixes))
        for name, shape in model.quantized_layers().items():
            target = model.names.embedding if name == model.embedding_name else name
            if self.plan.get(target) is not None:
                continue
            weight = np.empty(shape, model.dtype)
            if name in (model.embedding_name, model.head_name):
                for rows, piece in model.rows(name).pieces(np.dtype(np.float32)):
                    weight[rows] = piece
            else:
                weight[...] = model.weight(name, shape)
            self.output.add(f"{target}.weight", weight)

    def _begin(
        self, journal: Journal, state: Mapping[str, Any] | None, rope: Rotation | None
    ) -> None:
        """Quantize the embedding if it is planned, and look up the tokens in it; or read the states that an
        interrupted run has left."""
        model, tokens = self.model, self.tokens
        table = self._embedding() if state is None else None
        if tokens is None or rope is None:
            return
        first = drift_rows(tokens.size, rope) if self.options.drift else 0
        chunks = -(-first // rope.chunk_rows)
        plan = ChunkPlan.shared(
            tokens.size, rope.chunk_rows, chunks, self.resident, journal.scratch
        )
        plans = {"hidden": plan}
        if self.options.drift:
            plans["original"] = plan.below(chunks)
        flat, width = tokens.reshape(-1), model.config.hidden_size
        found: dict[str, States] = {}
        for name, each in plans.items():
            if state is not None and name in state["states"]:
                file = journal.states_file(state["states"][name], each.rows * width * 4)
                rows = read_states(file, each, width)
            elif state is not None:
                continue  # nobody asks for them any more
            elif name == "hidden":
                rows = (model.embed(flat[each.place(i)], table) for i in each.numbers)
            else:
                original = model.embedding_table()
                rows = (model.embed(flat[each.place(i)], original) for i in each.numbers)
            found[name] = States(each, rows)
        self.states, self.original = found.get("hidden"), found.get("original")

    def _embedding(self) -> NDArray[Any] | MatrixRows | None:
        """Quantize the embedding if it is planned; return the matrix to look tokens up in, None if nobody
        will."""
        name = self.model.names.embedding
        precision = self.plan.get(name)
        if precision is None:
            return None if self.tokens is None else self.model.embedding_table()
        own = self._known_solver(name, None)
        if own is None:
            own = OwnSolver(METHODS["rtn"](None, self.options), None)
        pieces = self._matrix_pieces(self.model.embedding_name, whole=False)
        tensor, _ = self._quantize(name, pieces, own, precision, self.output.finish)
        return MatrixRows(tensor.dequantize, tensor.shape, f"layer {name}")

    def _calibrate_block(
        self, block: DecoderBlock, index: int, states: States, rope: Rotation
    ) -> None:
        """Quantize a block and move the states past it."""
        prefix = self.model.block_prefix(index)
        if self.awq is None or not any(
            self.plan[prefix + name] for stage in block.stages for name in stage.linears
        ):
            self._pass(block, index, states, rope, self.output.finish)
            return
        # AWQ judges scales on what the float block sees and computes, and the block as a whole by
        # how far the quantized one then is from it.
        # Rounding asks for no statistics, so those that are known do for the reported errors, and some
        # of the tokens for the comparison.
        regather = self.propagate and (self.options.method != "awq" or self.options.drift)
        # What experts see is not among the facts: the passes gather it, and from all tokens.
        judged = None if regather or block.layout.experts else JUDGED_CHUNKS
        original = states.copy()
        facts = observe_block(block, original, rope, self.awq, judged if self.propagate else None)
        block.weights.clear()
        for stage, fact in facts.items():
            require_finite_inputs(np.isfinite(fact.mean_abs).all(), self.model, stage, index)
        scaled = ScaledBlock(
            block,
            facts,
            self._grid_choices(block, prefix),
            lambda name: self.model.stored_dtype(prefix + name),
            rope,
            self.awq,
        )
        clips = scaled if self.options.clips else None
        known = None
        if regather:
            scaled.scale()
            scaled.forget_grams(self.options.clips)
        else:
            known = {stage: fact.gram for stage, fact in facts.items() if fact.gram is not None}
        plain, plain_layers = states.copy(judged), list[QuantizedLayer]()
        after_plain = None if self.original is None else self.original.copy()
        before, self.original = self.original, after_plain
        self._pass(block, index, plain, rope, plain_layers.append, known, whole=True)
        if after_plain is not None:
            after_plain.delete()
        self.original = before
        if not regather:
            scaled.scale()  # which changes what is known, in place
        layers: list[QuantizedLayer] = []
        goes_on = self.propagate and self._is_followed(index)
        after = states.copy(None if goes_on or regather else judged)
        self._pass(scaled.block, index, after, rope, layers.append, known, clips, whole=True)
        before_loss, after_loss = (
            self._mean_square(each, original, judged) for each in (plain, after)
        )
        kept = after_loss < before_loss
        if kept:
            self.changed.update(
                (prefix + name, scaled.block.weights.read(name)) for name in scaled.changed
            )
        following = states
        if not self.propagate:
            following = original
        elif goes_on and kept:
            following = after
        elif goes_on and judged is None:
            following = plain
        elif goes_on:
            self._forward(block, prefix, plain_layers, states, rope)
        for each in (states, original, plain, after):
            if each is not following:
                each.delete()
        self.states = following
        for layer in layers if kept else plain_layers:
            self.output.finish(layer)
        self.output.blocks.append(
            BlockReport(index, before_loss, after_loss, kept, scaled.searches)
        )

    @staticmethod
    def _forward(
        block: DecoderBlock,
        prefix: str,
        layers: Iterable[QuantizedLayer],
        states: States,
        rope: Rotation,
    ) -> None:
        """Move the states past a block whose layers are quantized."""
        tensors = {f"{layer.name.removeprefix(prefix)}.weight": layer.tensor for layer in layers}

        def read(name: str) -> Float32:
            tensor = tensors.get(name)
            return block.weights.read(name) if tensor is None else tensor.dequantize()

        block.reading(read).pass_all(states.chunks, rope)
        states.forget_inner()

    def _mean_square(self, states: States, original: States, below: int | None) -> float:
        """Return the mean squared difference, over all chunks or those whose number is below a limit."""
        mine: dict[int, tuple[float, int]] = {}
        chunks = zip(states.plan.numbers, states.hidden(), original.hidden(), strict=False)
        for number, rows, others in chunks:
            if below is None or number < below:
                change = rows - others
                mine[number] = _kernels.inner_product(change, change), change.size
        found = sorted(chunk for part in self.ranks.gather(mine) for chunk in part.items())
        return sum(total for _, (total, _) in found) / sum(count for _, (_, count) in found)

    def _pass(
        self,
        block: DecoderBlock,
        index: int,
        states: States,
        rope: Rotation,
        finish: Callable[[QuantizedLayer], None],
        known: Mapping[Stage, Float32] | None = None,
        clips: ScaledBlock | None = None,
        whole: bool = False,
    ) -> None:
        """Quantize a block stage by stage and move the states past it.

        While a stage is computed chunk by chunk, the next stage's statistics are gathered from the same
        chunk: every product of the forward pass is done once, and on warm data. Where grams are `known`
        they are not gathered. With `clips`, some linears are quantized as it says. With `whole`, what is
        computed is what the quantized block does, to the end, whoever reads it. Weights are forgotten when
        they are done.
        """
        prefix, known = self.model.block_prefix(index), known or {}
        original = OriginalStream(block, self.original, rope)

        def gatherers(stage: Stage | None) -> tuple[LayerStatistics | None, Drift]:
            planned = () if stage is None or stage in known else stage.linears
            planned = tuple(name for name in planned if self.plan[prefix + name])
            statistics = None
            if planned:
                statistics = LayerStatistics(block.layout.linears[planned[0]][1])
            return statistics, original.drift(stage, statistics)

        statistics, drift = gatherers(block.stages[0])
        advance(block, None, block.stages[0], states, rope, statistics, drift)
        for stage, following in zip(block.stages, (*block.stages[1:], None), strict=True):
            gram = known.get(stage)
            fallback = False
            if statistics is not None:
                moments = statistics.gather()
                require_finite_inputs(moments.is_finite(), self.model, stage, index)
                drift.gather(moments, statistics.first_tokens)
                fallback = stage.expert is not None and moments.tokens < FEW_TOKENS
                if fallback:
                    moments = self._gram_of_all(block, stage, states)
                gram = moments.gram
                del moments

            def own_solver(
                name: str, stage: Stage = stage, gram: Float32 | None = gram
            ) -> OwnSolver | None:
                solve = None if clips is None else clips.clip_solver(stage, name, gram)
                return None if solve is None else OwnSolver(solve, gram)

            self._quantize_stage(
                block,
                prefix,
                stage,
                gram,
                finish,
                own_solver,
                whole or self.propagate,
                fallback,
                drift,
            )
            del gram, own_solver
            if following is None and not whole and not self._is_followed(index):
                return  # nobody reads the last hidden states
            statistics, drift = gatherers(following)
            advance(block, stage, following, states, rope, statistics, drift)
            block.release(stage)
        original.finish()
        states.forget_inner()

    @staticmethod
    def _gram_of_all(block: DecoderBlock, stage: Stage, states: States) -> Moments:
        """Gather what an expert that is hardly ever chosen would see if it always were: the gram of its few
        tokens says little of those to come."""
        statistics = LayerStatistics(block.layout.linears[stage.linears[0]][1])
        for number, chunk in zip(states.plan.numbers, states.chunks(), strict=True):
            statistics.add(block.as_if_routed(stage, chunk), states.plan.leaf(number))
        return statistics.gather()

    def _quantize_by_statistics(self, block: DecoderBlock, index: int, inputs: KnownInputs) -> None:
        """Quantize a block by the statistics of the original's.

        Whether AWQ's scales are kept, the errors of its layers' outputs decide: the sum of tr(Δ G Δᵀ) over
        all of them, with the scaled gram for scaled weights."""
        prefix = self.model.block_prefix(index)
        if self.awq is None or not any(
            self.plan[prefix + name] for stage in block.stages for name in stage.linears
        ):
            self._solve_known(block, prefix, inputs, lambda layer, _: self.output.finish(layer))
            return
        plain, before = self._judged(block, prefix, inputs)
        scaled = ScaledBlock(
            block,
            inputs.facts(),
            self._grid_choices(block, prefix),
            lambda name: self.model.stored_dtype(prefix + name),
            Rotation(1, {}),
            self.awq,
        )
        block.weights.clear()
        scaled.scale()
        scaled.forget_grams(self.options.clips)
        layers, after = self._judged(scaled.block, prefix, inputs, scaled)
        kept = after < before
        if kept:
            self.changed.update(
                (prefix + name, scaled.block.weights.read(name)) for name in scaled.changed
            )
        for layer in layers if kept else plain:
            self.output.finish(layer)
        self.output.blocks.append(BlockReport(index, before, after, kept, scaled.searches))

    def _judged(
        self,
        block: DecoderBlock,
        prefix: str,
        inputs: KnownInputs,
        scaled: ScaledBlock | None = None,
    ) -> tuple[list[QuantizedLayer], float]:
        """Return the layers of a block, quantized by statistics, and the error of all their outputs."""
        layers: list[QuantizedLayer] = []
        errors: list[float] = []

        def finish(layer: QuantizedLayer, gram: Float32 | None) -> None:
            layers.append(layer)
            if gram is not None:
                weight = block.weights[f"{layer.name.removeprefix(prefix)}.weight"]
                errors.append(self._output_error(layer, weight, gram))

        self._solve_known(block, prefix, inputs, finish, scaled)
        return layers, sum(errors)

    def _solve_known(
        self,
        block: DecoderBlock,
        prefix: str,
        inputs: KnownInputs,
        finish: Callable[[QuantizedLayer, Float32 | None], None],
        scaled: ScaledBlock | None = None,
    ) -> None:
        """Quantize a block stage by stage, and hand on each layer with its gram."""
        clips = scaled if self.options.clips else None
        for stage in block.stages:
            if any(self.plan[prefix + name] for name in stage.linears):
                gram, few = inputs.gram(stage, None if scaled is None else scaled.scales)

                def own_solver(
                    name: str, stage: Stage = stage, gram: Float32 | None = gram
                ) -> OwnSolver | None:
                    if gram is None:  # no token ever came here
                        return OwnSolver(METHODS["rtn"](None, self.options), None)
                    solve = None if clips is None else clips.clip_solver(stage, name, gram)
                    return None if solve is None else OwnSolver(solve, gram)

                def hand_on(layer: QuantizedLayer, gram: Float32 | None = gram) -> None:
                    finish(layer, gram)

                self._quantize_stage(block, prefix, stage, gram, hand_on, own_solver, False, few)
                del gram, own_solver, hand_on
            block.release(stage)

    def _output_error(self, layer: QuantizedLayer, weight: Float32, gram: Float32) -> float:
        """Return tr(Δ G Δᵀ), each rank adding up its share of the rows."""
        errors = []
        for rows in self.ranks.rows(len(weight)):
            change = layer.tensor.rows(rows.start, rows.stop).dequantize()
            change -= weight[rows]
            errors.append(float(_kernels.row_quadratic_forms(change, gram).sum()))
        return self.ranks.total(errors)

    def _grid_choices(self, block: DecoderBlock, prefix: str) -> dict[str, GridChoice]:
        """Return the grid of each linear as AWQ's search rounds to it: with a search for ranges where one
        will follow."""
        choices = {}
        for stage in block.stages:
            for name in stage.linears:
                precision = self.plan[prefix + name]
                if precision is not None:
                    choices[name] = self._grid_choice(precision, block.layout.linears[name])
        return choices

    def _grid_choice(self, precision: Precision, shape: tuple[int, int]) -> GridChoice:
        return GridChoice.check(
            np.broadcast_to(np.float32(0), shape),
            precision.bits,
            precision.group_size,
            precision.grid,
            self.scale_dtype,
            self._searches_ranges(),
        )

    def _searches_ranges(self) -> bool:
        if self.options.method != "awq":
            return self.options.grid_search is not False
        # Also for the linears that are not clipped: scales chosen so are better (docs/design.md).
        return self.awq is not None and self.awq.clip != "none"

    def _is_followed(self, index: int) -> bool:
        """Tell whether something after block `index` is calibrated."""
        last = index + 1 == self.model.config.num_hidden_layers
        return not last or self.plan.get(self.model.names.head) is not None

    def _quantize_stage(
        self,
        block: DecoderBlock,
        prefix: str,
        stage: Stage,
        gram: Float32 | None,
        finish: Callable[[QuantizedLayer], None],
        own_solver: Callable[[str], "OwnSolver | None"],
        replace: bool,
        fallback: bool = False,
        drift: Drift | None = None,
    ) -> None:
        """Quantize what is planned of a stage; `replace` the block's weights by what is stored."""
        planned = {name: self.plan[prefix + name] for name in stage.linears}
        pieces: dict[str, list[Piece]] = {}
        for name, precision in planned.items():
            if precision is not None:
                place = f"{name}.weight"
                weight = block.weights[place]
                if replace:
                    del block.weights[place]
                pieces[name] = self._pieces(weight)
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
            own = own_solver(name) or self._known_solver(prefix + name, gram) or shared
            if own is None:
                own = shared = self._method_solver(gram)
            tensor, stored = self._quantize(
                prefix + name, pieces.pop(name), own, precision, finish, fallback
            )
            if replace:
                block.weights[f"{name}.weight"] = tensor.dequantize() if stored is None else stored

    def _method_solver(self, gram: Float32 | None) -> OwnSolver:
        return OwnSolver(METHODS[self.options.method](gram, self.options), gram)

    def _pieces(self, weight: Float32) -> list[Piece]:
        """Return this rank's pieces of a layer: all rows where the method looks at them together."""
        whole = self.options.method == "salient"
        pieces = [slice(0, len(weight))] if whole else self.ranks.rows(len(weight))
        return [(rows, weight[rows]) for rows in pieces]

    def _matrix_pieces(self, name: str, power: int = 0, *, whole: bool) -> MatrixPieces:
        """Return this rank's pieces of the embedding or the head, which are never all in float32 at a time
        unless they are `whole`."""
        matrix = self.model.rows(name)
        count, width = matrix.shape
        if whole:
            return MatrixPieces(matrix, [slice(0, count)], power)
        step = solved_rows(width)
        return MatrixPieces(
            matrix,
            [
                slice(first, min(first + step, mine.stop))
                for mine in self.ranks.rows(count)
                for first in range(mine.start, mine.stop, step)
            ],
            power,
        )

    def _known_solver(self, name: str, gram: Float32 | None) -> OwnSolver | None:
        """Return what takes a layer of the model that is quantized already."""
        if self.quantized is None:
            return None
        if name == self.model.names.embedding:
            name = self.quantized.embedding_name
        tensor = self.quantized.quantized(name)
        return None if tensor is None else OwnSolver(tensor, gram)

    def _solvers_from_file(
        self, equalized: Equalized, prefix: str, stage: Stage
    ) -> dict[str, OwnSolver]:
        """Return how to quantize a stage's linears by the activations file; nothing without one."""
        if self.activations is None:
            return {}
        return {
            name: self._solver_from_file(
                self.activations,
                (prefix + name, *(prefix + other for other in stage.linears)),
                equalized.block.layout.linears[name][1],
                equalized.scale(stage),
            )
            for name in stage.linears
            if self.plan[prefix + name]
        }

    def _solver_from_file(
        self,
        activations: ActivationFile,
        names: Sequence[str],
        channels: int,
        scale: Float32 | None = None,
    ) -> OwnSolver:
        inputs = activations.tokens(names, channels)
        if scale is not None:
            inputs = inputs / scale
        gram = gram_of(inputs)
        if self.options.method == "salient":
            stats = compute_activation_stats(inputs, self.options.activation_method)
            return OwnSolver(salient_solver(gram, self.options, stats), gram)
        return self._method_solver(gram)

    def _equalized(self, block: DecoderBlock, prefix: str) -> Equalized:
        """Return a block whose weights scales can be stored for, which computes the same."""
        if self.quantized is not None:  # its codes are those of the weights as they are
            return Equalized(block)
        found = equalize(
            block,
            self._grid_choices(block, prefix),
            lambda name: self.model.stored_dtype(prefix + name),
        )
        self.changed.update((prefix + name, found.block.weights[name]) for name in found.changed)
        found.block.weights.clear()
        self.output.divided += [prefix + name for name in found.divided]
        self.powers = {prefix + name: power for name, power in found.powers.items()}
        self.coarse = {prefix + name for name in found.coarse}
        return found

    def _equalized_head(self, name: str, precision: Precision) -> int:
        """Return by which power of two the head is multiplied, and its norm divided."""
        if self.quantized is not None:
            return 0
        shape = (self.model.config.vocab_size, self.model.config.hidden_size)
        choice = self._grid_choice(precision, shape)
        power, changed, coarse = equalize_head(self.model, choice)
        self.changed.update(changed)
        self.output.divided += [self.model.names.final_norm] if power else []
        self.powers = {name: power}
        self.coarse = {name} if coarse else set()
        return power

    def _quantize_head(self) -> None:
        name = self.model.names.head
        precision = self.plan.get(name)
        if precision is None:
            return
        power = self._equalized_head(name, precision)
        scale = np.full(self.model.config.hidden_size, 2.0**power, np.float32)
        if self.activations is not None:
            own = self._solver_from_file(self.activations, (name,), len(scale), scale)
        else:
            gram = None
            if self.statistics is not None:
                moments = self.statistics.read(name)
                gram = None if moments is None else moments.gram
            elif self.states is not None:
                gram = head_moments(self.model, self.states).gram
            if gram is not None and power:
                divide_channels(gram, scale)
            own = self._known_solver(name, gram) or self._method_solver(gram)
        # The weights that salient protects are chosen among those of all rows.
        whole = self.options.method == "salient"
        pieces = self._matrix_pieces(self.model.head_name, power, whole=whole)
        self._quantize(name, pieces, own, precision, self.output.finish)

    def _quantize(
        self,
        name: str,
        pieces: list[Piece] | MatrixPieces,
        own: OwnSolver,
        precision: Precision,
        finish: Callable[[QuantizedLayer], None],
        fallback: bool = False,
    ) -> tuple[QuantizedTensor, Float32 | None]:
        """Quantize this rank's rows of a layer and hand on all of it; return that, and the weights that a
        reader will see where there was one piece."""
        shared = self.ranks.size > 1 and self.options.method != "salient"
        own_rows = pieces.rows if isinstance(pieces, MatrixPieces) else [rows for rows, _ in pieces]
        last = max((rows.stop for rows in own_rows), default=0)
        out = max(self.ranks.gather(last)) if shared else last
        parts, stored = [], None
        samples: list[tuple[Float32, Float32, Float32 | None]] = []

        def solve(rows: slice, weight: Float32) -> QuantizedTensor:
            return refined(own.of(rows), own.gram, self.options)(
                weight, precision.bits, precision.group_size, precision.grid, self.scale_dtype
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
        layer = QuantizedLayer(
            name,
            tensor,
            relative,
            fallback,
            self.powers.get(name, 0),
            name in self.coarse,
            summed(before) if before else None,
        )
        finish(layer)
        if isinstance(pieces, MatrixPieces):
            give_back()  # the heap has kept the room of pieces, and of what was written
        return tensor, stored

    def _energies(
        self, samples: list[tuple[Float32, Float32, Float32 | None]], gram: Float32 | None
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
        require_kept(place, self.format, tensor, lost, largest, lost_if_raised)

    def _carry(self, names: Iterable[str]) -> None:
        """Write the tensors that stay as they are; a tied matrix once, under the embedding's name."""
        model = self.model
        for name in names:
            target = model.written_name(name)
            if name in self.packed or name in self.left_out or target is None:
                continue
            layers = self.stacked.get(name, [target.removesuffix(".weight")])
            if all(self.plan.get(layer) is not None for layer in layers):
                continue
            if name in self.stacked and any(
                self.plan.get(layer) is not None or f"{layer}.weight" in self.changed
                for layer in layers
            ):
                for layer in layers:
                    if self.plan.get(layer) is None:
                        self._carry_expert(layer, model.stored_dtype(name))
                continue
            self.output.carry(model.checkpoint, name, self.changed, target)

    def _carry_expert(self, layer: str, dtype: np.dtype[Any]) -> None:
        """Write one expert of a stack by itself, in float."""
        tensor = f"{layer}.weight"
        if tensor in self.changed:
            array = self.changed.pop(tensor)
        else:
            array = self.model.weight(layer, self.shapes[layer])
        self.output.add(tensor, array.astype(dtype))


def _named(value: object) -> object:
    """Return what stands for an option in an identity: a function's name."""
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value
