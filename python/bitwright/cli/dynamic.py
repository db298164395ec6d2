"""``bitwright dynamic``."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, calibration_option, file_option
from bitwright.cli.parameters import NewFile
from bitwright.cli.telling import tell
from bitwright.precision.estimate import DEFAULT_SAMPLES
from bitwright.report.printing import print_evaluations, print_recipe, print_report
from bitwright.spellings import Old


@click.command(
    cls=Command,
    old=(
        Old("--data", "--sensitivity-calibration", beside="--calibration"),
        Old("--data", "--calibration"),
        Old("--evaluate", "--evaluation"),
    ),
)
@options.model
@options.out
@options.push
@options.page
@options.format("mlx")
@file_option(
    "--sensitivities",
    type=options.PATH,
    help="JSON file of them: read if it is there, otherwise written. A new target needs no new estimate.",
)
@file_option("--recipe", type=NewFile(), help="Write the layers' precisions here.")
@file_option(
    "--evaluation",
    type=options.PATH,
    help="Text or token ids to measure perplexity and KL on, before and after.",
)
@options.overwrite
@options.links
@options.calibration(", for the sensitivities and the method")
@options.samples(128)
@options.length(2)
@options.seed
@options.bos()
@calibration_option(
    "--sensitivity-calibration",
    type=options.PATH,
    help="Estimate the sensitivities on this in place of --calibration.",
)
@calibration_option(
    "--sensitivity-samples",
    type=click.IntRange(1),
    help=f"Samples that they are estimated on; by default up to {DEFAULT_SAMPLES}.",
)
@options.target_bpw("Bits per weight of the quantized layers together, scales included.")
@options.target_size
@options.candidates
@options.grid
@options.ends
@options.allow_unfused
@options.method
@options.resumable
@options.threads
def dynamic(
    model: Path,
    out: Path,
    recipe: Path | None,
    **given: Any,
) -> None:
    """Quantize MODEL to a target size, with more bits where they matter."""
    if (given["target_bpw"] is None) == (given["target_size"] is None):
        raise click.UsageError("give --target-bpw or --target-size, one of the two")
    options.check_apart(out=out, recipe=recipe, sensitivities=given["sensitivities"])
    report = bitwright.dynamic_quantize(
        model,
        out,
        recipe=recipe,
        **given,
    )

    def show(console: Console) -> None:
        print_recipe(report.recipe, report.sensitivities, console)
        print_report(report.quantization, console)
        if report.before is not None and report.after is not None:
            print_evaluations({str(model): report.before, str(out): report.after}, console)

    tell(report, show)
