"""The shapes that public data sets have: what a record says, as a text or as a chat."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.errors import shown

Record = Mapping[str, Any]
ROLES = {
    **{name: "user" for name in ("human", "user", "prompter")},
    **{name: "assistant" for name in ("gpt", "assistant", "model", "chatgpt", "bot", "bard")},
    **{name: "tool" for name in ("tool", "observation", "function_response", "ipython")},
    **{name: "system" for name in ("system", "developer")},
    "function_call": "assistant",
}
"""The roles that records have, and those of templates."""
# A question, what is added to it, and its answer; the first that a record has all of counts.
PAIRS = (
    *(("prompt", each) for each in ("completion", "response", "chosen", "answer")),
    *(("instruction", each) for each in ("output", "response", "answer")),
    *(("question", each) for each in ("answer", "response", "chosen")),
    *(("query", each) for each in ("response", "answer")),
    *(("problem", each) for each in ("solution", "answer")),
    *(("input", each) for each in ("output", "response")),
)
ADDED = ("input", "context")  # to an instruction
TEXTS = ("text", "content", "document", "query", "prompt_text", "chosen")
KEYS = {"messages", "conversations", *TEXTS, *(each for pair in PAIRS for each in pair)}
SHAPES = (
    '"text", "messages", "conversations", "prompt" and "completion", "instruction" and "output", '
    '"question" and "answer", "chosen", "content" or "query"'
)


class ShapeError(ValueError):
    """A record holds neither a text nor a chat; the message is to stand behind its place."""


def text_or_chat(value: Any, key: str | None = None) -> str | dict[str, Any]:
    """Return the text of a record, or its chat as `ChatTemplate.render` takes it.

    Parameters
    ----------
    value
        A string, or an object of one of the known shapes.
    key
        Where the text is, a string, or a list of messages; with dots between the keys of nested objects.
        By default the first known shape counts.

    Raises
    ------
    ShapeError
        If it holds neither.

    Examples
    --------
    >>> text_or_chat({"conversations": [{"from": "human", "value": "2 + 2?"}]})
    {'messages': [{'role': 'user', 'content': '2 + 2?'}]}
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise ShapeError(f"must be a string, or an object with {SHAPES}, but is {shown(value)}")
    if key is not None:
        return _at(value, key)
    found: str | dict[str, Any] | None = _text(value)
    if found is None:
        found = _messages(value) or _pair(value) or _other_text(value)
    if found is not None:
        return found
    if "messages" in value:
        return dict(value)  # a chat, if a malformed one
    raise ShapeError(
        f"must be a string, or an object with {SHAPES}, but is {shown(dict(value))}. Which key holds its "
        f"text is told by --text-key (text_key)"
    )


def _text(record: Record) -> str | None:
    found = record.get("text")
    return found if isinstance(found, str) else None


def _messages(record: Record) -> dict[str, Any] | None:
    for name in ("messages", "conversations", "conversation"):
        found = _parsed(record.get(name))
        if found is not None:
            given = _named(found) if isinstance(found, list) else found
            more = {each: record[each] for each in ("tools", "documents") if each in record}
            return {"messages": _with_system(given, record), **more}
    return None


def _pair(record: Record) -> dict[str, Any] | None:
    for question, answer in PAIRS:
        asked, said = _parsed(record.get(question)), _parsed(record.get(answer))
        if asked is None or said is None:
            continue
        if question == "prompt" and answer == "completion" and {type(asked), type(said)} == {str}:
            return dict(record)  # as it is
        if isinstance(said, list) and answer == "chosen" and isinstance(asked, str):
            return {"messages": _named(said)}  # which begins with the question
        added = next((record[each] for each in ADDED if record.get(each) and each != question), "")
        if isinstance(asked, str) and isinstance(added, str) and added:
            asked = f"{asked}\n\n{added}"
        both = [*_as_messages(asked, "user"), *_as_messages(said, "assistant")]
        return {"messages": _with_system(both, record)}
    return None


def _other_text(record: Record) -> str | dict[str, Any] | None:
    for name in TEXTS:
        found = _parsed(record.get(name))
        if isinstance(found, str):
            return found
        if isinstance(found, list) and _are_messages(found):
            return {"messages": _named(found)}
    return None


def _at(record: Record, key: str) -> str | dict[str, Any]:
    found: Any = record.get(key)
    if found is None:
        found = record
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    found = _parsed(found)
    if isinstance(found, str):
        return found
    if isinstance(found, list) and _are_messages(found):
        return {"messages": _named(found)}
    raise ShapeError(f"has no text under the key {shown(key)}, but is {shown(dict(record))}")


def _parsed(value: Any) -> Any:
    """Return a cell of a table that holds messages as JSON as these, and anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) and _are_messages(found) else value
    return value


def _are_messages(value: Sequence[Any]) -> bool:
    return bool(value) and all(
        isinstance(each, Mapping) and ({"from", "value"} <= each.keys() or "role" in each)
        for each in value
    )


def _as_messages(value: Any, role: str) -> list[Any]:
    return _named(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _named(messages: Sequence[Any]) -> list[Any]:
    """Return messages with the keys and roles that templates know; what is none stays, to be named."""
    return [_with_role(each) for each in messages]


def _with_role(message: Any) -> Any:
    if not isinstance(message, Mapping) or "from" not in message or "role" in message:
        return message
    rest = {name: each for name, each in message.items() if name not in ("from", "value", "weight")}
    role = message["from"]
    known = ROLES.get(role.lower(), role) if isinstance(role, str) else role
    return {"role": known, "content": message.get("value"), **rest}


def _with_system(messages: Any, record: Record) -> Any:
    system = record.get("system") or record.get("system_prompt")
    if not isinstance(messages, list) or not isinstance(system, str):
        return messages
    begins = (
        isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
        if messages
        else False
    )
    return messages if begins else [{"role": "system", "content": system}, *messages]
