"""Chats come out as transformers writes them, and whole where a template would lose some of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import (
    BOTH,
    SAMPLES,
    SOURCES,
    TOOLS,
    WITH_TOOLS,
    called,
    parts,
    said,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import CalibrationError
from bitwright.text.chat import ChatTemplate
from bitwright.text.message_forms import kinds_without_text
from bitwright.text.samples import load_tokens
from bitwright.warned import BitwrightWarning

# What transformers 5.23.0 makes of the samples; tests/interop compares it with what is installed there.
KNOWN = json.loads((Path(__file__).parents[1] / "data" / "chats.json").read_text(encoding="utf-8"))


def template(folder: Path, **files: Any) -> ChatTemplate:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ChatTemplate(folder, "chats")


@pytest.mark.parametrize("name", SAMPLES)
def test_as_transformers(tmp_path: Path, name: str) -> None:
    sample = SAMPLES[name]
    sample.write(tmp_path)
    known = ChatTemplate(tmp_path, "chats")
    assert len(KNOWN[name]) == len(sample.lines)
    for number, (line, theirs) in enumerate(zip(sample.lines, KNOWN[name], strict=True)):
        if number in sample.better:
            assert sample.better[number] in known.render(line, "")
            assert theirs is None or sample.better[number] not in theirs
        elif theirs is None:
            with pytest.raises(CalibrationError, match="fails on it"):
                known.render(line, "")
        else:
            assert known.render(line, "") == theirs


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (json.dumps(TOOLS), "t" + json.dumps(TOOLS)),
        ([json.dumps(TOOLS[0])], "t" + json.dumps(TOOLS)),
        ("[]", "t[]"),
        ([], "t[]"),
        (None, "dx"),
        ("", "dx"),
        ("null", "dx"),
    ],
)
def test_tools_as_json(tmp_path: Path, tools: Any, text: str) -> None:
    known = template(tmp_path, **{"tokenizer_config.json": {"chat_template": BOTH}})
    assert known.render({**said("x"), "tools": tools}, "") == text


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_within_messages(tmp_path: Path, place: int, tools: Any) -> None:
    known = template(tmp_path, **{"tokenizer_config.json": {"chat_template": BOTH}})
    line = said("x", "y", "z")
    line["messages"][place]["tools"] = tools
    assert known.render(line, "") == known.render(WITH_TOOLS, "")


def test_documents(tmp_path: Path) -> None:
    source = "{{ documents | map(attribute='title') | join(' ') if documents else documents }}"
    known = template(tmp_path, **{"chat_template.jinja": source})
    documents = [{"title": "a"}, {"title": "b"}]
    assert known.render({**said("x"), "documents": documents}, "") == "a b"
    assert known.render({**said("x"), "documents": json.dumps(documents)}, "") == "a b"
    assert known.render(said("x"), "") == "None"


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"chat_template.json": {"chat_template": BOTH}}, "dx"),
        ({"processor_config.json": {"chat_template": "p"}}, "p"),
        ({"processor_config.json": {"chat_template": "p"}, "chat_template.json": {}}, "p"),
        (
            {
                "additional_chat_templates/tool_use.jinja": "a",
                "tokenizer_config.json": {"chat_template": "c"},
            },
            "c",
        ),
        ({"additional_chat_templates/default.jinja": "a", "chat_template.jinja": "j"}, "a"),
    ],
)
def test_places_of_the_default(tmp_path: Path, files: dict[str, Any], text: str) -> None:
    assert template(tmp_path, **files).render(said("x"), "") == text


def test_additional_templates_go_before_the_config(tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": {"chat_template": BOTH},
        "additional_chat_templates/tool_use.jinja": "a",
    }
    known = template(tmp_path, **files)
    assert [known.render(line, "") for line in (said("x"), WITH_TOOLS)] == ["dx", "a"]


def test_a_template_for_tools_only(tmp_path: Path) -> None:
    known = template(tmp_path, **{"additional_chat_templates/tool_use.jinja": "a"})
    assert known.render(WITH_TOOLS, "") == "a"
    with pytest.raises(CalibrationError, match=r'line 3: has no tools, and .*tool_use.*"default"'):
        known.render(said("x"), "chats, line 3")


def test_a_broken_template_that_nobody_needs(tmp_path: Path) -> None:
    files = {"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "{% for %}"}
    known = template(tmp_path, **files)
    assert known.render(said("x"), "") == "d"
    with pytest.raises(CalibrationError, match="tool_use.jinja: is not a sound chat template"):
        known.render(WITH_TOOLS, "")


@pytest.mark.parametrize("count", [65, 1000])
def test_too_many_templates(tmp_path: Path, count: int) -> None:
    files = {f"additional_chat_templates/{number}.jinja": "" for number in range(count)}
    with pytest.raises(CalibrationError, match=f"holds {count} templates, more than 64"):
        template(tmp_path, **files, **{"chat_template.jinja": ""})


def test_tokens_as_lists(tmp_path: Path) -> None:
    """transformers had them until version 4, and templates of then write them."""
    source = "{{ additional_special_tokens | join }}"
    for config in (
        {"additional_special_tokens": ["a", {"content": "b"}]},
        {"extra_special_tokens": ["a", "b"]},
    ):
        known = template(
            tmp_path, **{"chat_template.jinja": source, "tokenizer_config.json": config}
        )
        assert known.render(said("x"), "") == "ab"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (SOURCES["plain"], said("Wind?")),
        (SOURCES["plain"], said(parts("Wind?"), parts("Rain?"))),
        (SOURCES["turns"], said(parts("Wind?"), "Rain?")),
        (SOURCES["thinking"], called({"pier": "Visby"})),
        (SOURCES["thinking"], called('{"pier": "Visby"}')),
    ],
)
def test_no_python_in_the_text(tmp_path: Path, source: str, line: Any) -> None:
    text = template(tmp_path, **{"chat_template.jinja": source}).render(line, "")
    assert "{'" not in text
    assert "'}" not in text


def test_arguments_that_are_no_objects_stay(tmp_path: Path) -> None:
    source = "{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    known = template(tmp_path, **{"chat_template.jinja": source})
    for arguments, text in (
        ("no JSON", '"no JSON"'),
        ("[1]", '"[1]"'),
        (None, "null"),
        ([1], "[1]"),
    ):
        assert known.render(called(arguments), "") == text


START = "{% for m in messages %}{% if m.role == 'critic' %}"
END = "{% endif %}{{ m.content }};{% endfor %}"
REFUSING = START + "{{ raise_exception('No critics.') }}" + END
UNDEFINED = START + "{{ m.score.more }}" + END
TYPES = START + "{{ m.content + 3 }}" + END
CRITIC = {"messages": [{"role": "critic", "content": "Bad."}]}


def tokens_of(folder: Path, source: str, lines: list[Any]) -> str:
    SAMPLES["plain"].write(folder)
    (folder / "chat_template.jinja").write_text(source)
    path = folder / "chats.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    ids = load_tokens(path, tokenizer=folder, length=1)
    return bytes(np.concatenate(ids).astype(np.uint8)).decode("latin-1")


@pytest.mark.parametrize("source", [REFUSING, UNDEFINED, TYPES])
@pytest.mark.parametrize(("lines", "refused"), [(10, 1), (29, 2), (30, 3)])
def test_refused_lines_are_left_out(tmp_path: Path, source: str, lines: int, refused: int) -> None:
    chats = [said(str(number)) for number in range(lines - refused)]
    for number in range(refused):
        chats.insert(3 * number + 2, CRITIC)
    matter = rf"chats.jsonl: {refused} of {lines} lines are left out.*The first: .*line 5: .*"
    with pytest.warns(BitwrightWarning, match=matter) as given:
        text = tokens_of(tmp_path, source, chats)
    assert len(given) == 1
    assert text == "".join(f"{number};" for number in range(lines - refused))


@pytest.mark.parametrize("source", [REFUSING, UNDEFINED, TYPES])
@pytest.mark.parametrize(("lines", "refused"), [(1, 1), (9, 1), (29, 3)])
def test_many_refused_lines_are_an_error(
    tmp_path: Path, source: str, lines: int, refused: int
) -> None:
    chats = [CRITIC] * refused + [said("a")] * (lines - refused)
    matter = (
        rf"line 1: the chat template in .* fails on it: .*{refused} of {lines} lines are refused"
    )
    with pytest.raises(CalibrationError, match=matter):
        tokens_of(tmp_path, source, chats)


@pytest.mark.parametrize("what", ["{{ 'a' * 10**9 }}", "{{ messages.append(3) }}", "{{ m() }}"])
def test_what_is_not_allowed_is_an_error_at_once(tmp_path: Path, what: str) -> None:
    source = "{% macro m() %}{{ m() }}{% endmacro %}{{ messages[0].content }}"
    source += f"{{% if messages[0].role == 'critic' %}}{what}{{% endif %}}"
    with pytest.raises(CalibrationError, match="line 11: the chat template in .* fails on it"):
        tokens_of(tmp_path, source, [said("a")] * 5 + [CRITIC] + [said("a")] * 50)


@pytest.mark.parametrize(
    ("extra", "kinds"),
    [
        ([{"type": "image_url", "image_url": {"url": "a"}}], "1 'image_url'"),
        ([{"type": "image"}, {"type": "image"}, {"type": "input_audio"}], "2 'image', 1 'input_a"),
        ([{"type": "video", "video": "a"}, {}], "1 'video', 1 'of no type'"),
    ],
)
@pytest.mark.parametrize("source", [SOURCES["plain"], SOURCES["turns"]])
def test_parts_that_are_no_text_are_named(
    tmp_path: Path, source: str, extra: list[Any], kinds: str
) -> None:
    matter = rf"chats.jsonl: {len(extra)} parts of messages are no text \({kinds}"
    with pytest.warns(BitwrightWarning, match=matter):
        text = tokens_of(tmp_path, source, [said([*extra, *parts("Wind?")], "Rain?")])
    assert "Wind?" in text
    assert "Rain?" in text


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
PART = st.fixed_dictionaries(
    {}, optional={"type": VALUE | st.just("text"), "text": VALUE | st.text()}
)
CALLED = st.fixed_dictionaries(
    {}, optional={"name": VALUE, "arguments": VALUE | st.just('{"a": 1}')}
)
CALL = CALLED | st.fixed_dictionaries({"function": CALLED | VALUE})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
    optional={
        "content": VALUE | st.text() | st.lists(PART, max_size=3),
        "tool_calls": VALUE | st.lists(CALL, max_size=2),
        "reasoning": VALUE,
        "thinking": VALUE,
        "tools": VALUE,
    },
)
CHAT = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=4)},
    optional={"tools": VALUE | st.just(json.dumps(TOOLS)), "documents": VALUE},
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[ChatTemplate]:
    folders = []
    for name in ("headers", "thinking", "brackets", "turns", "adding", "keyed", "iterating"):
        folders.append(tmp_path_factory.mktemp(name))
        SAMPLES["plain"].write(folders[-1])
        (folders[-1] / "chat_template.jinja").write_text(SOURCES[name])
    return [ChatTemplate(folder, "chats") for folder in folders]


def refusal(known: ChatTemplate, chat: Any) -> str | None:
    try:
        known.render(chat, "chats, line 7")
    except CalibrationError as error:
        return str(error)
    return None


@settings(deadline=None, max_examples=60)
@given(chat=CHAT)
def test_any_chat_is_written_or_refused_in_words(compiled: list[ChatTemplate], chat: Any) -> None:
    for known in compiled:
        refused = refusal(known, chat)
        assert refused is None or refused.startswith("chats, line 7: ")
        assert refused is None or refused.isprintable()


@pytest.mark.parametrize("place", ["arguments", "type", "content", "tools", "thinking"])
def test_deep_values(compiled: list[ChatTemplate], place: str) -> None:
    deep: Any = "end"
    for _ in range(900):
        deep = [deep]
    chat = called({"a": deep} if place == "arguments" else {})
    if place == "tools":
        chat["tools"] = deep
    elif place == "type":
        chat["messages"][0]["content"] = [{"type": deep}]
    elif place == "content":
        chat["messages"][0]["content"] = [{"type": "text", "text": "a", "more": deep}]
    elif place == "thinking":
        chat["messages"][1]["thinking"] = deep
    for known in compiled:
        assert len(refusal(known, chat) or "") < 1000
    kinds_without_text(chat["messages"])
