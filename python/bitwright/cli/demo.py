"""``bitwright demo``."""

import click
from rich.console import Console

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command
from bitwright.cli.telling import tell
from bitwright.demo import run_demo


@click.command(cls=Command)
@options.threads
def demo(threads: int | None) -> None:
    """Do the whole job on a small model that the package carries."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    told = run_demo(Console())
    tell(told, lambda console: None)
