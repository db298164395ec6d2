"""What a command has to say: tables for people, or one object of JSON; and the page that shows it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bitwright.checkpoint.writer import completed
from bitwright.cli.noted import JSON, PAGE, SETTINGS, is_json
from bitwright.ranks import current
from bitwright.records.described import as_json, described, read_report, without_places
from bitwright.records.made_by import made_with
from bitwright.records.page import check_page, write_page


def tell(report: object, show: Callable[[Console], object]) -> None:
    """Say what a command has done. Every command does so once.

    Parameters
    ----------
    report
        A dataclass, or an object of such: what `--json` prints.
    show
        Prints it for people.
    """
    context = click.get_current_context()
    if is_json(context):
        context.meta[JSON] = described(report)
    else:
        show(Console())
    place = context.meta.get(PAGE)
    if place is not None and context.params.get("out") is None and current().is_first:
        settings = without_places(context.meta[SETTINGS])
        write_page(
            place, {**described(report), "command": made_with().command, "settings": settings}
        )


@contextmanager
def telling(context: click.Context) -> Iterator[None]:
    """Let standard output have nothing but JSON where that is asked for, and a page lie there before the
    command's output does."""
    place, out = context.meta.get(PAGE), context.params.get("out")
    if place is not None and current().is_first:
        check_page(place, bool(context.params.get("overwrite")))
    if not is_json(context):
        with _paged(place, out):
            yield
        return
    with redirect_stdout(sys.stderr), _paged(place, out):
        yield
    if JSON not in context.meta:
        raise click.UsageError(f"{context.command_path} has nothing to say as JSON")
    content: Any = context.meta[JSON]
    click.echo(as_json(content))


@contextmanager
def _paged(place: Path | None, out: Any) -> Iterator[None]:
    if place is None or out is None:
        yield
        return
    with completed(out, lambda folder: write_page(place, read_report(folder))):
        yield
