"""``bitwright inspect``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, calibration_option, method_option, precision_option
from bitwright.cli.telling import tell
from bitwright.report.printing import print_inspection
from bitwright.tools.inspect import FORECAST_PRESETS


@click.command("inspect", cls=Command)
@options.model
@options.links
@calibration_option(
    "--samples", type=click.IntRange(1), default=128, help="Of the run whose cost is told."
)
@calibration_option(
    "--length", type=click.IntRange(1), help="Tokens per sample; by default up to 512."
)
@options.format("mlx")
@options.bits
@options.group_size
@options.grid
@precision_option(
    "--type",
    metavar="NAME",
    help="A mixture of types by llama.cpp's name, in place of --bits (gguf).",
)
@options.float_embeddings
@options.method
@method_option(
    "--preset", type=click.Choice(FORECAST_PRESETS), default="default", help="As for quantize."
)
@options.threads
def inspect(model: Path, threads: int | None, **given: Any) -> None:
    """Describe MODEL: its layers, what would be quantized, and what a run would take and write."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    found = bitwright.inspect_model(model, **given)
    tell(found, lambda console: print_inspection(found, console))
