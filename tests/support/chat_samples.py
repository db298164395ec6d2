"""Chat templates in the ways that released models have them, and chats that use what these can do.

Each sample is the files of a folder and lines of a file of chats. tests/data/chats.json has what
transformers makes of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

Line = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Files of a folder by their names, JSON as objects, and chats."""

    files: Mapping[str, Any]
    lines: list[Line]
    better: Mapping[int, str] = field(
        default_factory=dict
    )  # said in lines that transformers spoils

    def write(self, folder: Path) -> None:
        """Write the files, a tokenizer and chats.jsonl."""
        files = {"tokenizer_config.json": {}, **self.files}
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "tokenizer_config.json":
                content = {"tokenizer_class": "PreTrainedTokenizerFast", **content}
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8")
        words = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        words.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
        words.save(str(folder / "tokenizer.json"))
        lines = "\n".join(map(json.dumps, self.lines))
        (folder / "chats.jsonl").write_text(lines, encoding="utf-8")


def said(*contents: Any, system: Any = None) -> Line:
    """Return a chat in which user and assistant take turns."""
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def parts(*texts: str) -> list[Line]:
    """Return a content of text parts."""
    return [{"type": "text", "text": text} for text in texts]


def reasoned(name: str) -> Line:
    """Return a chat whose answers have reasoning under a name."""
    chat = said("17 + 4?", "21", "And less 1?", "20")
    for number, thought in ((1, "Seven and four are eleven."), (3, "One before 21.")):
        chat["messages"][number][name] = thought
    return chat


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "Tells when the water is 'high' <at> a pier.",
            "parameters": {"type": "object", "properties": {"pier": {"type": "string"}}},
        },
    }
]


def called(arguments: Any) -> Line:
    """Return a chat with a call of a tool."""
    call = {"id": "a1b2c3d4e", "type": "function"}
    call["function"] = {"name": "tide", "arguments": arguments}
    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "When may I sail from Öland?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "tide", "content": '{"at": 9}'},
            {"role": "assistant", "content": "At nine."},
        ],
    }


OBJECT, STRING = {"pier": "Öland", "day": 3}, '{"pier": "Öland",  "day": 3}'
PICTURE = {"type": "image_url", "image_url": {"url": "file:///boat.png"}}
DOCUMENTS = [{"title": "Piers", "text": "There are two."}, {"title": "Boats", "text": "Many."}]


SOURCES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parents[1] / "data" / "chat_templates").iterdir())
}
ADDED = {
    "content": "</s>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
TYPED = {"__type": "AddedToken", **ADDED}
CHATS = [
    said("When does the ferry leave?", "At nine."),
    said(" a ", "b\n", "<c> & 'd' \"é\"", "</e>\n", system="Be brief."),
    said("2 + 2?", "<think>\nTwo and two.\n</think>\n\n4", "Sure?", "<think>Yes.</think>Yes."),
]
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
BOTH = {"default": "d{{ messages[0].content }}", "tool_use": "t{{ tools | tojson }}"}
WITH_TOOLS = {**said("x", "y"), "tools": TOOLS}
MIXED = [said("x", "y"), WITH_TOOLS, {**said("x"), "tools": []}]
LISTED = [{"name": name, "template": source} for name, source in BOTH.items()]

SAMPLES: dict[str, Sample] = {
    name: Sample(
        {"chat_template.jinja": source, "tokenizer_config.json": ENDS},
        [*CHATS, {**said("Where?", "There."), "documents": DOCUMENTS}],
    )
    for name, source in SOURCES.items()
    if name not in ("iterating", "mapped", "third_name", "tokens", "user_only")
}
SAMPLES |= {
    f"reasoning as {name}": Sample({"chat_template.jinja": source}, [reasoned(name)])
    for name, source in (
        ("reasoning_content", SOURCES["thinking"]),
        ("reasoning", SOURCES["thinking"]),
        ("thinking", SOURCES["thinking"]),
        ("reasoning", SOURCES["channels"]),
        ("thinking", SOURCES["keyed"]),
        ("reasoning", SOURCES["third_name"]),
    )
}
REASONED = (
    "<user>17 + 4?</user>\n<assistant>(Seven and four are eleven.) 21</assistant>\n"
    "<user>And less 1?</user>\n<assistant>(One before 21.) 20</assistant>\n"
)
SAMPLES["reasoning that is read by its third name"] = Sample(
    {"chat_template.jinja": SOURCES["third_name"]},
    [reasoned("reasoning"), reasoned("reasoning_content"), reasoned("thinking")],
    {1: REASONED, 2: REASONED},
)
CALL = '<|head|>assistant<|end|>\n\n{"name": "tide", "parameters": {"pier": "Öland", "day": 3}}<|stop|>'
for _name, _lines, _better in (
    ("headers", [OBJECT, STRING], {1: CALL}),
    ("thinking", [OBJECT, STRING], {}),
    (
        "brackets",
        [OBJECT, STRING],
        {1: '"arguments": {"pier": "Öland", "day": 3}, "id": "a1b2c3d4e"}]'},
    ),
    ("adding", [STRING, OBJECT], {1: '\n```json\n{"pier": "Öland", "day": 3}\n```'}),
    ("channels", [OBJECT, STRING], {1: '<|message|>{"pier": "Öland", "day": 3}<|call|>'}),
    (
        "keyed",
        [OBJECT, STRING],
        {1: "<key>pier</key>\n<value>Öland</value>\n<key>day</key>\n<value>3</value>"},
    ),
):
    SAMPLES[f"{_name} with calls"] = Sample(
        {"chat_template.jinja": SOURCES[_name], "tokenizer_config.json": ENDS},
        [called(each) for each in _lines],
        _better,
    )
SAMPLES |= {
    "parts where they are read": Sample(
        {"chat_template.jinja": SOURCES["turns"]},
        [said(parts("Wind?", "Rain?"), "Snow?"), said([PICTURE, *parts("Fog?")], parts("Hail?"))],
    ),
    "parts in a map": Sample(
        {"chat_template.jinja": SOURCES["mapped"]}, [said(parts("Wind?", "Rain?"), "Snow?")]
    ),
    "parts only": Sample(
        {"chat_template.jinja": SOURCES["iterating"]},
        [said(parts("Wind?", "Rain?")), said("Snow?", "Fog?")],
        {1: "User: Snow?<end>\nAssistant: Fog?<end>\n"},
    ),
    "parts where text is written": Sample(
        {"chat_template.jinja": SOURCES["plain"]},
        [said(parts("Wind?", "Rain?"), parts("Snow?"))],
        {0: "<|user|>\nWind?\nRain?<|end|>\n<|assistant|>\nSnow?<|end|>\n"},
    ),
    "parts where text is added": Sample(
        {"chat_template.jinja": SOURCES["adding"], "tokenizer_config.json": ENDS},
        [said(parts("Wind?", "Rain?"), parts("<think>Snow?</think>Fog?"))],
        {0: "<s><|User|>Wind?\nRain?<|Assistant|>Fog?</s>"},
    ),
    "parts where text is trimmed": Sample(
        {"chat_template.jinja": SOURCES["headers"]},
        [said(parts("Wind? ", "Rain? "), "Snow?")],
        {0: "<|end|>\n\nWind? \nRain?<|stop|>"},
    ),
    "parts that are dropped": Sample(
        {"chat_template.jinja": SOURCES["thinking"]},
        [said(parts("Wind?"), parts("Rain?"))],
        {
            0: "<|begin|>user\nWind?<|close|>\n<|begin|>assistant\n<think>\n\n</think>\n\nRain?<|close|>\n"
        },
    ),
    "parts for one role": Sample(
        {"chat_template.jinja": SOURCES["user_only"]},
        [said([PICTURE, *parts("Wind?")], "Rain?"), said(parts("Wind?"), parts("Rain?"))],
        {1: "user: Wind?\nassistant: Rain?\n"},
    ),
    "tokens of the map": Sample(
        {
            "chat_template.jinja": SOURCES["tokens"],
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": ADDED, "sep_token": "~"},
        },
        [said("x")],
    ),
    "the map before the config": Sample(
        {
            "chat_template.jinja": SOURCES["tokens"],
            "tokenizer_config.json": {"bos_token": "[B]", "pad_token": "[P]", "cls_token": "[C]"},
            "special_tokens_map.json": {"bos_token": "<s>", "mask_token": "[M]"},
        },
        [said("x")],
    ),
    "the config before the map": Sample(
        {
            "chat_template.jinja": SOURCES["tokens"],
            "tokenizer_config.json": {"bos_token": "[B]", "added_tokens_decoder": {"129": ADDED}},
            "special_tokens_map.json": {"bos_token": "<s>"},
        },
        [said("x")],
    ),
    "named tokens": Sample(
        {
            "chat_template.jinja": SOURCES["tokens"],
            "tokenizer_config.json": {
                "bos_token": TYPED,
                "call_token": "[CALL]",
                "add_bos_token": True,
                "extra_special_tokens": {"image_token": "<image>", "odd": "[ODD]"},
            },
        },
        [said("x")],
    ),
    "listed tokens": Sample(
        {
            "chat_template.jinja": SOURCES["tokens"],
            "tokenizer_config.json": {"unk_token": "?", "extra_special_tokens": ["[A]", "[B]"]},
        },
        [said("x")],
    ),
    "a list of templates": Sample({"tokenizer_config.json": {"chat_template": LISTED}}, MIXED),
    "an object of templates": Sample({"tokenizer_config.json": {"chat_template": BOTH}}, MIXED),
    "additional templates": Sample(
        {
            "chat_template.jinja": BOTH["default"],
            "additional_chat_templates/tool_use.jinja": BOTH["tool_use"],
            "additional_chat_templates/rag.jinja": "r",
            "tokenizer_config.json": {"chat_template": "no"},
        },
        MIXED,
    ),
    "a file before the config": Sample(
        {"chat_template.jinja": "f", "tokenizer_config.json": {"chat_template": LISTED}}, MIXED
    ),
}
