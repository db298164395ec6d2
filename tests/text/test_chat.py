"""Chats become the text that the model's own template writes, whoever has written the template."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_template_sandbox import USUAL
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from bitwright.errors import CalibrationError
from bitwright.text import template_sandbox
from bitwright.text.chat import ChatTemplate
from bitwright.text.samples import load_tokens

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA = """\
{% for message in messages %}
    {% if loop.first %}
{{ bos_token }}{% endif %}
    {% if message['role'] not in ('system', 'user', 'assistant') %}
        {{ raise_exception('No such role: ' + message['role']) }}
    {% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}
"""
USER = {"role": "user", "content": "a b"}
CHAT = {"messages": [USER, {"role": "assistant", "content": " c "}]}
CHATML_TEXT = "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n c <|im_end|>\n"
LLAMA_TEXT = (
    "<s><|start_header_id|>user<|end_header_id|>\n\na b<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nc<|eot_id|>"
)
CONTENTS = '{{ messages | map(attribute="content") | join("|") }}'


def rendered(folder: Path, template: str, line: dict[str, Any] = CHAT, **config: Any) -> str:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTemplate(folder, "chats").render(line, "chats, line 7")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Characters and two special tokens, beside a ChatML template."""
    words = {chr(code): code for code in range(128)}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    return made


def loaded(folder: Path, *lines: Any, tokenizer: Any = None, tokens: int = 1) -> list[int]:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    ids: list[int] = load_tokens(path, tokenizer=tokenizer or folder, length=tokens)[0].tolist()
    return ids


def test_known_templates(tmp_path: Path) -> None:
    assert rendered(tmp_path, CHATML) == CHATML_TEXT
    assert rendered(tmp_path, LLAMA, bos_token="<s>") == LLAMA_TEXT
    assert rendered(tmp_path, LLAMA, bos_token={"content": "<s>", "lstrip": False}) == LLAMA_TEXT
    assert rendered(tmp_path, LLAMA, bos_token=None) == LLAMA_TEXT.removeprefix("<s>")
    line = {"prompt": "a b", "completion": " c "}
    assert rendered(tmp_path, CHATML, line) == CHATML_TEXT


def test_variables(tmp_path: Path) -> None:
    template = """{% for name in [bos_token, eos_token, pad_token, unk_token] %}
{% if loop.last %}{% break %}{% endif %}{{ name }} {% endfor %}{{ unk_token is defined }}
{{ tools | tojson }} {{ add_generation_prompt }} {{ strftime_now("%Y") | int > 2000 }}"""
    text = rendered(tmp_path, template, bos_token="B", eos_token="E", pad_token="P")
    assert text == "B E P False\nnull False True"
    tools = [{"name": "<ü>", "a": "'"}]
    line = CHAT | {"tools": tools}
    assert rendered(tmp_path, "{{ tools | tojson }}", line) == '[{"name": "<ü>", "a": "\'"}]'
    shortest = "{{ tools | tojson(indent=1, separators=(',', ':'), sort_keys=True) }}"
    assert rendered(tmp_path, shortest, line) == '[\n {\n  "a":"\'",\n  "name":"<ü>"\n }\n]'


@pytest.fixture(scope="module")
def contents_template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("contents")
    (folder / "chat_template.jinja").write_text(CONTENTS)
    return ChatTemplate(folder, "")


@given(contents=st.lists(st.text(), min_size=1))
def test_contents_stay_as_they_are(contents_template: ChatTemplate, contents: list[str]) -> None:
    line = {"messages": [{"role": "user", "content": content} for content in contents]}
    assert contents_template.render(line, "") == "|".join(contents)


def test_messages_beyond_strings(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    template = """{{ messages[0].content | map(attribute='text') | join }}
{{ 'content' in messages[1] }} {{ messages[1].tool_calls[0].name }}"""
    line = {"messages": [{"role": "user", "content": parts}, call]}
    assert rendered(tmp_path, template, line) == "ab\nFalse f"


def test_places_of_the_template(tmp_path: Path) -> None:
    def found() -> str:
        return ChatTemplate(tmp_path, "").render(CHAT, "")

    for config in (
        "string",
        [{"name": "only", "template": "string"}],
        [{"name": "default", "template": "string"}, {"name": "tool_use", "template": "other"}],
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
        assert found() == "string"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert found() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert found() == "jinja"


def test_special_tokens_are_one_id(tmp_path: Path, tokenizer: Tokenizer) -> None:
    start, end = 128, 129
    expected = [start, *b"user\na b", end, 10, start, *b"assistant\n c ", end, 10]
    for given_tokenizer in (tmp_path, str(tmp_path / "tokenizer.json")):
        assert loaded(tmp_path, CHAT, tokenizer=given_tokenizer, tokens=len(expected)) == expected


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([CHAT, CHAT], CHATML_TEXT * 2),
        (["x", {"text": "y", "messages": 3}], "x\n\ny"),
        (["x", CHAT, "y"], f"x\n{CHATML_TEXT}y"),
        (["x\n", CHAT, CHAT, "y", "z"], f"x\n{CHATML_TEXT * 2}y\n\nz"),
        ([CHAT | {"text": None}], CHATML_TEXT),
    ],
)
def test_joined(tmp_path: Path, tokenizer: Tokenizer, lines: list[Any], text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert loaded(tmp_path, *lines, tokens=len(ids)) == ids


def test_a_text_after_a_chat_starts_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "chat_template.jinja").write_text(CONTENTS)
    assert bytes(loaded(tmp_path, CHAT, "x", CHAT, CHAT, tokens=21)) == b"a b| c \nx\na b| c a b|"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": None}, '"messages" must be a list of at least one message, but is None'),
        ({"messages": []}, "at least one message"),
        ({"messages": ["a"]}, "message 1 must be an object"),
        ({"messages": [USER, {"content": "a"}]}, 'message 2 must be .* a string as "role"'),
        ({"messages": [{"role": 3, "content": "a"}]}, "message 1 must be"),
        ({"messages": [{"role": "user"}]}, "message 1 must be"),
        ({"messages": [{"role": "user", "content": {}}]}, "message 1 must be"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, 'a list of objects as "content"'),
        ({"prompt": "a", "completion": 3}, 'message 2 must be an object with a string as "role"'),
        ({"prompt": [USER], "completion": ["a"]}, "message 2 must be an object"),
        ({"prompt": "a"}, 'must be a string, or an object with "text", "messages"'),
        (CHAT | {"tools": "{}"}, "\"tools\" must be a list of objects, but is '{}'"),
        (CHAT | {"tools": "[3]"}, '"tools" must be a list of objects'),
        (CHAT | {"tools": "[{}"}, '"tools" must be a list of objects'),
        (CHAT | {"tools": ["3"]}, '"tools" must be a list of objects'),
        ({"messages": [USER | {"tools": 3}]}, '"tools" must be a list of objects, but is 3'),
        (CHAT | {"documents": ["a"]}, '"documents" must be a list of objects'),
        (CHAT | {"tools": [3]}, '"tools" must be a list of objects'),
    ],
)
def test_bad_chats(tmp_path: Path, tokenizer: Tokenizer, line: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=rf"chats\.jsonl, line 2: .*{message}"):
        loaded(tmp_path, CHAT, line)


def test_no_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    todo = 'no chat template.*chat_template.jinja next to tokenizer.json.*each chat as one "text"'
    with pytest.raises(CalibrationError, match=r"chats\.jsonl, line 2: .*" + todo):
        loaded(tmp_path, "a", CHAT, tokenizer=tokenizer)
    with pytest.raises(CalibrationError, match=todo):
        load_tokens(tmp_path / "chats.jsonl")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CalibrationError, match=todo) as caught:
        loaded(tmp_path, CHAT, tokenizer=tmp_path / "tokenizer.json")
    assert f"in {tmp_path}." in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\\nalternate') }}", "'roles must alternate'"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{% for i in range(10 ** 9) %}a{% endfor %}", "Range too big"),
        ("{{ 'a' * 2 ** 62 }}", "it makes a value of more than 1049"),
        ("{% for i in range(64) %}{{ 'a' * 2 ** 16 }}{% endfor %}", "it writes more than 1049"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(3) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ (messages | attr('__class__')).mro() }}", "unsafe"),
        ("{{ raise_exception.__globals__.os.system('true') }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        (
            "{% set ns = namespace(a=[]) %}{% for i in range(1200) %}{% set ns.a = [ns.a] %}"
            "{% endfor %}{{ raise_exception(ns.a) }}",
            "maximum recursion depth",
        ),
    ],
)
def test_templates_that_fail(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        rendered(tmp_path, template)
    message = str(caught.value)
    place = f"chats, line 7: the chat template in {tmp_path / 'chat_template.jinja'} fails on it: "
    assert message.startswith(place)
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "chat_template.jinja",
            "a\n{% for %}",
            "not a sound chat template, see its line 2: .Expected",
        ),
        ("chat_template.jinja", "{% generation %}", "is not a sound chat template"),
        ("chat_template.jinja", "{{" + "(" * 10_000, "is not a sound chat template"),
        ("chat_template.jinja", b"\xff", "is not UTF-8"),
        ("chat_template.jinja", 17 << 20, "is larger than 16 MiB"),
        ("chat_template.jinja", "{{ a }}" * 20_000, "it has more than 65536 characters"),
        ("chat_template.json", "{", "is not valid JSON"),
        ("chat_template.json", "[]", "must hold a JSON object"),
        ("chat_template.json", "[" * 100_000, "is not valid JSON"),
        ("chat_template.json", '{"chat_template": 3}', "chat_template must be a string"),
        ("tokenizer_config.json", b"\xff", "is not UTF-8"),
        ("tokenizer_config.json", 17 << 20, "is larger than 16 MiB"),
        ("tokenizer_config.json", '{"chat_template": ["a"]}', "chat_template must be a string"),
        ("tokenizer_config.json", '{"chat_template": []}', "chat_template must be a string"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "no chat template"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}',
            'one is "default"',
        ),
        ("tokenizer_config.json", '{"chat_template": "", "eos_token": 3}', "eos_token must be"),
        ("tokenizer_config.json", '{"chat_template": "", "eos_token": {"content": 3}}', "eos_to"),
    ],
)
def test_bad_templates(tmp_path: Path, name: str, content: str | bytes | int, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, int):
        with open(path, "wb") as file:
            file.truncate(content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CalibrationError, match=message) as caught:
        ChatTemplate(tmp_path, "chats, line 7")
    assert str(tmp_path) in str(caught.value)


def test_too_much_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = "{{ messages[0].content }}{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = {"messages": [{"role": "user", "content": "a" * (9 << 20)}]}
    with pytest.raises(CalibrationError, match=r"line 2: the chats .* 32 MiB"):
        loaded(tmp_path, chat, chat)
    chat = {"messages": [{"role": "user", "content": "a" * (17 << 20)}]}
    with pytest.raises(CalibrationError, match=r"line 1: .* writes more than 32 MiB"):
        loaded(tmp_path, chat)


SLOW = {
    "loop": "{% for i in range(30000) %}{% endfor %}",
    "values": "{% for i in range(5000) %}{% set a = i ~ 'a' %}{% endfor %}",
    "some": "{% for i in range(90000 if messages[0].content | length % 3 == 0 else 0) %}{% endfor %}",
    "forms": "{% for i in range(30000) %}{% endfor %}{{ '' if messages[0].content is string else 1 / 0 }}",
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each text is quick enough by itself; all together are not, and few are enough to know that."""
    monkeypatch.setattr(template_sandbox, "ALL_SECONDS", 0.2)
    monkeypatch.setattr("bitwright.text.chat.ALL_SECONDS", 0.2)
    (tmp_path / "chat_template.jinja").write_text(SLOW[name] + "{{ messages[0].content }}")
    known = ChatTemplate(tmp_path, "chats")
    done, message = 0, ""
    while not message and done < 1000:
        chat = {"messages": [{"role": "user", "content": "a" * (1 + done % 9)}]}
        try:
            assert known.render(chat, f"chats, line {done}")
            done += 1
        except CalibrationError as error:
            message = str(error)
    assert done > 0
    assert message.startswith(f"chats, line {done}: the chat template in {tmp_path}/chat_templ")
    assert f"after {done} chats it has used up the 0.2 seconds" in message
    assert "Give fewer chats" in message


@pytest.mark.parametrize("turns", [2, 20, 100])
def test_usual_templates_have_time_for_any_number_of_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """What each text adds to the time of all is more than such templates need for it."""
    monkeypatch.setattr(template_sandbox, "ALL_SECONDS", 0)
    (tmp_path / "chat_template.jinja").write_text(USUAL)
    known = ChatTemplate(tmp_path, "chats")
    said = [
        {"role": "user", "content": "a cat " * 5},
        {"role": "assistant", "content": "a dog " * 9},
    ]
    for _ in range(1000 // turns):
        assert known.render({"messages": said * (turns // 2)}, "")
