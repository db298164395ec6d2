"""Chats as text, by the template that comes with a model's tokenizer."""

import json
import os
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from bitwright.errors import CalibrationError, shown
from bitwright.template_sandbox import BoundedSandbox
from bitwright.text_file import TEXT_LIMIT, read_text

TEMPLATE_LIMIT = 16 << 20  # bytes, of tokenizer_config.json too; the usual ones are below 2 MB
SOURCE_LIMIT = 1 << 16  # characters of a template; the usual ones are below 20,000
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def is_chat(line: dict[str, Any]) -> bool:
    """Tell whether a JSON line is meant as a chat, sound or not.

    Parameters
    ----------
    line : dict
        Holds "messages", or "prompt" and "completion", if it is.

    Returns
    -------
    bool
        True for what `ChatTemplate.render` takes.

    Examples
    --------
    >>> is_chat({"messages": []}), is_chat({"prompt": "2 + 2?"})
    (True, False)
    """
    return "messages" in line or line.keys() >= {"prompt", "completion"}


class ChatTemplate:
    """The chat template of a model, in a sandbox: templates come from strangers.

    As in transformers, chat_template.jinja goes before chat_template.json, and that before
    tokenizer_config.json.

    Parameters
    ----------
    folder : pathlib.Path or None
        Where the tokenizer lies, if that is known.
    where : str
        The chat that asks for a template, for errors.

    Raises
    ------
    CalibrationError
        If there is no template, or none that can be read.
    """

    def __init__(self, folder: Path | None, where: str) -> None:
        config: dict[str, Any] = {}
        source = None
        if folder is not None:
            config = _json_object(folder / "tokenizer_config.json")
            self._path, source = _source(folder, config)
        if source is None:
            place = f" in {folder}" if folder else ""
            raise CalibrationError(
                f"{where}: is a chat, but there is no chat template{place}. Add chat_template.jinja "
                f"next to tokenizer.json and give that folder as the tokenizer, or write each chat "
                f'as one "text"'
            )
        self._tokens = _tokens(config, self._path.with_name("tokenizer_config.json"))
        try:
            if len(source) > SOURCE_LIMIT:
                raise ValueError(f"it has more than {SOURCE_LIMIT} characters")
            self._environment = _environment()
            self._template = self._environment.from_string(source)
        except Exception as error:
            place = (
                f", see its line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            )
            raise CalibrationError(
                f"{self._path}: is not a sound chat template{place}: {_reason(error)}"
            ) from error

    def render(self, line: dict[str, Any], where: str) -> str:
        """Write a chat as the model is used to read it.

        Parameters
        ----------
        line : dict
            "messages", each with a "role" and a "content", and perhaps "tools"; or "prompt" and
            "completion".
        where : str
            The line's place, for errors.

        Returns
        -------
        str
            The text with its special tokens written out.

        Raises
        ------
        CalibrationError
            If the chat is malformed, or the template fails on it.
        """
        variables = {"messages": _messages(line, where), "tools": _tools(line, where)}
        options = {"documents": None, "add_generation_prompt": False}
        text = StringIO()
        try:
            self._environment.start(variables)
            for piece in self._template.generate(self._tokens | variables | options):
                text.write(piece)
                if text.tell() > TEXT_LIMIT:
                    raise OverflowError(f"it writes more than {TEXT_LIMIT >> 20} MiB")
        except Exception as error:
            raise CalibrationError(
                f"{where}: the chat template in {self._path} fails on it: {_reason(error)}"
            ) from error
        return text.getvalue()


class _Generation(Extension):
    """The tag around what the assistant says, which has a meaning for training only."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> BoundedSandbox:
    environment = BoundedSandbox(
        filters={"tojson": _to_json},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _reason(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)


def _json_object(path: Path) -> dict[str, Any]:
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


def _source(folder: Path, config: dict[str, Any]) -> tuple[Path, str | None]:
    path = folder / "chat_template.jinja"
    if os.path.isfile(path):
        return path, read_text(path, TEMPLATE_LIMIT)
    path = folder / "chat_template.json"
    template = _json_object(path).get("chat_template")
    if template is None:
        path = folder / "tokenizer_config.json"
        template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        candidates = [entry for entry in template if entry.get("name") == "default"] or template
        template = candidates[0].get("template") if len(candidates) == 1 else template
    if template is not None and not isinstance(template, str):
        raise CalibrationError(
            f"{path}: chat_template must be a string, or a list of templates with names of which "
            f'one is "default", but is {shown(template)}'
        )
    return path, template


def _tokens(config: dict[str, Any], path: Path) -> dict[str, str]:
    tokens = {}
    for name in _TOKENS:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            tokens[name] = content
        elif token is not None:
            raise CalibrationError(f"{path}: {name} must be a string, but is {shown(token)}")
    return tokens


def _messages(line: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if "messages" not in line:
        said = {"user": line["prompt"], "assistant": line["completion"]}
        if not all(isinstance(content, str) for content in said.values()):
            raise CalibrationError(
                f'{where}: "prompt" and "completion" must be strings, but the line is {shown(line)}'
            )
        return [{"role": role, "content": content} for role, content in said.items()]
    messages = line["messages"]
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(
            f'{where}: "messages" must be a list of at least one message, but is {shown(messages)}'
        )
    for number, message in enumerate(messages, start=1):
        if not _is_message(message):
            raise CalibrationError(
                f'{where}: message {number} must be an object with a string as "role", and a '
                f'string or a list of objects as "content", but is {shown(message)}'
            )
    # Templates ask whether a key is there; what is null would be written as None.
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if content is None:  # as usual in a message that only calls tools
        return bool(message.get("tool_calls"))
    return isinstance(content, str) or _is_list_of_objects(content)


def _tools(line: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    tools = line.get("tools")
    if tools is not None and not _is_list_of_objects(tools):
        raise CalibrationError(f'{where}: "tools" must be a list of objects, but is {shown(tools)}')
    return tools


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
