"""Types of what the command's options and arguments take, each checked as it is read."""

from pathlib import Path
from typing import Any

import click

from bitwright.checkpoint.hub import model_place
from bitwright.files.home import expanded
from bitwright.grids.tensor import BITS
from bitwright.precision.sensitivities import parse_precision


class NewFile(click.ParamType[Path]):
    """A file to write at the end of a long run, whose folder must be there at its beginning."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(expanded(value))
        if not path.parent.is_dir():
            self.fail(f"the folder {path.parent} does not exist", param, ctx)
        return path


class Model(click.ParamType[Path]):
    """A model, here or at the hub, which is missed before anything else is."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return model_place(value)


class Bits(click.ParamType[int]):
    """One of the supported numbers of bits."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value) not in map(str, BITS):
            self.fail(f"{value!r} is not one of {', '.join(map(str, BITS))}", param, ctx)
        return int(value)


class GroupSize(click.ParamType[int | str]):
    """A number, or ``auto``."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "auto" if value == "auto" else click.INT.convert(value, param, ctx)


class Override(click.ParamType[tuple[str, dict[str, int]]]):
    """``GLOB=bits:B,group_size:G``."""

    name = "override"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, int]]:
        if isinstance(value, tuple):
            return value
        pattern, _, changes = value.rpartition("=")
        try:
            pairs = (change.split(":") for change in changes.split(","))
            return pattern, {key: int(number) for key, number in pairs}
        except ValueError:
            self.fail(f"{value!r} is not of the form GLOB=bits:B,group_size:G", param, ctx)


class Precisions(click.ParamType[tuple[tuple[int, int | None], ...]]):
    """``BITS:GROUP_SIZE``, one or several with commas between them."""

    name = "precisions"

    def __init__(self, one: bool = False) -> None:
        self.one = one

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int | None], ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(parse_precision(part) for part in value.split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self.one and len(found) > 1:
            self.fail(f"{value!r} is more than one", param, ctx)
        return found
