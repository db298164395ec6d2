"""``bitwright score``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, evaluation_option
from bitwright.cli.telling import tell
from bitwright.generation.questions import ASKS
from bitwright.report.printing import print_score


@click.command(cls=Command)
@options.model
@options.links
@evaluation_option(
    "--questions",
    required=True,
    type=options.PATH,
    help="JSON lines or an array, .csv or Parquet, with the keys of ARC, HellaSwag, MMLU, PIQA or "
    "OpenBookQA, or question, choices and answer.",
)
@evaluation_option("--samples", type=click.IntRange(1), help="Score the first so many.")
@evaluation_option(
    "--asks",
    type=click.Choice(ASKS),
    default="auto",
    help="Compare the choices as text, or the letters that they are listed under; auto takes letters "
    "where a record has MMLU's subject.",
)
@evaluation_option(
    "--bos/--no-bos", default=False, help="Begin with the token that the tokenizer puts first."
)
@options.threads
def score(model: Path, threads: int | None, **given: Any) -> None:
    """Score MODEL on multiple-choice questions, as lm-evaluation-harness does."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    result = bitwright.score(model, **given)
    tell(result, lambda console: print_score(str(model), result, console))
