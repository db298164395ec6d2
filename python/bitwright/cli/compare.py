"""``bitwright compare``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.cli import options
from bitwright.cli.grouped import (
    Command,
    calibration_option,
    evaluation_option,
    file_option,
    method_option,
    precision_option,
)
from bitwright.cli.parameters import NewFile
from bitwright.cli.settings_file import read_settings_list
from bitwright.cli.telling import tell
from bitwright.errors import ConfigError
from bitwright.files.home import expanded
from bitwright.quantization.options import PRESETS
from bitwright.report.printing import print_comparison
from bitwright.tools.compare import SETTINGS, checked_settings, setting_grid


def _listed(text: str | None) -> list[str]:
    return [] if text is None else [each.strip() for each in text.split(",") if each.strip()]


@click.command(cls=Command)
@options.model
@file_option("-o", "--out", required=True, type=options.PATH, help="Folder for results and models.")
@file_option(
    "--settings",
    type=options.PATH,
    help="YAML file: a list of settings, each with arguments of bitwright.quantize, or a folder.",
)
@file_option(
    "--folder",
    "folders",
    multiple=True,
    type=options.PATH,
    help="Compare this quantized model, too.",
)
@file_option("--plot", type=NewFile(), help="Plot KL over size into this file (.png, .svg, .pdf).")
@options.links
@calibration_option("--calibration", type=options.PATH, help=f"{options.TEXT}; for all settings.")
@calibration_option("--calibration-samples", type=click.IntRange(1), help="For all settings.")
@calibration_option("--calibration-length", type=click.IntRange(1), help="For all settings.")
@options.text_key
@evaluation_option("--evaluation", required=True, type=options.PATH, help=f"{options.TEXT}.")
@evaluation_option("--samples", type=click.IntRange(1), help="Use the first so many samples.")
@options.length(2, evaluation_option)
@options.bos(evaluation_option)
@precision_option(
    "--bits", "tried_bits", metavar="BITS,…", help="As for quantize; every one of them is tried."
)
@precision_option("--group-size", "tried_group_size", metavar="SIZE,…", help="As for quantize.")
@precision_option("--format", "tried_format", metavar="FORMAT,…", help="As for quantize.")
@method_option("--method", "tried_method", metavar="METHOD,…", help="As for quantize.")
@method_option(
    "--preset", type=click.Choice(PRESETS), default="default", help="As for quantize, for all."
)
@options.memory
@options.threads
def compare(
    model: Path,
    settings: Path | None,
    folders: tuple[Path, ...],
    threads: int | None,
    preset: str,
    **given: Any,
) -> None:
    """Quantize MODEL in several ways, and compare what each loses with its size."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    lists = {
        name: _listed(given.pop(f"tried_{name}"))
        for name in ("method", "bits", "group_size", "format")
    }
    chosen: dict[str, list[Any]] = {name: each for name, each in lists.items() if each}
    if "group_size" in chosen:
        chosen["group_size"] = [
            each if each == "auto" else click.INT.convert(each, None, None)
            for each in chosen["group_size"]
        ]
    asked: list[dict[str, Any]] = []
    if settings is not None:
        place = Path(expanded(settings))
        asked += read_settings_list(place, ("name", "folder", *SETTINGS))
    if chosen:
        asked += setting_grid(**chosen)
    asked += [{"folder": str(each)} for each in folders]
    if not asked:
        raise click.UsageError("give --settings, --folder, or lists such as --bits 3,4")
    shared = {
        "calibration": given.pop("calibration"),
        "samples": given.pop("calibration_samples"),
        "length": given.pop("calibration_length"),
        "preset": None if preset == "default" else preset,
    }
    shared = {name: each for name, each in shared.items() if each is not None}
    named = checked_settings(asked)
    full = [
        setting if "folder" in setting else {**shared, **setting, "name": name}
        for name, setting in named.items()
    ]
    try:
        found = bitwright.compare(model, full, **given)
    except TypeError as error:
        if settings is None:
            raise
        raise ConfigError(f"{settings}: {error}") from error
    tell(found, lambda console: print_comparison(found, console))
