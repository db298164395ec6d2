"""``bitwright evaluate``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, evaluation_option, file_option
from bitwright.cli.parameters import Model
from bitwright.cli.telling import tell
from bitwright.evaluation import WINDOWS
from bitwright.report.printing import print_evaluations
from bitwright.spellings import Old


@click.command(cls=Command, old=(Old("--text", "--evaluation"),))
@options.model
@file_option("--reference", type=Model(), help="The original, for KL and agreement.")
@options.page
@options.links
@evaluation_option("--evaluation", required=True, type=options.PATH, help=f"{options.TEXT}.")
@options.text_key
@evaluation_option("--samples", type=click.IntRange(1), help="Use the first so many samples.")
@options.length(2, evaluation_option)
@options.bos(evaluation_option)
@evaluation_option(
    "--windows",
    type=click.Choice(WINDOWS),
    default="whole",
    help="Judge whole samples, or as llama-perplexity does: the second halves of windows of the text.",
)
@options.memory
@options.threads
def evaluate(model: Path, evaluation: Path, threads: int | None, **given: Any) -> None:
    """Measure the perplexity of MODEL, and its KL divergence from a reference."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    result = bitwright.evaluate(model, evaluation, **given)
    tell(result, lambda console: print_evaluations({str(model): result}, console))
