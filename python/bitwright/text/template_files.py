"""The chat templates of a folder and the tokens that they write, found where transformers finds them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import CalibrationError, shown
from bitwright.files.links import check_own
from bitwright.files.text_file import read_text

TEMPLATE_LIMIT = 16 << 20  # bytes, of tokenizer_config.json too; the usual ones are below 2 MB
ADDITIONAL = "additional_chat_templates"
ADDITIONAL_LIMIT = 64  # templates in that folder; the usual number is below 4
DEFAULT, TOOL_USE = "default", "tool_use"
_HOLDERS = ("chat_template.json", "tokenizer_config.json", "processor_config.json")
_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class TemplateText:
    """A template that is not compiled yet, and the file that holds it."""

    path: Path
    source: str


def chat_templates(folder: Path) -> dict[str, TemplateText]:
    """Return the chat templates of a folder by their names; the usual one is "default".

    chat_template.jinja and what is in additional_chat_templates/ go before chat_template.json, that
    before tokenizer_config.json, and that before processor_config.json.

    Parameters
    ----------
    folder : pathlib.Path
        Where the tokenizer lies.

    Returns
    -------
    dict of str to TemplateText
        Empty if there is none.

    Raises
    ------
    CalibrationError
        If a file is damaged, or there are several templates and none is "default" or "tool_use".

    Examples
    --------
    >>> import bitwright
    >>> chat_templates(bitwright.demo_folder())
    {}
    """
    paths = {DEFAULT: folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in _additional(folder)}
    found = {}
    for name, path in paths.items():
        check_own(path, folder, CalibrationError)
        if os.path.isfile(path):
            found[name] = TemplateText(path, read_text(path, TEMPLATE_LIMIT))
    for name in _HOLDERS:
        if DEFAULT in found:
            break
        template = json_object(folder / name).get("chat_template")
        if template is not None:
            return _named(folder / name, template) | found
    return found


def special_tokens(folder: Path) -> dict[str, Any]:
    """Return the tokens that a template may write by their names, such as "bos_token".

    They are in tokenizer_config.json and special_tokens_map.json. As in transformers the former counts
    where it lists the added tokens as well, and otherwise the latter; what the one lacks is looked for
    in the other.

    Parameters
    ----------
    folder : pathlib.Path
        Where the tokenizer lies.

    Returns
    -------
    dict
        Of strings; "additional_special_tokens" is a list of them.

    Raises
    ------
    CalibrationError
        If a file is damaged, or a token is not a string.
    """
    tokens: dict[str, Any] = {}
    names = ["special_tokens_map.json", "tokenizer_config.json"]
    if "added_tokens_decoder" in json_object(folder / names[1]):
        names.reverse()
    for path in (folder / name for name in names):
        held = json_object(path)
        extra = held.get("extra_special_tokens")
        named = extra if isinstance(extra, dict) else {}
        listed = held.get("additional_special_tokens") or (extra if extra is not named else None)
        if isinstance(listed, list) and None not in (contents := list(map(_content, listed))):
            tokens.setdefault("additional_special_tokens", contents)
        for name, token in {**held, **named}.items():
            content = _content(token)
            if content is not None and (name.endswith("_token") or name in named):
                tokens.setdefault(name, content)
            elif token is not None and name in _TOKENS:
                raise CalibrationError(f"{path}: {name} must be a string, but is {shown(token)}")
    return tokens


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; an empty one if there is no such file."""
    check_own(path, path.parent, CalibrationError)
    if not os.path.isfile(path):
        return {}
    try:
        value = json.loads(read_text(path, TEMPLATE_LIMIT))
    except CalibrationError:
        raise
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CalibrationError(f"{path}: must hold a JSON object, but holds {shown(value)}")
    return value


def _additional(model: Path) -> list[Path]:
    folder = model / ADDITIONAL
    check_own(folder, model, CalibrationError)
    if not os.path.isdir(folder):
        return []
    try:
        listed = sorted(path for path in folder.iterdir() if path.suffix == ".jinja")
    except OSError as error:
        raise CalibrationError(f"{folder}: cannot be listed: {error.strerror}") from error
    if len(listed) > ADDITIONAL_LIMIT:
        raise CalibrationError(
            f"{folder}: holds {len(listed)} templates, more than {ADDITIONAL_LIMIT}. Remove those that "
            f"are not of this model"
        )
    return listed


def _named(path: Path, template: object) -> dict[str, TemplateText]:
    """Take a value of "chat_template" apart."""
    named = template
    if isinstance(template, str):
        named = {DEFAULT: template}
    elif isinstance(template, list) and all(isinstance(each, dict) for each in template):
        named = {each.get("name"): each.get("template") for each in template}
    if isinstance(named, dict) and len(named) == 1:
        named = {DEFAULT if name != TOOL_USE else name: each for name, each in named.items()}
    if (
        not isinstance(named, dict)
        or not all(isinstance(name, str) for name in named)
        or not all(each is None or isinstance(each, str) for each in named.values())
        or not {DEFAULT, TOOL_USE} & named.keys()
    ):
        raise CalibrationError(
            f"{path}: chat_template must be a string, or several templates with names of which "
            f'one is "default", but is {shown(template)}'
        )
    return {name: TemplateText(path, each) for name, each in named.items() if each is not None}


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
