"""``bitwright info``."""

from dataclasses import asdict

import click

import bitwright
from bitwright.cli.grouped import Command


@click.command(cls=Command)
def info() -> None:
    """Print which kernels run here."""
    for name, value in asdict(bitwright.build_info()).items():
        click.echo(f"{name}: {value}")
