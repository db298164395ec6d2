"""``bitwright generate``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, file_option, method_option
from bitwright.cli.noted import is_json
from bitwright.cli.parameters import Model
from bitwright.cli.telling import tell
from bitwright.generation.generate import Generation
from bitwright.records.described import described
from bitwright.report.printing import print_generations

sampling = options.together(
    method_option(
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        help="How much chance there is in the choice of tokens; at 0 the likeliest is taken.",
    ),
    method_option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        help="Choose among the fewest likeliest tokens whose probabilities add up to this.",
    ),
    method_option(
        "--top-k", type=click.IntRange(0), default=0, help="Choose among so many; 0 for all."
    ),
    method_option("--seed", type=click.IntRange(0), default=0, help="Of the choice."),
)


def told(said: Sequence[tuple[str, Generation]]) -> dict[str, Any]:
    """Return what --json prints of one model's text, or of two."""
    first, *others = (described(each) for _, each in said)
    return {**first, "against": others[0]} if others else dict(first)


def show(text: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@click.command(cls=Command)
@options.model
@file_option("--prompt", required=True, help="Text that MODEL goes on from.")
@file_option(
    "--against",
    type=Model(),
    help="Another model, such as the original, whose text is shown beside.",
)
@options.links
@method_option(
    "--max-tokens", type=click.IntRange(1), default=128, help="Stop after so many tokens."
)
@sampling
@method_option(
    "--bos/--no-bos", default=True, help="Begin with the token that the tokenizer puts first."
)
@options.threads
def generate(model: Path, against: Path | None, threads: int | None, **given: Any) -> None:
    """Let MODEL go on from a text, with the weights in memory as they are stored."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    as_json = is_json(click.get_current_context())
    streams = not as_json and against is None
    said = [(str(model), bitwright.generate(model, on_text=show if streams else None, **given))]
    if against is not None:
        said.append((str(against), bitwright.generate(against, **given)))
    if streams:
        click.echo()
    tell(told(said), lambda console: print_generations(said, console, Console(stderr=True)))
