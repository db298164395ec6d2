"""``bitwright refine``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, file_option, method_option
from bitwright.cli.parameters import Model
from bitwright.cli.telling import tell
from bitwright.report.printing import print_report
from bitwright.spellings import Old


@click.command(cls=Command, old=(Old("--original", "--reference"),))
@options.model
@file_option(
    "--reference", required=True, type=Model(), help="The original that it was made from, in float."
)
@options.out
@options.push
@options.page
@options.overwrite
@options.links
@options.calibration()
@options.chosen_tokens
@method_option(
    "--drift/--no-drift",
    default=True,
    help="Make up for what earlier layers' errors do to a layer's inputs.",
)
@method_option("--damping", type=click.FloatRange(0), help="Of the gram's mean diagonal.")
@options.resumable
@options.threads
def refine(model: Path, reference: Path, out: Path, **given: Any) -> None:
    """Improve the codes and scales of MODEL, quantized by any tool; its format and size stay."""
    report = bitwright.refine_model(reference, model, out, **given)
    tell(report, lambda console: print_report(report, console))
