"""``bitwright info``."""

from dataclasses import asdict

import click

import bitwright
from bitwright.cli.grouped import Command
from bitwright.cli.telling import tell


@click.command(cls=Command)
def info() -> None:
    """Print which kernels run here."""
    known = bitwright.build_info()
    lines = [f"{name}: {value}" for name, value in asdict(known).items()]
    tell(known, lambda console: click.echo("\n".join(lines)))
