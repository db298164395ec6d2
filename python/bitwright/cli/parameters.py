"""Types of what the command's options and arguments take, each checked as it is read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bitwright.checkpoint.gguf_file import FILE_TYPES
from bitwright.checkpoint.hub import model_place
from bitwright.files.home import expanded
from bitwright.formats.spelling import Spelling, combined
from bitwright.grids.tensor import BITS
from bitwright.precision.byte_count import size_in_bytes
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


class PrecisionWords(click.ParamType[Spelling | str]):
    """A precision as people write it; as bits where there is an option --type, also the name of a mixture
    that is no precision."""

    name = "precision"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Spelling | str:
        if isinstance(value, Spelling):
            return value
        try:
            return Spelling.parse(str(value))
        except ValueError as error:
            named = str(value).upper() in FILE_TYPES and param is not None and param.name == "bits"
            if named and ctx is not None and any(o.name == "type" for o in ctx.command.params):
                return str(value)
            self.fail(str(error), param, ctx)


def _settle_type(ctx: click.Context) -> None:
    """Take a mixture's name that was given as bits for what it is; refuse to be told twice."""
    bits, kind = ctx.params.get("bits"), ctx.params.get("type")
    if kind is not None and ctx.get_parameter_source("bits") is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--type {kind} says the bits of every layer; omit --bits")
    if isinstance(bits, str):
        ctx.params["type"], ctx.params["bits"] = bits, Spelling(4, text="4")


def say_together(ctx: click.Context) -> None:
    """Turn what bits, group size and grid of a command say into numbers and a name; UsageError where two
    of them that were typed contradict each other."""
    _settle_type(ctx)
    names = ("bits", "grid", "group_size")
    candidates = ctx.params.get("candidates") or ()
    if candidates and isinstance(candidates[0], Spelling):
        ctx.params["candidates"] = tuple(
            (each.bits, None if each.group_size == -1 else each.group_size) for each in candidates
        )
    given = {name: ctx.params[name] for name in names if ctx.params.get(name) is not None}
    if not candidates and not any(isinstance(each, Spelling) for each in given.values()):
        return
    if isinstance(given.get("group_size"), int):
        given["group_size"] = Spelling.of("group_size", given["group_size"])
    typed = {
        f"--{name.replace('_', '-')}": each
        for name, each in given.items()
        if isinstance(each, Spelling)
        and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    grids = {
        f"--candidates {each.text}": Spelling(None, "auto", each.grid, each.text)
        for each in candidates
        if isinstance(each, Spelling)
    }
    try:
        if "bits" not in ctx.params and "--grid" in typed and typed["--grid"].bits is not None:
            raise ValueError(
                f"--grid: {typed['--grid'].text} has bits of its own, which --candidates say"
            )
        said = combined({**typed, **grids})
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if said.bits is None and isinstance(given.get("bits"), Spelling):
        said = replace(said, bits=given["bits"].bits)
    for name in names:
        if name in ctx.params:
            ctx.params[name] = getattr(said, name)


class GroupSize(click.ParamType[int | str]):
    """A number, or ``auto``."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "auto" if value == "auto" else click.INT.convert(value, param, ctx)


class Override(click.ParamType[tuple[str, dict[str, int | str]]]):
    """``GLOB=PRECISION``, or as it was: ``GLOB=bits:B,group_size:G``."""

    name = "override"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, int | str]]:
        if isinstance(value, tuple):
            return value
        pattern, equals, changes = value.rpartition("=")
        try:
            if not equals:
                raise ValueError("it is not of the form GLOB=PRECISION")
            if changes.startswith(("bits:", "group_size:")):
                pairs = (change.split(":") for change in changes.split(","))
                return pattern, {key: int(number) for key, number in pairs}
            return pattern, Spelling.parse(changes).changes()
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


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
        try:
            return size_in_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Precisions(click.ParamType[tuple[Spelling, ...]]):
    """``BITS:GROUP_SIZE``, or grids and types that have both; one or several with commas between them."""

    name = "precisions"

    def __init__(self, one: bool = False) -> None:
        self.one = one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(Spelling.parse(part) for part in value.split(","))
            for each in found:
                if each.bits is None or each.group_size == "auto":
                    raise ValueError(f"{each.text!r} is not of the form BITS:GROUP_SIZE")
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self.one and len(found) > 1:
            self.fail(f"{value!r} is more than one", param, ctx)
        if self.one:
            return tuple(parse_precision(part) for part in value.split(","))
        return found
