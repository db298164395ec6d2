"""``bitwright inspect``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, calibration_option, method_option, precision_option
from bitwright.report.printing import print_inspection
from bitwright.tools.inspect import FORECAST_PRESETS


@click.command("inspect", cls=Command)
@options.model
@options.as_json
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
def inspect(model: Path, as_json: bool, threads: int | None, **given: Any) -> None:
    """Describe MODEL: its layers, what would be quantized, and what a run would take and write."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    found = bitwright.inspect_model(model, **given)
    if as_json:
        click.echo(json.dumps(asdict(found), default=str))
    else:
        print_inspection(found, Console())
