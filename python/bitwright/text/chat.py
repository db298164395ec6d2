"""Chats as text, by the template that comes with a model's tokenizer."""

import json
from collections import Counter
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser

from bitwright.errors import CalibrationError, shown
from bitwright.files.text_file import TEXT_LIMIT
from bitwright.text.message_forms import NotTextError, Worth, forms, kinds_without_text
from bitwright.text.template_files import (
    DEFAULT,
    TOOL_USE,
    TemplateText,
    chat_templates,
    special_tokens,
)
from bitwright.text.template_sandbox import ALL_SECONDS, BoundedSandbox, SlowTemplateError
from bitwright.warned import warn

SOURCE_LIMIT = 1 << 16  # characters of a template; the usual ones are below 20,000
REFUSED_SHARE = 10  # one of so many lines may be refused by the template, and is left out then
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that data have for it


class RefusedChatError(CalibrationError):
    """A sound chat that the template does not write."""


class MalformedChatError(CalibrationError):
    """What is meant as a chat is none."""


class Chats:
    """The chats of one file as text, less the few that the template refuses.

    Parameters
    ----------
    folder : pathlib.Path or None
        Where the tokenizer lies, if that is known.
    path : pathlib.Path
        The file, for warnings.
    lines : int
        How many it has. One of ten may be refused.
    plain : bool
        Whether chats are plain text where there is no template: names of roles, and what each says.
    """

    def __init__(self, folder: Path | None, path: Path, lines: int, plain: bool = False) -> None:
        self._folder = folder
        self._plain = plain and not _has_template(folder)
        self._path = path
        self._lines = lines
        self._template: ChatTemplate | None = None
        self._refused: list[str] = []
        self._kinds: Counter[str] = Counter()

    def render(self, line: dict[str, Any], where: str) -> str | None:
        """Write a chat as `ChatTemplate.render` does; None if it is to be left out.

        Raises
        ------
        CalibrationError
            If there is no template, the chat is malformed, or too many are refused.
        """
        if self._plain:
            said = (f"{each['role'].capitalize()}: {each['content']}" for each in line["messages"])
            return "\n\n".join(said) + "\n\n\n"
        self._template = self._template or ChatTemplate(self._folder, where)
        try:
            text = self._template.render(line, where)
        except RefusedChatError as error:
            self._refused.append(str(error))
            if len(self._refused) * REFUSED_SHARE > self._lines:
                raise CalibrationError(
                    f"{self._refused[0]} ({len(self._refused)} of {self._lines} lines are refused up "
                    f"to here; one of {REFUSED_SHARE} would be left out)"
                ) from error
            return None
        if "messages" in line:
            self._kinds += kinds_without_text(line["messages"])
        return text

    def finish(self) -> None:
        """Warn of what is not in the text."""
        if self._refused:
            warn(
                f"{self._path}: {len(self._refused)} of {self._lines} lines are left out, because the "
                f"chat template refuses them. The first: {self._refused[0]}"
            )
        if self._kinds:
            kinds = ", ".join(
                f"{count} {shown(kind)}" for kind, count in self._kinds.most_common(5)
            )
            warn(
                f"{self._path}: {self._kinds.total()} parts of messages are no text ({kinds}); of them "
                f"the model sees at most what the chat template writes in their place"
            )


def _has_template(folder: Path | None) -> bool:
    return folder is not None and bool({DEFAULT, TOOL_USE} & chat_templates(folder).keys())


class ChatTemplate:
    """The chat templates of a model, in a sandbox: templates come from strangers.

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
        found = {} if folder is None else chat_templates(folder)
        if folder is None or not {DEFAULT, TOOL_USE} & found.keys():
            place = f" in {folder}" if folder else ""
            raise CalibrationError(
                f"{where}: is a chat, but there is no chat template{place}. Add chat_template.jinja "
                f"next to tokenizer.json and give that folder as the tokenizer, or write each chat "
                f'as one "text"'
            )
        self._tokens = special_tokens(folder)
        self._found = found
        self._compiled: dict[str, _Compiled] = {}
        self._done = 0  # chats
        if DEFAULT in found:
            self._template(DEFAULT)

    def render(self, line: dict[str, Any], where: str, *, prompts: bool = False) -> str:
        """Write a chat as the model is used to read it.

        Parameters
        ----------
        line : dict
            "messages", each with a "role" and a "content", or "prompt" and "completion"; and perhaps
            "tools", which may be in a message, too, and "documents".
        where : str
            The line's place, for errors.
        prompts : bool
            Whether the beginning of the model's next answer follows.

        Returns
        -------
        str
            The text with its special tokens written out.

        Raises
        ------
        CalibrationError
            If the chat is malformed, or the template fails on it.
        """
        messages = _messages(line, where)
        within = (message["tools"] for message in messages if "tools" in message)
        tools = _objects(line, "tools", where)
        if tools is None:
            tools = _objects({"tools": next(within, None)}, "tools", where)
        name = TOOL_USE if tools is not None and TOOL_USE in self._found else DEFAULT
        if name not in self._found:
            raise CalibrationError(
                f"{where}: has no tools, and the only chat template in {self._found[TOOL_USE].path} is "
                f'"{TOOL_USE}". Add one that is "{DEFAULT}"'
            )
        template = self._template(name)
        others = {"documents": _objects(line, "documents", where), "add_generation_prompt": prompts}
        messages = _with_reasoning(messages, template.names)
        worth, best, refused = Worth(messages), None, None
        for form in forms(messages):
            try:
                text = template.write({"messages": form, "tools": tools, **others}, self._tokens)
            except SlowTemplateError as error:
                raise CalibrationError(
                    f"{where}: the chat template in {template.path} is too slow: after {self._done} chats "
                    f"it has used up the {ALL_SECONDS} seconds that it has for all, and some ms more for "
                    f'each. Give fewer chats, or write each as one "text"'
                ) from error
            except (SecurityError, RecursionError, OverflowError, MemoryError) as error:
                raise CalibrationError(template.failed(where, error)) from error
            except Exception as error:
                if refused is None or isinstance(refused, NotTextError):
                    refused = error
                continue
            value = worth.of(text)
            if best is None or value > best[0]:
                best = value, text
            if value == worth.whole:
                break
        self._done += 1
        if best is None:
            assert refused is not None
            raise RefusedChatError(template.failed(where, refused)) from refused
        return best[1]

    def _template(self, name: str) -> "_Compiled":
        """Return a template, which is compiled when it is first needed."""
        if name not in self._compiled:
            self._compiled[name] = _Compiled(self._found[name])
        return self._compiled[name]


class _Compiled:
    """A template that is ready to be used."""

    def __init__(self, given: TemplateText) -> None:
        self.path = given.path
        try:
            if len(given.source) > SOURCE_LIMIT:
                raise ValueError(f"it has more than {SOURCE_LIMIT} characters")
            self._environment = _environment()
            tree = self._environment.parse(given.source)
            self.names = _names(tree)
            self._template: Template = self._environment.from_string(tree)
        except Exception as error:
            place = (
                f", see its line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            )
            raise CalibrationError(
                f"{self.path}: is not a sound chat template{place}: {_reason(error)}"
            ) from error

    def write(self, variables: dict[str, Any], tokens: dict[str, Any]) -> str:
        """Return the text, or raise whatever the template raises."""
        text = StringIO()
        self._environment.start(variables)
        try:
            for piece in self._template.generate(tokens | variables):
                text.write(piece)
                if text.tell() > TEXT_LIMIT:
                    raise OverflowError(f"it writes more than {TEXT_LIMIT >> 20} MiB")
        finally:
            self._environment.stop()
        return text.getvalue()

    def failed(self, where: str, error: Exception) -> str:
        """Say that it fails on a chat."""
        return f"{where}: the chat template in {self.path} fails on it: {_reason(error)}"


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


def _names(tree: nodes.Template) -> frozenset[str]:
    """Return the names of what a template may read of its messages."""
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(attributes | constants)


def _with_reasoning(messages: list[dict[str, Any]], names: frozenset[str]) -> list[dict[str, Any]]:
    """Give reasoning the two names that transformers gives it, and the third if only that is read."""
    named = []
    for message in messages:
        found = next((message[name] for name in REASONING if name in message), None)
        if found is not None:
            message = {"thinking": found, **message, "reasoning_content": found}
            if names.isdisjoint(REASONING[:2]):
                message.setdefault("reasoning", found)
        named.append(message)
    return named


def _messages(line: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if "messages" not in line:
        said = {"user": line["prompt"], "assistant": line["completion"]}
        if not all(isinstance(content, str) for content in said.values()):
            raise MalformedChatError(
                f'{where}: "prompt" and "completion" must be strings, but the line is {shown(line)}'
            )
        return [{"role": role, "content": content} for role, content in said.items()]
    messages = line["messages"]
    if not isinstance(messages, list) or not messages:
        raise MalformedChatError(
            f'{where}: "messages" must be a list of at least one message, but is {shown(messages)}'
        )
    for number, message in enumerate(messages, start=1):
        if not _is_message(message):
            raise MalformedChatError(
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


def _objects(line: dict[str, Any], name: str, where: str) -> list[dict[str, Any]] | None:
    """Return a list of objects, which may be written as JSON, as each of them may be."""
    given = line.get(name)
    value = _from_json(given)
    listed = [_from_json(each) for each in value] if isinstance(value, list) else []
    if not isinstance(value, list | None) or not _is_list_of_objects(listed):
        raise MalformedChatError(
            f'{where}: "{name}" must be a list of objects, but is {shown(given)}'
        )
    return None if value is None else listed


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
