"""``bitwright quantize``."""

import inspect
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

import bitwright
from bitwright.blocks.scaling import CLIPS, OBJECTIVES
from bitwright.cli import options
from bitwright.cli.grouped import (
    Command,
    calibration_option,
    file_option,
    is_given,
    method_option,
    precision_option,
    run_option,
)
from bitwright.cli.telling import tell
from bitwright.methods.awq import DEFAULT_GRID
from bitwright.methods.method import CORRECTED_DAMPING
from bitwright.methods.metrics import METRICS
from bitwright.quantization.options import PRESETS
from bitwright.report.printing import print_report
from bitwright.report.tables import print_sentence


@click.command(cls=Command)
@options.model
@options.out
@options.push
@options.page
@options.format("mlx")
@options.split_max_size
@options.overwrite
@file_option("--allow-requantize", is_flag=True, help="Take a MODEL that is quantized already.")
@options.links
@options.calibration(" (not for rtn)")
@calibration_option(
    "--statistics",
    type=options.PATH,
    help="Folder from bitwright statistics, in place of --calibration; without drift correction.",
)
@calibration_option(
    "--imatrix",
    type=options.PATH,
    help="Importance matrix of llama.cpp: rounds by it, without text; beside --calibration the embedding.",
)
@options.chosen_tokens
@calibration_option(
    "--propagate",
    type=click.Choice(["quantized", "original"]),
    help="Whose outputs the next layers are calibrated on; by default quantized, and with --statistics "
    "original.",
)
@options.scheme
@options.bits
@options.target_size
@options.mixture
@options.group_size
@options.grid
@precision_option(
    "--scale-dtype",
    type=options.DTYPE,
    help="Dtype of scales and biases; by default what the format asks for.",
)
@options.ends
@precision_option(
    "--recipe",
    type=options.PATH,
    help="JSON file of each layer's precision, from bitwright dynamic, in place of --bits and "
    "--group-size.",
)
@precision_option("--include", multiple=True, metavar="GLOB", help="Quantize only these layers.")
@options.exceptions
@options.method
@method_option(
    "--preset",
    type=click.Choice(PRESETS),
    default="default",
    help="fast: the method by itself; default: with --refine and --drift; high: refined by what errors do "
    "to the model's predictions, too; best: with dynamic precision of the same size and trained scales.",
)
@method_option(
    "--refine/--no-refine",
    default=None,
    help="Improve codes and scales of each layer together; by default as the preset says.",
)
@method_option(
    "--drift/--no-drift",
    default=None,
    help="Make up for what earlier layers' errors do to a layer's inputs; by default as the preset says.",
)
@method_option(
    "--damping",
    type=click.FloatRange(0),
    help="Of the gram's mean diagonal (gptq, refinement); by default 0.01, and 0.05 with --drift.",
)
@method_option(
    "--act-order/--no-act-order", default=True, help="Columns with large inputs first (gptq)."
)
@method_option(
    "--block-size", type=click.IntRange(1), default=128, help="Columns per lazy update (gptq)."
)
@method_option(
    "--grid-search/--no-grid-search",
    default=None,
    help="Search each group's range for the least error; by default on for gptq and awq+gptq.",
)
@method_option(
    "--n-grid", type=click.IntRange(1), default=DEFAULT_GRID, help="Ratios to choose from (awq)."
)
@method_option(
    "--coarse-to-fine/--all-ratios", default=True, help="Skip ratios far from the best (awq)."
)
@method_option(
    "--clip",
    type=click.Choice(CLIPS),
    default="default",
    help="Clip the ranges of all linears but query and key, of all, or of none (awq).",
)
@method_option(
    "--metric", type=click.Choice(list(METRICS)), default="mse", help="Error metric (awq)."
)
@method_option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="layer",
    help="Judge each layer's outputs, or attention's and the MLP's (awq).",
)
@options.salient_ratio
@run_option(
    "--backend",
    type=click.Choice(["native", "transformers"]),
    default="native",
    help="What runs the model: bitwright, block by block, or transformers (any architecture, the whole "
    "model in memory; pip install bitwright[transformers]).",
)
@options.resumable
@options.threads
def quantize(
    backend: str, overrides: tuple[tuple[str, dict[str, int | str]], ...], **given: Any
) -> None:
    """Quantize the checkpoint folder MODEL.

    Globs match full layer names, such as model.layers.0.self_attn.q_proj.
    """
    run: Callable[..., bitwright.QuantizationReport] = bitwright.quantize
    if backend == "transformers":
        run = bitwright.quantize_with_transformers
        context = click.get_current_context()
        for name in sorted(set(given) - set(inspect.signature(run).parameters)):
            if is_given(context, name):
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} is not an option of --backend transformers")
            del given[name]
    if "tensor_types" in given:
        given["tensor_types"] = dict(given["tensor_types"])
    report = run(overrides=dict(overrides), **given)
    asked = CORRECTED_DAMPING if given["damping"] is None else given["damping"]

    def show(console: Console) -> None:
        print_report(report, console)
        if raised := report.dampings_raised(asked):
            print_sentence(
                f"{len(raised)} layers needed more damping than {asked:g}, for example "
                f"{raised[0].name}: {raised[0].damping:g}. More calibration data would help.",
                console,
            )

    tell(report, show)
