"""``bitwright statistics``: collect and merge."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, Context, file_option
from bitwright.errors import printable

overwrite = file_option("--overwrite", is_flag=True, help="Replace other statistics.")


class _Statistics(click.Group):
    context_class = Context


@click.group(cls=_Statistics)
def statistics() -> None:
    """Collect what the layers of a model see, on several machines if need be, for quantize --statistics."""


@statistics.command(cls=Command)
@options.model
@options.out
@overwrite
@options.links
@options.calibration()
@options.chosen_tokens
@options.resumable
@options.threads
def collect(model: Path, out: Path, calibration: Path, **given: Any) -> None:
    """Run the float model MODEL and write what its layers see."""
    _tell(bitwright.collect_statistics(model, out, calibration, **given))


@statistics.command(cls=Command)
@click.argument("parts", nargs=-1, required=True, type=options.PATH)
@options.out
@overwrite
@options.links
@options.memory
def merge(parts: tuple[Path, ...], out: Path, **given: Any) -> None:
    """Merge the statistics PARTS of one model over different tokens."""
    _tell(bitwright.merge_statistics(parts, out, **given))


def _tell(found: bitwright.Statistics) -> None:
    click.echo(
        printable(
            f"statistics of {len(found.stages)} groups of layers over {found.tokens} tokens are in "
            f"{found.folder}"
        )
    )
