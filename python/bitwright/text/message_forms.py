"""Parts of a chat with two forms, of which a template may support one: content as parts or text, and
arguments of tools as objects or as JSON.

Templates get the chat's own form first. One that fails on it, or that loses text, gets the other form."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NoReturn

Message = Mapping[str, Any]


class NotTextError(TypeError):
    """A template wrote a list or an object as text."""


class _Structure:
    """A value that no template should write as text: that would be its Python repr."""

    def __str__(self) -> NoReturn:
        raise NotTextError("it writes a list or an object as if that were text")

    __repr__ = __str__

    def __radd__(self, _other: object) -> NoReturn:
        self.__str__()


class Parts(_Structure, list[Any]):
    """The parts of a content."""

    def __contains__(self, part: object) -> bool:
        if isinstance(part, str):
            str(self)
        return super().__contains__(part)


class Fields(_Structure, dict[str, Any]):
    """A part of a content, or the arguments of a call."""


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield messages as they are, and then with contents, arguments or both in their other forms.

    Parameters
    ----------
    messages
        Of one chat, checked already.

    Yields
    ------
    list of mapping
        The same messages. A list of parts becomes their texts, each on a line of its own; where no
        content is a list, all become lists of one part.
    """
    listed = any(isinstance(message.get("content"), list) for message in messages)
    contents: tuple[Callable[[Any], Any], ...] = (_as_parts, _as_text if listed else _as_part)
    arguments: tuple[Callable[[Any], Any], ...] = (_as_fields,)
    if any(True for _ in _arguments(messages)):
        arguments = (_as_fields, _otherwise)
    for content, argument in product(contents, arguments):
        yield [_formed(message, content, argument) for message in messages]


class Worth:
    """Score of a text that a template made, to choose the best of several.

    Parameters
    ----------
    messages
        Of one chat, as it has them.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        contents = [message.get("content") for message in messages]
        self._listed = any(isinstance(content, list) for content in contents)
        self._texts = [text for each in contents for part in _texts(each) if (text := part.strip())]
        self._quoted = [
            json.dumps(each, ensure_ascii=ascii)
            for each in _arguments(messages)
            if isinstance(each, str) and isinstance(_parsed(each), dict)
            for ascii in (False, True)
        ]

    @property
    def whole(self) -> tuple[bool, int]:
        """The score of a text that lacks nothing."""
        return True, self._count(self._texts)

    def of(self, text: str) -> tuple[bool, int]:
        """Tell whether no JSON is written as a string within JSON, and how many contents the text has.

        Of contents that are strings one is enough: templates may well leave some out.
        """
        nested = any(quoted in text for quoted in self._quoted)
        return not nested, self._count(each for each in self._texts if each in text)

    def _count(self, texts: Iterable[str]) -> int:
        count = sum(1 for _ in texts)
        return count if self._listed else min(count, 1)


def kinds_without_text(messages: Sequence[Message]) -> Counter[str]:
    """Count the parts that are not text, by type.

    Parameters
    ----------
    messages
        Of one chat, checked already.

    Returns
    -------
    collections.Counter
        Such as ``{"image_url": 2}``.

    Examples
    --------
    >>> kinds_without_text([{"content": [{"type": "text", "text": "a"}, {"type": "image"}]}])
    Counter({'image': 1})
    """
    contents = (message.get("content") for message in messages)
    parts = (part for each in contents if isinstance(each, list) for part in each)
    kinds = (part.get("type") for part in parts if not isinstance(part.get("text"), str))
    return Counter(kind if isinstance(kind, str) else "of no type" for kind in kinds)


def _formed(
    message: Message, content: Callable[[Any], Any], argument: Callable[[Any], Any]
) -> Message:
    formed = dict(message)
    if "content" in message:
        formed["content"] = content(message["content"])
    if isinstance(calls := message.get("tool_calls"), list):
        formed["tool_calls"] = [_called(call, argument) for call in calls]
    return formed


def _called(call: Any, argument: Callable[[Any], Any]) -> Any:
    """Return a call of a tool with its arguments in a form; they may be in a "function"."""
    if not isinstance(call, dict):
        return call
    changed = dict(call)
    if "arguments" in call:
        changed["arguments"] = argument(call["arguments"])
    if isinstance(call.get("function"), dict):
        changed["function"] = _called(call["function"], argument)
    return changed


def _arguments(messages: Iterable[Message]) -> Iterator[Any]:
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            for place in (call, call.get("function")) if isinstance(call, dict) else ():
                if isinstance(place, dict) and "arguments" in place:
                    yield place["arguments"]


def _texts(content: object) -> list[str]:
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part.get("text"), str)]
    return [content] if isinstance(content, str) else []


def _as_parts(content: Any) -> Any:
    return Parts(map(Fields, content)) if isinstance(content, list) else content


def _as_text(content: Any) -> Any:
    return "\n".join(_texts(content)) if isinstance(content, list) else content


def _as_part(content: Any) -> Any:
    return Parts([Fields(type="text", text=content)]) if isinstance(content, str) else content


def _as_fields(arguments: Any) -> Any:
    return Fields(arguments) if isinstance(arguments, dict) else arguments


def _otherwise(arguments: Any) -> Any:
    if isinstance(arguments, str):
        parsed = _parsed(arguments)
        return Fields(parsed) if isinstance(parsed, dict) else arguments
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


def _parsed(text: str) -> Any:
    """Return the value of JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
