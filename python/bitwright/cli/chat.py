"""``bitwright chat``."""

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import bitwright
from bitwright.cli import options
from bitwright.cli.generate import sampling, show, told
from bitwright.cli.grouped import Command, file_option, method_option
from bitwright.cli.noted import is_json
from bitwright.cli.parameters import Model
from bitwright.cli.telling import tell
from bitwright.report.printing import print_generations


@click.command(cls=Command)
@options.model
@file_option("--system", help="What MODEL is told first.")
@file_option(
    "--against", type=Model(), help="Another model, such as the original, that answers beside it."
)
@options.links
@method_option(
    "--max-tokens", type=click.IntRange(1), default=512, help="Of an answer, at most so many."
)
@sampling
@options.threads
def chat(
    model: Path,
    against: Path | None,
    threads: int | None,
    max_tokens: int,
    **given: Any,
) -> None:
    """Chat with MODEL: every line of standard input is a message, until the input ends."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    chats = [(str(each), bitwright.Chat(each, **given)) for each in (model, against) if each]
    console, notes = Console(), Console(stderr=True)
    as_json = is_json(click.get_current_context())
    answers: list[dict[str, Any]] = []
    asks = sys.stdin is not None and sys.stdin.isatty()
    if asks:
        click.echo("Type a message; an empty line or Ctrl-D ends the chat.", err=True)
    while True:
        if asks:
            click.echo("> ", err=True, nl=False)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line or (asks and not line.strip()):
            break
        if not line.strip():
            continue
        streams = not as_json and len(chats) == 1
        said = [
            (name, each.say(line.strip(), max_tokens, show if streams else None))
            for name, each in chats
        ]
        answers.append(told(said))
        if streams:
            click.echo()
        if not as_json:
            print_generations(said, console, notes)
    tell({"answers": answers}, lambda _: None)
