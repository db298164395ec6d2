"""Settings of a command in a YAML file: read, checked with the line of a mistake, and written."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from bitwright.errors import ConfigError, shown
from bitwright.files.home import expanded
from bitwright.files.replacing import check_new_file, followed, replaced
from bitwright.files.text_file import read_bytes
from bitwright.records.described import SETTINGS_MARK, settings_text

LIMIT = 1 << 20  # bytes
DEPTH = 3  # of values; overrides have two
LONGEST = 500  # characters of what is said of a value
UNSET = ("", "~", "null", "Null", "NULL")


def read_settings(path: Path, command: click.Command, context: click.Context) -> dict[str, Any]:
    """Return the settings in a file, by the names of a command's parameters.

    Values are the words of the command line: lists where an option may be given several times, and for
    overrides an object of globs.

    Parameters
    ----------
    path : pathlib.Path
        The file: one YAML object.
    command, context
        Whose settings they are.

    Raises
    ------
    ConfigError
        If it cannot be read, a key is unknown or there twice, or a value is not what it must be; the
        message names the line.
    """
    place = Path(expanded(path))
    known = {each.name: each for each in command.params if each.name and each.name != "config"}
    settings: dict[str, Any] = {}
    for key, value, line in _entries(place):
        where = f"{place}, line {line}"
        name = _parameter(key, known)
        if name is None:
            close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"; is {close[0]} meant?" if close else ""
            raise ConfigError(f"{where}: {command.name} has no setting {shown(key)}{hint}")
        if name in settings:
            raise ConfigError(f"{where}: {shown(key)} is there twice")
        if value is not None:
            settings[name] = _checked(value, known[name], context, f"{where}: {key}")
    return settings


def write_settings(
    path: Path, settings: Mapping[str, Any], command: str, overwrite: bool = False
) -> None:
    """Write settings so that `read_settings` gives them back.

    Raises
    ------
    OutputExistsError
        If there is a file that this has not written, unless that may be overwritten.
    OutputError
        If the operating system refuses.
    """
    place = Path(expanded(path))
    check_new_file(place, _check_own, overwrite)
    with replaced(followed(place)) as temporary:
        temporary.write_text(settings_text(settings, command), encoding="utf-8")


def _check_own(path: Path) -> None:
    """Raise ConfigError unless a file begins as those that are written here."""
    if not read_bytes(path, LIMIT, ConfigError).startswith(SETTINGS_MARK.encode()):
        raise ConfigError(f"{path}: was not written by --save-config")


def given_settings(
    command: click.Command, context: click.Context, words: list[str]
) -> dict[str, Any]:
    """Return all settings of a run: from the command line, its config file, and defaults."""
    raw, _, _ = command.make_parser(context).parse_args(list(words))
    found: dict[str, Any] = {}
    for each in command.params:
        name = each.name
        if name is None or name in ("config", "save_config", "help", "as_json"):
            continue
        value = raw.get(name)
        if not isinstance(value, str | bool | int | float | list | tuple):
            value = (context.default_map or {}).get(name)
        if isinstance(each, click.Option) and each.is_flag and isinstance(value, str):
            value = click.BOOL.convert(value, each, context)
        if value is None:
            value = each.get_default(context)
        if isinstance(value, tuple | list):
            value = [_plain(part) for part in value]
        if isinstance(value, str | bool | int | float | list) and value != []:
            found[name] = value
        elif isinstance(value, Path):
            found[name] = str(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        return f"{value[0]}={','.join(f'{key}:{number}' for key, number in value[1].items())}"
    return value if isinstance(value, str | bool | int | float) else str(value)


def _entries(path: Path) -> Iterable[tuple[str, Any, int]]:
    """Yield keys, values and lines; scalars as the text that they are, so that 3:32 is no number."""
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file")
    try:
        root = yaml.compose(
            read_bytes(path, LIMIT, ConfigError).decode("utf-8-sig"), yaml.BaseLoader
        )
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text, see byte {error.start}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{line}: is not sound YAML: {reason}") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}, line {root.start_mark.line + 1}: must be settings, KEY: VALUE")
    for key, value in root.value:
        line = key.start_mark.line + 1
        yield _word(key, f"{path}, line {line}"), _value(value, f"{path}, line {line}"), line


def _word(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: a key must be a word")
    return str(node.value)


def _value(node: yaml.Node, where: str, depth: int = 0) -> Any:
    if depth > DEPTH:  # by an alias, one of a few bytes may have no end
        raise ConfigError(f"{where}: is nested too deeply")
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in UNSET else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(each, where, depth + 1) for each in node.value]
    assert isinstance(node, yaml.MappingNode)
    return {_word(key, where): _value(value, where, depth + 1) for key, value in node.value}


def _parameter(key: str, known: Mapping[str, click.Parameter]) -> str | None:
    """Return the parameter that a key names: by its own name, or its option's without the dashes."""
    name = key.replace("-", "_")
    if name in known:
        return name
    spelled = f"--{key.replace('_', '-')}"
    return next((each.name for each in known.values() if spelled in each.opts), None)


def _checked(value: Any, parameter: click.Parameter, context: click.Context, where: str) -> Any:
    """Return a value as click takes it from a command line, once it is known to be sound."""
    if isinstance(value, dict):
        parts = [each.values() for each in value.values() if isinstance(each, dict)]
        words = [word for part in parts for word in part]
        if len(parts) < len(value) or not all(isinstance(each, str) for each in words):
            raise ConfigError(f"{where}: must map each glob to its settings")
        value = [
            f"{glob}={','.join(f'{key}:{number}' for key, number in each.items())}"
            for glob, each in value.items()
        ]
    if parameter.multiple or parameter.nargs == -1:
        value = value if isinstance(value, list) else [value]
    elif isinstance(value, list):
        raise ConfigError(f"{where}: must be one value, but is a list")
    if type(parameter.type).__name__ == "Model":
        return value  # which is looked for where all models are
    try:
        parameter.type_cast_value(context, value)
    except click.BadParameter as error:
        said = error.message
        said = said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
        raise ConfigError(f"{where}: {said}") from error
    return value
