"""Reports as JSON: what `--json` prints, and report.json holds beside every output."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bitwright.files.replacing import replaced
from bitwright.records.made_by import made_with, without_place

REPORT_FILE, SETTINGS_FILE = "report.json", "bitwright.yaml"
SETTINGS_MARK = "# bitwright "  # how files of settings begin
VARYING = ("out", "seconds", "tokens_per_second", "peak_memory_bytes", "warnings")
"""What differs between two runs of one command, or from where it is; report.json has none of it."""


_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,14})?")


class _Writer(Protocol):
    def write_text(self, name: str, text: str) -> None: ...

    def write_json(self, name: str, value: Any) -> None: ...


def described(report: object, without: tuple[str, ...] = ()) -> Any:
    """Return what JSON can hold of a report.

    Of a dataclass these are its fields, and the properties that it names in ``DERIVED``; arrays are left
    out, and numbers that are not finite are null.

    Parameters
    ----------
    report
        A dataclass, or what one holds.
    without
        Fields that are left out, wherever they are.

    Examples
    --------
    >>> import bitwright
    >>> described(bitwright.Recipe({"a": (4, 64)}, 4.5, 4.5))
    {'layers': {'a': [4, 64]}, 'target_bpw': 4.5, 'bits_per_weight': 4.5}
    """
    if is_dataclass(report) and not isinstance(report, type):
        names = [each.name for each in fields(report)]
        names += getattr(type(report), "DERIVED", ())
        values = {name: getattr(report, name) for name in names if name not in without}
        return described(values, without)
    if isinstance(report, Mapping):
        return {
            str(key): described(value, without)
            for key, value in report.items()
            if not isinstance(value, np.ndarray)
        }
    if isinstance(report, list | tuple):
        return [described(each, without) for each in report]
    if isinstance(report, np.generic):
        report = report.item()
    if isinstance(report, float):
        return report if math.isfinite(report) else None
    return report if report is None or isinstance(report, bool | int | str) else str(report)


def as_json(content: object) -> str:
    """Write it as one line of JSON."""
    return json.dumps(content, allow_nan=False)


def write_report(writer: _Writer, report: object) -> None:
    """Write what a run has done, and the settings that it ran with, beside its other files.

    Parameters
    ----------
    writer
        Of the output.
    report
        What the run returns.
    """
    made = made_with()
    content = {
        **described(report, VARYING),
        "bitwright": version("bitwright"),
        "command": made.command,
        "settings": made.settings,
    }
    writer.write_json(REPORT_FILE, content)
    if made.settings is not None:
        writer.write_text(SETTINGS_FILE, settings_text(made.settings, made.name))


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `write_report` has written."""
    content: dict[str, Any] = json.loads((Path(folder) / REPORT_FILE).read_bytes())
    return content


def extend_report(folder: Path, within: str, more: Mapping[str, object]) -> None:
    """Make a report that lies in a folder a part of that of the call around it, unless it is one already.

    Parameters
    ----------
    folder
        Of the report.
    within
        What it is called there.
    more
        What else that call has to say.
    """
    content = read_report(folder)
    made = {name: content.pop(name) for name in ("bitwright", "command", "settings")}
    whole = {within: content.get(within, content), **described(more, VARYING), **made}
    with replaced(folder / REPORT_FILE) as partial:
        partial.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def settings_text(settings: Mapping[str, object], command: str) -> str:
    """Write settings as YAML that `--config` reads."""
    import yaml  # takes a while

    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    return f"{SETTINGS_MARK}{command} --config THIS_FILE\n{text}"


def without_places(settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings that name no place of this machine: of absolute paths the names alone."""

    def told(value: object) -> object:
        if isinstance(value, list):
            return [told(each) for each in value]
        if isinstance(value, str):
            if _NUMBER.fullmatch(value):
                return float(value) if "." in value else int(value)
            return without_place(value)
        return value

    return {name: told(value) for name, value in settings.items()}


def megabytes(size: int) -> str:
    """Write a number of bytes in megabytes."""
    return f"{size / 1e6:,.1f} MB"
