"""Types of what the command's options and arguments take, each checked as it is read."""

import re
from pathlib import Path
from typing import Any

import click

from bitwright.checkpoint.gguf_file import FILE_TYPE_ALIASES, FILE_TYPES
from bitwright.checkpoint.reader import require_model
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
    """A model, which is missed before anything else is."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(expanded(value))
        require_model(path)
        return path


class Bits(click.ParamType[int | str]):
    """One of the supported numbers of bits; where there is an option --type its names, too."""

    name = "bits"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if str(value) in map(str, BITS):
            return int(value)
        named = str(value).upper() in (*FILE_TYPES, *FILE_TYPE_ALIASES)
        if named and ctx is not None and any(each.name == "type" for each in ctx.command.params):
            return str(value)
        self.fail(f"{value!r} is not one of {', '.join(map(str, BITS))}", param, ctx)


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


class TensorType(click.ParamType[tuple[str, str]]):
    """``PATTERN=TYPE``."""

    name = "tensor type"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        pattern, _, kind = value.rpartition("=")
        if not pattern or not kind:
            self.fail(f"{value!r} is not of the form PATTERN=TYPE", param, ctx)
        return pattern, kind


class Size(click.ParamType[int]):
    """A number of bytes, such as ``2G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMG]?)", value, re.IGNORECASE | re.ASCII)
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a number of bytes such as 2G or 500M", param, ctx)
        units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
        return int(match[1]) * units[match[2].upper()]


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
