"""The ``bitwright`` command."""

import inspect
import io
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, cast

import click
import numpy as np
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import bitwright
from bitwright.blocks.scaling import CLIPS, OBJECTIVES
from bitwright.checkpoint.fingerprint import digest
from bitwright.checkpoint.reader import require_model
from bitwright.checkpoint.work_folder import WorkFolder, kept_until_written
from bitwright.demo import run_demo
from bitwright.distill.losses import LOSSES
from bitwright.distill.student import ZEROS
from bitwright.distill.training import SCHEDULES
from bitwright.errors import MissingExtraError, printable
from bitwright.evaluate import WINDOWS
from bitwright.files.home import expanded
from bitwright.files.inputs import InputFiles, same_inputs
from bitwright.files.links import follow_links
from bitwright.files.seals import file_checksum
from bitwright.files.text_file import TEXT_LIMIT, read_bytes
from bitwright.formats import FORMATS
from bitwright.grids.tensor import BITS, GRIDS
from bitwright.methods.awq import DEFAULT_GRID
from bitwright.methods.method import ACTIVATION_METHODS, CORRECTED_DAMPING
from bitwright.methods.metrics import METRICS
from bitwright.methods.registry import METHODS
from bitwright.precision.estimate import DEFAULT_SAMPLES as SENSITIVITY_SAMPLES
from bitwright.precision.sensitivities import parse_precision
from bitwright.presets.quantize import check_quantization
from bitwright.process.interruption import (
    INTERRUPTED,
    OTHERS_WAIT,
    TERMINATED,
    Terminated,
    while_ending,
    while_running,
)
from bitwright.process.standard_streams import flush_output, tell_of_lost_output
from bitwright.quantization.options import PRESETS
from bitwright.ranks import launched, spread_over, world
from bitwright.records.card import command_line, made_by
from bitwright.report.printing import (
    print_conversion,
    print_dwq_report,
    print_evaluations,
    print_inspection,
    print_recipe,
    print_report,
    print_sensitivities,
)
from bitwright.report.tables import print_sentence
from bitwright.runs.budget import one_budget, require_all
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import existing_file
from bitwright.tools.collect_activations import DEFAULT_SAMPLES, planned_samples
from bitwright.warned import BitwrightWarning

FAILED = 1
# Over MPI ranks:
SPREAD = ("quantize", "refine", "statistics", "sensitivities", "dynamic", "dwq")


class _NewFile(click.ParamType[Path]):
    """A file to write at the end of a long run, whose folder must be there at its beginning."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(expanded(value))
        if not path.parent.is_dir():
            self.fail(f"the folder {path.parent} does not exist", param, ctx)
        return path


class _Model(click.ParamType[Path]):
    """A model, which is missed before anything else is."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(expanded(value))
        require_model(path)
        return path


class _Bits(click.ParamType[int]):
    """One of the supported numbers of bits."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value) not in map(str, BITS):
            self.fail(f"{value!r} is not one of {', '.join(map(str, BITS))}", param, ctx)
        return int(value)


class _GroupSize(click.ParamType[int | str]):
    """A number, or ``auto``."""

    name = "SIZE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "auto" if value == "auto" else click.INT.convert(value, param, ctx)


class _Override(click.ParamType[tuple[str, dict[str, int]]]):
    """``GLOB=bits:B,group_size:G``."""

    name = "override"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, int]]:
        if isinstance(value, tuple):
            return value
        pattern, _, changes = value.rpartition("=")
        try:
            pairs = (change.split(":") for change in changes.split(","))
            return pattern, {key: int(number) for key, number in pairs}
        except ValueError:
            self.fail(f"{value!r} is not of the form GLOB=bits:B,group_size:G", param, ctx)


class _Precisions(click.ParamType[tuple[tuple[int, int | None], ...]]):
    """``BITS:GROUP_SIZE``, one or several with commas between them."""

    name = "precisions"

    def __init__(self, one: bool = False) -> None:
        self.one = one

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int | None], ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(parse_precision(part) for part in value.split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self.one and len(found) > 1:
            self.fail(f"{value!r} is more than one", param, ctx)
        return found


def _check_apart(**files: Path | None) -> None:
    """Refuse options that name one file, of which one would write over the other."""
    places: dict[str, str] = {}
    for name, path in files.items():
        if path is not None:
            other = places.setdefault(os.path.realpath(expanded(path)), name)
            if other != name:
                raise click.UsageError(f"--{other} and --{name} are the same file, {path}")


def _digest(path: Path) -> str:
    place, inputs = existing_file(Path(expanded(path))), InputFiles()
    inputs.watch([place], recorded=True)
    # Arrays may be large, and are mapped where they are read.
    known = (
        f"{file_checksum(place, 0, place.stat().st_size):08x}"
        if place.suffix == ".npy"
        else digest(read_bytes(place, TEXT_LIMIT))
    )
    inputs.take_checksums()
    return known


def _method_and_format(function: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that quantize in the end, whatever they do before."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder."),
        click.option(
            "--samples", type=click.IntRange(1), help="Calibration samples; by default up to 128."
        ),
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            help="Calibrate on this text or these token ids instead of --data.",
        ),
        click.option("--format", type=click.Choice(list(FORMATS)), default="mlx"),
        click.option("--method", type=click.Choice(list(METHODS)), default="gptq"),
        click.option(
            "--candidates",
            type=_Precisions(),
            help="BITS:GROUP_SIZE,… to choose from for each layer; group size -1 is the whole row. By "
            "default what the format has near the target.",
        ),
    ):
        function = option(function)
    return function


def _bos(function: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--bos/--no-bos",
        default=True,
        help="Begin every sample of a text with the token that the tokenizer puts first, or not.",
    )(function)


def _data(required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(function: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option("--seed", type=click.IntRange(0), default=0, help="Chooses the samples."),
            click.option(
                "--length",
                type=click.IntRange(2),
                help="Tokens per sample; by default 512 of a text, or as many as the model has positions, "
                "and the whole rows of an array.",
            ),
            click.option(
                "--data",
                required=required,
                type=click.Path(path_type=Path),
                help="Text (.txt, .jsonl, chats included) or token ids (.npy).",
            ),
        ):
            function = option(function)
        return _bos(function)

    return add


def _allow_unfused(function: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--allow-unfused",
        is_flag=True,
        help="Let layers differ that vLLM computes as one module: for engines that fuse nothing.",
    )(function)


def _exceptions(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for layers that are treated otherwise than the rest, which messages name."""
    for option in (
        click.option(
            "--override",
            "overrides",
            multiple=True,
            type=_Override(),
            metavar="GLOB=bits:B,group_size:G",
            help="Other settings for these layers; the last match wins.",
        ),
        click.option(
            "--exclude", multiple=True, metavar="GLOB", help="Leave these layers in float."
        ),
    ):
        function = option(function)
    return _allow_unfused(function)


def _resume(function: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--resume/--no-resume",
        default=True,
        help="Go on where the same command was interrupted, or start over.",
    )(function)


def _memory(function: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--memory",
        type=click.FloatRange(0, min_open=True),
        metavar="GB",
        help="What the process may take; by default three quarters of what is free.",
    )(function)


def _resumable(function: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that go block by block."""
    return _memory(_resume(function))


def _chosen_tokens(function: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that are calibrated: which tokens."""
    for option in (
        click.option("--seed", type=click.IntRange(0), default=0, help="Chooses the samples."),
        click.option(
            "--length",
            type=click.IntRange(1),
            help="Tokens per sample; by default 512 of a text, or as many as the model has positions, and "
            "the whole rows of an array.",
        ),
        click.option(
            "--samples", type=click.IntRange(1), help="Calibration samples; by default up to 128."
        ),
    ):
        function = option(function)
    return _bos(function)


def _links(function: Callable[..., None]) -> Callable[..., None]:
    """Add the option of all commands that read a model, which holds from here to their end."""

    def enter(context: click.Context, _: click.Parameter, follow: bool | None) -> None:
        if follow is not None:
            context.with_resource(follow_links(follow))

    return click.option(
        "--links/--no-links",
        default=None,
        is_eager=True,
        expose_value=False,
        callback=enter,
        help="Follow all links out of folders of models, statistics and targets, or refuse folders with "
        "any; by default only weights, their index, statistics and targets may be links to other places.",
    )(function)


def _threads(function: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--threads", type=click.IntRange(1, 1024), help="Threads to use; by default all processors."
    )(function)


class _Commands(click.Group):
    """Commands whose interruption is told by `main` alone; click would add a line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interruption from error


class _Interruption(BaseException):
    """A KeyboardInterrupt, its cause."""


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(bitwright.__version__, prog_name="bitwright")
@click.option(
    "--fixed-order",
    is_flag=True,
    help="Take all sums over tokens in an order that does not depend on the number of MPI ranks.",
)
@click.pass_context
def cli(context: click.Context, fixed_order: bool) -> None:
    """Quantize language models on any CPU.

    Started by mpirun, quantize, refine, statistics, sensitivities, dynamic and dwq spread over all ranks;
    other commands run on the first.
    """
    if launched():
        if context.invoked_subcommand not in SPREAD and world().Get_rank() > 0:
            context.exit()
        if context.invoked_subcommand in SPREAD:
            ranks = context.with_resource(spread_over(world(), fixed_order))
            if not ranks.is_first:  # reports are printed once
                context.with_resource(redirect_stdout(io.StringIO()))
            return
    context.with_resource(spread_over(None, fixed_order))


@cli.command()
@click.argument("model", type=_Model())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--method", type=click.Choice(list(METHODS)), default="gptq")
@click.option("--bits", type=_Bits(), default=4, help="Bits per code: 2, 3, 4, 5, 6 or 8.")
@click.option(
    "--group-size",
    type=_GroupSize(),
    default="auto",
    help="Input channels per scale; -1 is the whole row, auto 64 or what the format asks for.",
)
@click.option("--format", type=click.Choice(list(FORMATS)), default="mlx")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text (.txt, .jsonl) or token ids (.npy); all methods but rtn need it, or --statistics.",
)
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    help="Folder from bitwright statistics, in place of --calibration; without drift correction.",
)
@_chosen_tokens
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default="default",
    help="fast: the method by itself; default: with --refine and --drift; best: with dynamic precision of "
    "the same size and trained scales, too.",
)
@click.option(
    "--refine/--no-refine",
    default=None,
    help="Improve codes and scales of each layer together; by default as the preset says.",
)
@click.option(
    "--drift/--no-drift",
    default=None,
    help="Make up for what earlier layers' errors do to a layer's inputs; by default as the preset says.",
)
@click.option(
    "--grid",
    type=click.Choice([*GRIDS, "k"]),
    help="By default the format's first; k is GGUF's Q2_K to Q6_K.",
)
@click.option(
    "--scale-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of scales and biases; by default what the format asks for.",
)
@click.option(
    "--damping",
    type=click.FloatRange(0),
    help="Of the gram's mean diagonal (gptq, refinement); by default 0.01, and 0.05 with --drift.",
)
@click.option(
    "--act-order/--no-act-order", default=True, help="Columns with large inputs first (gptq)."
)
@click.option(
    "--grid-search/--no-grid-search",
    default=None,
    help="Search each group's range for the least error; by default on for gptq and awq+gptq.",
)
@click.option(
    "--n-grid", type=click.IntRange(1), default=DEFAULT_GRID, help="Ratios to choose from (awq)."
)
@click.option(
    "--coarse-to-fine/--all-ratios", default=True, help="Skip ratios far from the best (awq)."
)
@click.option(
    "--clip",
    type=click.Choice(CLIPS),
    default="default",
    help="Clip the ranges of all linears but query and key, of all, or of none (awq).",
)
@click.option(
    "--metric", type=click.Choice(list(METRICS)), default="mse", help="Error metric (awq)."
)
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="layer",
    help="Judge each layer's outputs, or attention's and the MLP's (awq).",
)
@click.option(
    "--salient-ratio",
    type=click.FloatRange(0, 1),
    default=0.01,
    help="Share of the weights to protect (salient).",
)
@click.option(
    "--block-size", type=click.IntRange(1), default=128, help="Columns per lazy update (gptq)."
)
@click.option(
    "--propagate",
    type=click.Choice(["quantized", "original"]),
    help="Whose outputs the next layers are calibrated on; by default quantized, and with --statistics "
    "original.",
)
@click.option("--embedding-bits", type=_Bits(), help="Quantize the embedding too.")
@click.option("--head-bits", type=_Bits(), help="Quantize the head too.")
@click.option("--include", multiple=True, metavar="GLOB", help="Quantize only these layers.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="JSON file of each layer's precision, from bitwright dynamic, in place of --bits and "
    "--group-size.",
)
@_exceptions
@click.option("--allow-requantize", is_flag=True, help="Take a MODEL that is quantized already.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@click.option(
    "--backend",
    type=click.Choice(["native", "transformers"]),
    default="native",
    help="What runs the model: bitwright, block by block, or transformers (any architecture, the whole "
    "model in memory; pip install bitwright[transformers]).",
)
@_resumable
@_links
@_threads
def quantize(
    backend: str, overrides: tuple[tuple[str, dict[str, int]], ...], **options: Any
) -> None:
    """Quantize the checkpoint folder MODEL.

    Globs match full layer names, such as model.layers.0.self_attn.q_proj.
    """
    run: Callable[..., bitwright.QuantizationReport] = bitwright.quantize
    if backend == "transformers":
        run = bitwright.quantize_with_transformers
        context = click.get_current_context()
        for name in sorted(set(options) - set(inspect.signature(run).parameters)):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} is not an option of --backend transformers")
            del options[name]
    report = run(overrides=dict(overrides), **options)
    console = Console()
    print_report(report, console)
    asked = CORRECTED_DAMPING if options["damping"] is None else options["damping"]
    raised = report.dampings_raised(asked)
    if raised:
        print_sentence(
            f"{len(raised)} layers needed more damping than {asked:g}, for example "
            f"{raised[0].name}: {raised[0].damping:g}. More calibration data would help.",
            console,
        )


@cli.command()
@click.option("--model-path", required=True, type=_Model(), help="Checkpoint folder.")
@click.option("--output-path", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--activations-path",
    required=True,
    type=click.Path(path_type=Path),
    help=".npz of layer inputs; made from --calibration where it is given.",
)
@click.option("--group-size", type=int, default=128, help="Input channels per scale.")
@click.option(
    "--salient-ratio",
    type=click.FloatRange(0, 1),
    default=0.01,
    help="Share of the weights to protect.",
)
@click.option(
    "--activation-method",
    type=click.Choice(ACTIVATION_METHODS),
    default="rms",
    help="How inputs are measured to find these weights.",
)
@click.option("--format", type=click.Choice(list(FORMATS)), default="awq")
@_exceptions
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Run the model on this text (.txt, .jsonl) or token ids (.npy) and write the activations first.",
)
@click.option(
    "--samples", type=click.IntRange(1), help=f"Calibration samples; by default {DEFAULT_SAMPLES}."
)
@click.option("--length", type=click.IntRange(1), help="Tokens per sample.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Chooses the samples.")
@_bos
@click.option("--dry-run", is_flag=True, help="Only write the activations.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@_resumable
@_links
@_threads
@same_inputs()
def salient(
    model_path: Path,
    output_path: Path | None,
    activations_path: Path,
    calibration: Path | None,
    samples: int | None,
    length: int | None,
    seed: int,
    bos: bool,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    memory: float | None,
    threads: int | None,
    overrides: tuple[tuple[str, dict[str, int]], ...],
    **options: Any,
) -> None:
    """Quantize to symmetric INT4, protecting the weights that large activations meet."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    if dry_run and calibration is None:
        raise click.UsageError("--dry-run writes the activations, so it needs --calibration")
    if not dry_run and output_path is None:
        raise click.UsageError("--output-path is missing; only --dry-run does without")
    options["overrides"] = dict(overrides)
    chosen: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "bos": bos}

    def collect(out: Any) -> None:
        count = bitwright.collect_activations(
            model_path,
            out,
            cast(Path, calibration),
            **chosen,
            memory=memory,
            overwrite=overwrite,
            resume=resume,
        )
        click.echo(printable(f"wrote the inputs of {count} groups of layers to {activations_path}"))

    if output_path is None or dry_run:
        collect(activations_path)
        return

    def check() -> None:
        check_quantization(
            model_path,
            output_path,
            method="salient",
            calibration=np.zeros((1, 2), np.int32),
            memory=memory,
            overwrite=overwrite,
            **{**options, "activation_method": "rms"},
        )

    def check_collecting() -> None:
        model = bitwright.load_model(model_path)
        planned_samples(model, CalibrationOptions(cast(Path, calibration), **chosen), memory)

    with (
        one_budget(memory),
        nullcontext()
        if calibration is None
        else kept_until_written(WorkFolder(expanded(activations_path))) as work,
    ):
        if calibration is not None:
            # Whether the format takes such a model, and there is memory for all, is known before it is run.
            require_all([check, check_collecting])
            collect(work)
        report = bitwright.awq_quantize_model(
            model_path,
            output_path,
            activations_path,
            memory=memory,
            overwrite=overwrite,
            resume=resume,
            **options,
        )
    print_report(report, Console())


@cli.command()
@click.argument("model", type=_Model())
@click.option("--out", required=True, type=_NewFile(), help="JSON file to write.")
@_data(required=True)
@click.option(
    "--samples", type=click.IntRange(1), help=f"Samples; by default up to {SENSITIVITY_SAMPLES}."
)
@click.option(
    "--low", type=_Precisions(one=True), default="3:64", help="BITS:GROUP_SIZE to start from."
)
@click.option(
    "--high", type=_Precisions(one=True), default="5:64", help="BITS:GROUP_SIZE to compare with."
)
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Samples at a time.")
@click.option("--loss", type=click.Choice(LOSSES), default="kl", help="Whose gradient is taken.")
@click.option("--overwrite", is_flag=True, help="Replace files that hold something else.")
@_resumable
@click.option("--plot", type=_NewFile(), help="Plot them to this file (.png, .svg, .pdf).")
@_links
@_threads
def sensitivities(
    model: Path,
    low: tuple[tuple[int, int | None], ...],
    high: tuple[tuple[int, int | None], ...],
    plot: Path | None,
    **options: Any,
) -> None:
    """Estimate how much the precision of each layer of MODEL matters."""
    _check_apart(out=options["out"], plot=plot)
    found = bitwright.estimate_sensitivities(
        model, options.pop("data"), *low[0], *high[0], plot=plot, **options
    )
    print_sensitivities(found, Console())


@cli.command()
@click.argument("model", type=_Model())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--target-bpw",
    required=True,
    type=click.FloatRange(0, min_open=True),
    help="Bits per weight of the quantized layers together, scales included.",
)
@_data(required=False)
@_method_and_format
@click.option(
    "--sensitivities",
    type=click.Path(path_type=Path),
    help="JSON file of them: read if it is there, otherwise written. A new target needs no new estimate.",
)
@click.option(
    "--sensitivity-samples",
    type=click.IntRange(1),
    help=f"Samples that they are estimated on; by default up to {SENSITIVITY_SAMPLES}.",
)
@click.option(
    "--grid",
    type=click.Choice([*GRIDS, "k"]),
    help="By default the format's first; k is GGUF's Q2_K to Q6_K.",
)
@click.option("--embedding-bits", type=_Bits(), help="Quantize the embedding too.")
@click.option("--head-bits", type=_Bits(), help="Quantize the head too.")
@_allow_unfused
@click.option("--recipe", type=_NewFile(), help="Write the layers' precisions here.")
@click.option(
    "--evaluate",
    "evaluate_on",
    type=click.Path(path_type=Path),
    help="Text or token ids to measure perplexity and KL on, before and after.",
)
@_resumable
@_links
@_threads
def dynamic(model: Path, out: Path, recipe: Path | None, **options: Any) -> None:
    """Quantize MODEL to a target size, with more bits where they matter."""
    _check_apart(out=out, recipe=recipe, sensitivities=options["sensitivities"])
    report = bitwright.dynamic_quantize(model, out, recipe=recipe, **options)
    console = Console()
    print_recipe(report.recipe, report.sensitivities, console)
    print_report(report.quantization, console)
    if report.before is not None and report.after is not None:
        print_evaluations({str(model): report.before, str(out): report.after}, console)


@cli.command()
@click.option("--teacher", required=True, type=_Model(), help="Folder of the original.")
@click.option(
    "--student",
    type=_Model(),
    help="Folder of a quantized model. Without it one is made first, by --method.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@_data(required=False)
@click.option(
    "--tokens", type=click.IntRange(1), help="Tokens to train on; by default all of the data once."
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=5e-4)
@click.option("--schedule", type=click.Choice(SCHEDULES), default="cosine")
@click.option(
    "--warmup", type=click.FloatRange(0, 1), default=0.1, help="Share of the steps that rise."
)
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=1.0)
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Samples per pass.")
@click.option("--accumulate", type=click.IntRange(1), default=1, help="Passes per step.")
@click.option("--loss", type=click.Choice(LOSSES), default="kl")
@click.option(
    "--k", type=click.IntRange(1), help="The teacher's tokens per position; by default up to 1024."
)
@click.option(
    "--zeros", type=click.Choice(ZEROS), default="fixed", help="Whether integer zeros move, too."
)
@click.option(
    "--targets",
    type=click.Path(path_type=Path),
    help="Keep the teacher's targets in this folder, and use those that are there.",
)
@click.option("--validation", type=click.Path(path_type=Path), help="By default a part of --data.")
@click.option("--validation-samples", type=click.IntRange(1), help="By default up to 8.")
@click.option("--validate-every", type=click.IntRange(1), help="Steps; by default 1/8 of the run.")
@click.option("--patience", type=click.IntRange(1), help="Stop after so many without a new best.")
@click.option("--checkpoint-every", type=click.IntRange(1), help="Steps; as --validate-every.")
@_resumable
@click.option(
    "--plot",
    type=_NewFile(),
    help="Plot loss and KL to this file (.png, .svg, .pdf).",
)
@_method_and_format
@click.option("--bits", type=_Bits(), default=4, help="Of the student that is made.")
@click.option(
    "--group-size", type=_GroupSize(), default="auto", help="Of the student that is made."
)
@click.option(
    "--target-bpw",
    type=click.FloatRange(0, min_open=True),
    help="Make the student with dynamic precision; see bitwright dynamic.",
)
@_links
@_threads
@same_inputs()
def dwq(
    teacher: Path,
    student: Path | None,
    out: Path,
    data: Path | None,
    plot: Path | None,
    method: Any,
    format: Any,
    candidates: tuple[tuple[int, int | None], ...] | None,
    calibration: Path | None,
    samples: int | None,
    bits: int,
    group_size: Any,
    target_bpw: float | None,
    memory: float | None,
    **options: Any,
) -> None:
    """Train the scales of a quantized model to say what the original says.

    With --student that model is trained. Without it the original is quantized first, by --method to --bits
    and --group-size, or with --target-bpw to dynamic precision from --candidates.
    """
    making = ("method", "format", "candidates", "calibration", "samples", "bits", "group_size")
    context = click.get_current_context()
    if student is not None:
        for name in (*making, "target_bpw"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} says how to make a student, but one is given")
    shared: dict[str, Any] = {
        "samples": samples,
        "length": options["length"],
        "seed": options["seed"],
        "bos": options["bos"],
    }
    source = data if calibration is None else calibration

    def make(folder: Path) -> None:
        if source is None:
            raise click.UsageError("--data is missing: the student is made with it")
        limits = {"memory": memory, "resume": options["resume"]}
        if target_bpw is not None:
            bitwright.dynamic_quantize(
                teacher, folder, target_bpw, candidates, method, format, source, **shared, **limits
            )  # fmt: skip
        else:
            calibrated = None if method == "rtn" else source
            bitwright.quantize(
                teacher, folder, method, bits, group_size, format, calibrated, **shared, **limits
            )  # fmt: skip

    made_with = {
        "method": method,
        "format": format,
        "candidates": None if target_bpw is None else candidates,
        "bits": bits,
        "group_size": group_size,
        "target_bpw": target_bpw,
        "calibration": None if calibration is None else _digest(calibration),
        **shared,
    }
    report = bitwright.dwq_quantize(
        teacher,
        student or make,
        out,
        data,
        made_with=made_with,
        plot=plot,
        memory=memory,
        **options,
    )
    print_dwq_report(report, Console())


@cli.command()
@click.argument("source", type=_Model())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--to",
    "format",
    required=True,
    type=click.Choice([*FORMATS, "float"]),
    help="float is plain safetensors of the dequantized weights.",
)
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Store what the format can only hold with a loss; without it that is an error, which tells it.",
)
@_allow_unfused
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the weights in float; by default as they are.",
)
@_memory
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@_links
def convert(source: Path, out: Path, **options: Any) -> None:
    """Store the model SOURCE, a checkpoint folder or GGUF file, in another format."""
    print_conversion(bitwright.convert(source, out, **options), Console())


@cli.command()
@click.argument("quantized", type=_Model())
@click.option(
    "--original",
    required=True,
    type=_Model(),
    help="What it was made from, in float.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--calibration",
    required=True,
    type=click.Path(path_type=Path),
    help="Text (.txt, .jsonl) or token ids (.npy).",
)
@_chosen_tokens
@click.option(
    "--drift/--no-drift",
    default=True,
    help="Make up for what earlier layers' errors do to a layer's inputs.",
)
@click.option("--damping", type=click.FloatRange(0), help="Of the gram's mean diagonal.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@_resumable
@_links
@_threads
def refine(quantized: Path, original: Path, out: Path, **options: Any) -> None:
    """Improve the codes and scales of the model QUANTIZED, by any tool; its format and size stay."""
    report = bitwright.refine_model(original, quantized, out, **options)
    print_report(report, Console())


@cli.group()
def statistics() -> None:
    """Collect what the layers of a model see, on several machines if need be, for quantize --statistics."""


@statistics.command()
@click.argument("model", type=_Model())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--calibration",
    required=True,
    type=click.Path(path_type=Path),
    help="Text (.txt, .jsonl) or token ids (.npy).",
)
@_chosen_tokens
@click.option("--overwrite", is_flag=True, help="Replace other statistics.")
@_resumable
@_links
@_threads
def collect(model: Path, out: Path, calibration: Path, **options: Any) -> None:
    """Run the float model MODEL and write what its layers see."""
    found = bitwright.collect_statistics(model, out, calibration, **options)
    click.echo(_described(found))


@statistics.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace other statistics.")
@_memory
@_links
def merge(parts: tuple[Path, ...], out: Path, overwrite: bool, memory: float | None) -> None:
    """Merge the statistics PARTS of one model over different tokens."""
    found = bitwright.merge_statistics(parts, out, overwrite=overwrite, memory=memory)
    click.echo(_described(found))


def _described(found: bitwright.Statistics) -> str:
    return printable(
        f"statistics of {len(found.stages)} groups of layers over {found.tokens} tokens are in "
        f"{found.folder}"
    )


@cli.command()
@click.argument("model", type=_Model())
@click.option("--reference", type=_Model(), help="The original, for KL and agreement.")
@click.option(
    "--text",
    required=True,
    type=click.Path(path_type=Path),
    help="Text (.txt, .jsonl) or token ids (.npy).",
)
@click.option(
    "--length",
    type=click.IntRange(2),
    help="Tokens per sample; by default 512 of a text, or as many as the model has positions, and the "
    "whole rows of an array.",
)
@click.option("--samples", type=click.IntRange(1), help="Use the first so many samples.")
@_bos
@click.option(
    "--windows",
    type=click.Choice(WINDOWS),
    default="whole",
    help="Judge whole samples, or as llama-perplexity does: the second halves of windows of the text.",
)
@_memory
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_links
@_threads
def evaluate(
    model: Path,
    reference: Path | None,
    text: Path,
    length: int | None,
    samples: int | None,
    bos: bool,
    windows: Any,
    memory: float | None,
    as_json: bool,
    threads: int | None,
) -> None:
    """Measure the perplexity of MODEL, and its KL divergence from a reference."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    bar = Progress(
        TextColumn("evaluating"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bar:
        task = bar.add_task("", total=1.0, visible=False)  # until there is some
        result = bitwright.evaluate(
            model,
            text,
            reference=reference,
            length=length,
            samples=samples,
            bos=bos,
            windows=windows,
            memory=memory,
            on_progress=lambda share: bar.update(task, completed=share, visible=True),
        )
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        print_evaluations({str(model): result}, Console())


@cli.command("inspect")
@click.argument("model", type=_Model())
@click.option("--method", type=click.Choice(list(METHODS)), default="gptq")
@click.option("--preset", type=click.Choice(["fast", "default"]), default="default")
@click.option("--samples", type=click.IntRange(1), default=128, help="Calibration samples.")
@click.option("--length", type=click.IntRange(1), help="Tokens per sample; by default up to 512.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_links
@_threads
def inspect_command(model: Path, as_json: bool, threads: int | None, **options: Any) -> None:
    """Describe MODEL: its layers, what would be quantized, and what a run would take."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    found = bitwright.inspect_model(model, **options)
    if as_json:
        click.echo(json.dumps(asdict(found), default=str))
    else:
        print_inspection(found, Console())


@cli.command()
@_threads
def demo(threads: int | None) -> None:
    """Do the whole job on a small model that the package carries."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    run_demo(Console())


@cli.command()
def info() -> None:
    """Print which kernels run here."""
    for name, value in asdict(bitwright.build_info()).items():
        click.echo(f"{name}: {value}")


def main() -> None:
    """Run the command line; errors that a user can mend are one line on standard error."""
    try:
        _main()
    except KeyboardInterrupt as error:  # while it was about to end in another way
        _interrupted(error)


def _main() -> None:
    try:
        while_running()
        tell_of_lost_output()
        _show_warnings_as_lines()
        with made_by(command_line(sys.argv[1:])):
            status = cli.main(standalone_mode=False)
        flush_output()
    except (click.exceptions.Abort, _Interruption) as error:
        _interrupted(error.__cause__)
    except click.ClickException as error:
        message = printable(error.format_message())
        click.UsageError(message, getattr(error, "ctx", None)).show()
        _end("", error.exit_code)
    except KeyboardInterrupt as error:
        _interrupted(error)
    except SystemExit as error:  # where nobody reads what is printed
        _end("", error.code if isinstance(error.code, int) else FAILED)
    except (ValueError, TypeError, OSError, MemoryError, MissingExtraError) as error:
        _end(f"bitwright: {error or type(error).__name__}", FAILED)
    except BaseException:
        if launched():
            traceback.print_exc()
            _end("", FAILED)
        raise
    while_ending(status or 0)
    sys.exit(status)


def _show_warnings_as_lines() -> None:
    """Print each warning once, though a command may open a model several times."""
    shown, printed = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, BitwrightWarning):
            if str(message) not in printed:
                click.echo(f"bitwright: warning: {message}", err=True)
            printed.add(str(message))
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", BitwrightWarning)


def _interrupted(error: BaseException | None) -> NoReturn:
    terminated = isinstance(error, Terminated)
    what = "terminated" if terminated else "interrupted"
    reason = str(error or "") or "nothing was written"
    if sys.stderr is not None and sys.stderr.isatty():
        click.echo(err=True)  # after the ^C
    _end(f"{what}; {reason}", TERMINATED if terminated else INTERRUPTED)


def _end(message: str, status: int) -> NoReturn:
    """Leave with a message; of several MPI ranks, which may wait for this one, all."""
    while_ending(status)
    ranks = launched()
    if ranks and world().Get_rank() > 0:
        time.sleep(OTHERS_WAIT)  # which ends here if the first has the same to say
    if message:
        click.echo(printable(message), err=True)
    if ranks and sys.stderr is not None:
        sys.stderr.flush()
    if ranks:
        world().Abort(status)
    sys.exit(status)
