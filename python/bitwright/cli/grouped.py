"""Commands whose help shows their options in groups, and which still take their old spellings."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from bitwright.cli.noted import COMMAND, JSON, JSON_ASKED, PUSH, SAVED, SETTINGS, TEXT_KEY
from bitwright.cli.spellings import spelled_out
from bitwright.ranks import current
from bitwright.spellings import Old

FILES, CALIBRATION, EVALUATION = "Input and output", "Calibration", "Evaluation"
PRECISION, METHOD, TRAINING, RUN = "Precision", "Method", "Training", "Run"
GROUPS = (FILES, CALIBRATION, EVALUATION, PRECISION, METHOD, TRAINING, RUN)
"""As help shows them, one after the other."""
NAMES = 30  # columns that an option and its metavar have beside its description
NARROW = 64  # columns of a terminal that has room for descriptions only under the options
WIDE = 100  # columns that are used of a wider one
METAVARS = {"integer range": "N", "integer": "N", "float range": "X"}  # by click's names of types

TEXTS = (
    "calibration",
    "evaluation",
    "student_calibration",
    "sensitivity_calibration",
    "validation",
)


class Option(click.Option):
    """An option that belongs to one of `GROUPS`; its help names the choices that it has."""

    def __init__(self, declarations: Sequence[str], *, group: str, **attributes: Any) -> None:
        super().__init__(declarations, **attributes)
        self.group = group
        self.metavar = self.metavar or METAVARS.get(self.type.name)
        if isinstance(self.type, click.Choice):
            self.metavar = self.metavar or max(self.opts, key=len).split("-")[-1].upper()
            text = self.help or ""
            if any(f"{each}:" not in text for each in self.type.choices):
                self.help = f"{text} One of {', '.join(self.type.choices)}.".lstrip()


Add = Callable[[Callable[..., None]], Callable[..., None]]


def _option(group: str, *declarations: str, **attributes: Any) -> Add:
    return click.option(*declarations, cls=Option, group=group, **attributes)


file_option = partial(_option, FILES)
calibration_option = partial(_option, CALIBRATION)
evaluation_option = partial(_option, EVALUATION)
precision_option = partial(_option, PRECISION)
method_option = partial(_option, METHOD)
training_option = partial(_option, TRAINING)
run_option = partial(_option, RUN)


class Formatter(click.HelpFormatter):
    """Help that fits terminals of any width: in narrow ones what is told of a name stands under it."""

    def __init__(
        self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None
    ) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(indent_increment, width or min(columns, max_width or WIDE) - 2)

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = NAMES, col_spacing: int = 2
    ) -> None:
        if self.width < NARROW:
            rows, col_max = [(name.rstrip(), text) for name, text in rows], col_spacing
        super().write_dl(rows, col_max, col_spacing)


class Context(click.Context):
    """What a command runs in; only its help is our own."""

    formatter_class = Formatter


def _enter_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the settings of a file where the command line has none."""
    if path is not None:
        from bitwright.cli.config_file import read_settings

        found = read_settings(path, context.command, context)
        context.default_map = {**(context.default_map or {}), **found}


def _enter_json(context: click.Context, _: click.Parameter, asked: bool) -> None:
    context.meta[JSON_ASKED] = asked


def _shared_options() -> list[Option]:
    """Return the options that every command has: files of settings, and JSON."""
    place = click.Path(path_type=Path)
    return [
        Option(
            ["--config"],
            group=RUN,
            type=place,
            metavar="YAML",
            is_eager=True,
            expose_value=False,
            callback=_enter_config,
            help="Settings by the names of the options; what the command line says counts more.",
        ),
        Option(
            ["--save-config"],
            group=RUN,
            type=place,
            metavar="YAML",
            help="Write all settings of the run to this file, for --config.",
        ),
        Option(
            ["--json", "as_json"],
            group=RUN,
            is_flag=True,
            expose_value=False,
            callback=_enter_json,
            help="Print one JSON object, and nothing else, to standard output.",
        ),
    ]


def is_given(context: click.Context, name: str) -> bool:
    """Tell whether a parameter's value comes from the command line, or a file of settings that has another
    than the default there."""
    source = context.get_parameter_source(name)
    if source is ParameterSource.DEFAULT_MAP:
        parameter = next(each for each in context.command.params if each.name == name)
        usual = context.command.context_class(context.command)  # without the file
        found, default = context.lookup_default(name), parameter.get_default(usual)
        cast = parameter.type_cast_value
        return bool(cast(context, found) != cast(context, default))
    return source is ParameterSource.COMMANDLINE


class Command(click.Command):
    """A command with its options in groups.

    Parameters
    ----------
    old
        Old spellings of its options.
    """

    context_class = Context

    def __init__(self, *arguments: Any, old: Sequence[Old] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.old = old
        for each in _shared_options():
            self.params.append(each)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments, the old spellings as present ones; model cards tell the latter, too."""
        words, used = spelled_out(self.get_params(ctx), self.old, args)
        if used and current().is_first and not ctx.resilient_parsing:
            said = dict.fromkeys(f"{each.new} in place of {each.name}" for each in used)
            click.echo(f"bitwright: deprecated: write {', '.join(said)}", err=True)
        if ctx.obj is not None:  # all words of the command line
            before = ctx.obj[: len(ctx.obj) - len(args)]
            from bitwright.records.made_by import command_line  # which the command itself needs

            ctx.meta[COMMAND] = command_line([*before, *words])
        given = list(words)
        rest = super().parse_args(ctx, words)
        place = ctx.params.pop("save_config", None)
        if not ctx.resilient_parsing:
            from bitwright.cli.config_file import given_settings

            ctx.meta[SAVED], ctx.meta[SETTINGS] = place, given_settings(self, ctx, given)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; model cards that are written tell it."""
        from bitwright.cli.parameters import say_together
        from bitwright.cli.telling import telling
        from bitwright.records.described import without_places
        from bitwright.records.made_by import made_by

        say_together(ctx)
        if ctx.meta[SAVED] is not None and current().is_first:
            from bitwright.cli.config_file import write_settings

            overwrite = ctx.params.get("overwrite", False)
            place, settings = ctx.meta[SAVED], ctx.meta[SETTINGS]
            write_settings(place, settings, str(self.name), overwrite=overwrite)
        if (key := ctx.meta.get(TEXT_KEY)) is not None:
            from bitwright.text.text_files import TextFiles

            for name in TEXTS:
                if ctx.params.get(name) is not None:
                    ctx.params[name] = TextFiles.of(ctx.params[name], key)
        command, settings = ctx.meta.get(COMMAND), without_places(ctx.meta[SETTINGS])
        made = nullcontext() if command is None else made_by(command, str(self.name), settings)
        with made, telling(ctx):
            result = super().invoke(ctx)
            if PUSH in ctx.meta and current().is_first:
                from bitwright.tools.upload import upload

                place = upload(ctx.params["out"], ctx.meta[PUSH])
                if JSON in ctx.meta:
                    ctx.meta[JSON]["pushed_to"] = place
                else:
                    click.echo(place)
        return result

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups, all descriptions in one column."""
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx)
            if record is not None and isinstance(each, click.Option):
                groups[getattr(each, "group", RUN)].append(record)  # --help is click's
        column = min(NAMES, max(len(name) for rows in groups.values() for name, _ in rows))
        for group, rows in groups.items():
            if rows:
                with formatter.section(group):
                    formatter.write_dl([(name.ljust(column), text) for name, text in rows])
