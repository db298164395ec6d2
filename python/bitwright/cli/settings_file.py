"""A list of settings in a YAML file, each an object of arguments, checked with the line of a mistake."""

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from bitwright.cli.config_file import UNSET, yaml_root
from bitwright.errors import ConfigError, shown

WORDS = {"true": True, "false": False}


def read_settings_list(path: Path, known: Collection[str]) -> list[dict[str, Any]]:
    """Return the settings in a file: a list of objects, or an object of them by their names.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    known : collection of str
        The keys that a setting may have.

    Raises
    ------
    ConfigError
        If it cannot be read, or a key is unknown or there twice; the message names the line.
    """
    root = yaml_root(path)
    if isinstance(root, yaml.SequenceNode):
        return [_setting(each, path, known) for each in root.value]
    if isinstance(root, yaml.MappingNode):
        found = []
        for key, value in root.value:
            setting = _setting(value, path, known)
            found.append({**setting, "name": setting.get("name", key.value)})
        return found
    line = "" if root is None else f", line {root.start_mark.line + 1}"
    raise ConfigError(f"{path}{line}: must be a list of settings, each KEY: VALUE")


def _setting(node: yaml.Node, path: Path, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}, line {node.start_mark.line + 1}: a setting must be an object, KEY: VALUE"
        )
    setting: dict[str, Any] = {}
    for key, value in node.value:
        where, name = f"{path}, line {key.start_mark.line + 1}", str(key.value).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; is {close[0]} meant?" if close else ""
            raise ConfigError(f"{where}: there is no setting {shown(str(key.value))}{hint}")
        if name in setting:
            raise ConfigError(f"{where}: {shown(name)} is there twice")
        setting[name] = _value(value)
    return setting


def _value(node: yaml.Node) -> Any:
    """Return what is written; numbers are those of JSON, so that 3:32 is none."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(each) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        return {_value(key): _value(value) for key, value in node.value}
    text = str(node.value)
    if isinstance(node, yaml.ScalarNode) and node.style is not None:
        return text
    if text in UNSET:
        return None
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if re.fullmatch(r"-?\d+", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"-?\d*\.?\d+(e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE):
        return float(text)
    return text
