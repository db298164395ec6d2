"""``bitwright sensitivities``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, file_option, method_option, precision_option, run_option
from bitwright.cli.parameters import NewFile, Precisions
from bitwright.cli.telling import tell
from bitwright.distill.losses import LOSSES
from bitwright.precision.estimate import DEFAULT_SAMPLES
from bitwright.report.printing import print_sensitivities
from bitwright.spellings import Old


@click.command(cls=Command, old=(Old("--data", "--calibration"),))
@options.model
@file_option("-o", "--out", required=True, type=NewFile(), help="JSON file to write.")
@options.page
@file_option("--plot", type=NewFile(), help="Plot them to this file (.png, .svg, .pdf).")
@file_option("--overwrite", is_flag=True, help="Replace files that hold something else.")
@options.links
@options.calibration()
@options.samples(DEFAULT_SAMPLES)
@options.length(2)
@options.seed
@options.bos()
@precision_option(
    "--low", type=Precisions(one=True), default="3:64", help="BITS:GROUP_SIZE to start from."
)
@precision_option(
    "--high", type=Precisions(one=True), default="5:64", help="BITS:GROUP_SIZE to compare with."
)
@method_option("--loss", type=click.Choice(LOSSES), default="kl", help="Whose gradient is taken.")
@run_option("--batch-size", type=click.IntRange(1), default=4, help="Samples at a time.")
@options.resumable
@options.threads
def sensitivities(
    model: Path,
    low: tuple[tuple[int, int | None], ...],
    high: tuple[tuple[int, int | None], ...],
    plot: Path | None,
    **given: Any,
) -> None:
    """Estimate how much the precision of each layer of MODEL matters."""
    options.check_apart(out=given["out"], plot=plot)
    found = bitwright.estimate_sensitivities(
        model, given.pop("calibration"), *low[0], *high[0], plot=plot, **given
    )
    tell(found, lambda console: print_sensitivities(found, console))
