"""``bitwright statistics``: collect, merge and export."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, Context, file_option
from bitwright.cli.parameters import Model, NewFile
from bitwright.cli.telling import tell
from bitwright.report.tables import print_sentence

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


@statistics.command(cls=Command)
@click.argument("statistics", type=options.PATH)
@file_option(
    "--imatrix",
    required=True,
    type=NewFile(),
    help="File to write for llama-quantize: GGUF, or the older format if it ends in .dat.",
)
@file_option("--model", type=Model(), help="What they are of; for statistics of older versions.")
@file_option("--overwrite", is_flag=True, help="Replace another importance matrix.")
@options.links
def export(statistics: Path, imatrix: Path, **given: Any) -> None:
    """Write the STATISTICS of a model as an importance matrix of llama.cpp."""
    found = bitwright.export_imatrix(statistics, imatrix, **given)
    count = len(found.entries)
    said = f"the importance matrix of {count} tensors is {imatrix}"
    tell({"imatrix": imatrix, "tensors": count}, lambda console: print_sentence(said, console))


def _tell(found: bitwright.Statistics) -> None:
    count = len(found.stages)
    said = (
        f"statistics of {count} groups of layers over {found.tokens} tokens are in {found.folder}"
    )
    content = {"folder": found.folder, "groups": count, "tokens": found.tokens}
    tell(content, lambda console: print_sentence(said, console))
