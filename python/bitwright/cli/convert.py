"""``bitwright convert``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, file_option, precision_option
from bitwright.cli.telling import tell
from bitwright.formats import FORMATS
from bitwright.report.printing import print_conversion
from bitwright.spellings import Old


@click.command(cls=Command, old=(Old("--to", "--format"),))
@options.model
@options.out
@options.push
@options.page
@file_option(
    "-f",
    "--format",
    required=True,
    type=click.Choice([*FORMATS, "float"]),
    help="Format to write; float is plain safetensors of the dequantized weights.",
)
@options.overwrite
@file_option(
    "--allow-requantize",
    is_flag=True,
    help="Store what the format can only hold with a loss; without it that is an error, which tells it.",
)
@options.links
@precision_option(
    "--dtype", type=options.DTYPE, help="Of the weights in float; by default as they are."
)
@options.allow_unfused
@options.memory
def convert(model: Path, out: Path, **given: Any) -> None:
    """Store MODEL, a checkpoint folder or GGUF file, in another format."""
    report = bitwright.convert(model, out, **given)
    tell(report, lambda console: print_conversion(report, console))
