"""``bitwright upload``."""

from pathlib import Path

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import Command, file_option
from bitwright.cli.telling import tell


@click.command(cls=Command)
@click.argument("folder", type=options.PATH)
@click.argument("name")
@options.base_model
@options.private
@file_option("--message", default="Upload by bitwright", help="Subject of the commit.")
def upload(folder: Path, name: str, base_model: str | None, private: bool, message: str) -> None:
    """Put the checkpoint FOLDER on the hub as NAME (ORG/NAME, or ORG/NAME@BRANCH)."""
    place = bitwright.upload(folder, name, base_model=base_model, private=private, message=message)
    tell({"pushed_to": place}, lambda console: click.echo(place))
