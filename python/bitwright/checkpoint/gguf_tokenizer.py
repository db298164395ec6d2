"""Conversion of tokenizer.json to a tokenizer in llama.cpp's metadata."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitwright.checkpoint.reader import read_json_object
from bitwright.errors import (
    CalibrationError,
    CheckpointError,
    UnsupportedModelError,
    malformed_as,
    shown,
)
from bitwright.files.links import check_own
from bitwright.text.template_files import DEFAULT, chat_templates

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Added tokens that some models forget to mark as special; llama.cpp's converter takes them for such.
_LOOKS_SPECIAL = re.compile(
    r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL
)
_UNREACHABLE = -1e6  # below what any merge gives
_SPACE = "▁"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS, _SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"
_QWEN_2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_BLANKS}"
_GPT_4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASHES}|{_BLANKS}"
)
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS_AND_SLASHES}|{_BLANKS}"
_GPT_2 = ("bytes",)  # the expression that is part of the byte-level pre-tokenizer
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (_GPT_2, False): "gpt-2",
    (("digits", *_GPT_2), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "dbrx",
    ((_QWEN_2,), False): "qwen2",
    ((_GPT_4O,), False): "gpt-4o",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's names for pre-tokenizers, and whether whole words are looked up before merges."""


def tokenizer_metadata(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a model's tokenizer as llama.cpp expects it.

    Parameters
    ----------
    folder : pathlib.Path
        Where tokenizer.json is and, if there are any, the files that go with it.
    vocab_size : int
        Rows of the embedding; tokens that the tokenizer lacks become unused ones.
    config : mapping
        config.json.

    Returns
    -------
    dict
        For `bitwright.checkpoint.gguf.write_header`.

    Raises
    ------
    CheckpointError
        If tokenizer.json is absent or damaged.
    UnsupportedModelError
        If llama.cpp has no such tokenizer.
    """
    path = folder / "tokenizer.json"
    check_own(path, folder)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file; llama.cpp finds the tokenizer in the GGUF file, which is "
            f"made of it. Download it with the model, or choose another format"
        )
    names = ("tokenizer_config", "special_tokens_map", "generation_config")
    side = [folder / f"{name}.json" for name in names]
    what = f"{path}: this or a file beside it does not describe a tokenizer"
    with malformed_as(CheckpointError, what, ". Download them again", IndexError):
        tokenizer = _Tokenizer(path, read_json_object(path), vocab_size)
        values = tokenizer.metadata()
        sources = []
        for file in side:
            check_own(file, folder)
            if file.is_file():
                sources.append(read_json_object(file))
        for role, word in _ROLES.items():
            key = f"tokenizer.ggml.{word}_token_id"
            if (number := values.get(key, tokenizer.special(role, [*sources, config]))) is not None:
                values[key] = number
    try:
        return values | _chat_templates(folder)
    except CalibrationError as error:
        raise CheckpointError(str(error)) from error


class _Tokenizer:
    def __init__(self, path: Path, content: dict[str, Any], vocab_size: int) -> None:
        self.path = path
        self.content = content
        self.model = content["model"]
        if self.model.get("type", "BPE") != "BPE" or not isinstance(self.model["vocab"], dict):
            raise self._unsupported("model", self.model.get("type"), "BPE")
        self.added = {token["id"]: token for token in content.get("added_tokens") or ()}
        tokens = {number: token for token, number in self.model["vocab"].items()}
        tokens |= {number: token["content"] for number, token in self.added.items()}
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise CheckpointError(
                f"{path}: holds the token {max(tokens)}, but the model's vocabulary has {vocab_size} "
                f"entries. Take the tokenizer.json of this model"
            )
        self.tokens = [tokens.get(number, f"[PAD{number}]") for number in range(vocab_size)]
        self.ids = {token: number for number, token in tokens.items()}
        self.known = tokens.keys()
        self.merges = [
            tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each)
            for each in self.model["merges"]
        ]

    def metadata(self) -> dict[str, Any]:
        metaspace = any(each["type"] == "Metaspace" for each in self._parts("pre_tokenizer"))
        spaces = metaspace or any(
            each["type"] == "Replace" and each["content"] == _SPACE
            for each in self._parts("normalizer")
        )
        values = self._sentence_pieces() if spaces else self._byte_level()
        types = [self._type(number, spaces) for number in range(len(self.tokens))]
        tokens = [
            # llama.cpp looks for these in the text as it is.
            token.replace(_SPACE, " ") if kind == _USER_DEFINED else token
            for token, kind in zip(self.tokens, types, strict=True)
        ]
        if len(set(tokens)) != len(tokens):
            twice = next(token for token in tokens if tokens.count(token) > 1)
            raise UnsupportedModelError(
                f"{self.path}: the token {shown(twice)} is there twice, which llama.cpp does not read. "
                f"Choose another format than gguf"
            )
        first, last = self._template()
        values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        values["tokenizer.ggml.add_bos_token"] = first is not None
        values["tokenizer.ggml.add_eos_token"] = last is not None
        for role, number in (("bos", first), ("eos", last)):
            if number is not None:
                values[f"tokenizer.ggml.{role}_token_id"] = number
        return values

    def special(self, role: str, sources: list[Any]) -> int | None:
        """Return the id of a token with a role, by the first of the sources that tells one."""
        for source in sources:
            token = source.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            number = (
                self.ids.get(token) if isinstance(token, str) else source.get(f"{role}_token_id")
            )
            number = number[0] if isinstance(number, list) and number else number
            if type(number) is int and number in self.known:
                return number
        return self.ids.get(self.model.get("unk_token")) if role == "unk" else None

    def _sentence_pieces(self) -> dict[str, Any]:
        """A tokenizer that llama.cpp runs by scores: the first merge has the highest."""
        prefixed = False
        for each in [*self._parts("normalizer"), *self._parts("pre_tokenizer")]:
            kind = each["type"]
            if kind == "Metaspace":
                scheme = each.get("prepend_scheme", "always")
                prefixed = each.get("add_prefix_space", True) and scheme != "never"
            elif kind == "Prepend" and each["prepend"] == _SPACE:
                prefixed = True
            elif kind not in ("Replace", "Split") or each["pattern"] != {"String": " "}:
                raise self._unsupported("normalizer or pre_tokenizer", each, "▁ in place of spaces")
        ranks: dict[str, float] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault("".join(pair), -float(rank))
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": prefixed,
            "tokenizer.ggml.scores": [ranks.get(token, _UNREACHABLE) for token in self.tokens],
        }

    def _byte_level(self) -> dict[str, Any]:
        """A tokenizer that llama.cpp runs by merges, after splitting the text in a way it knows."""
        for each in self._parts("normalizer"):
            if each["type"] != "NFC":  # which llama.cpp leaves out: most text is so already
                raise self._unsupported("normalizer", each, "NFC")
        splits: list[str] = []
        for each in self._parts("pre_tokenizer"):
            kind = each["type"]
            if kind == "ByteLevel" and not each.get("add_prefix_space", True):
                splits += _GPT_2 if each.get("use_regex", True) else ()
            elif kind == "Digits" and each.get("individual_digits"):
                splits.append("digits")
            elif kind == "Split" and (
                each.get("behavior") == "Isolated"
                or (each.get("behavior"), each.get("invert")) == ("Removed", True)
            ):
                splits.append(each["pattern"]["Regex"])
            else:
                raise self._unsupported("pre_tokenizer", each, "Split, Digits, ByteLevel")
        key = (tuple(splits), bool(self.model.get("ignore_merges")))
        if key not in _PRE_TOKENIZERS:
            raise self._unsupported(
                "pre_tokenizer",
                f"{', '.join(splits)} with ignore_merges {key[1]}",
                ", ".join(_PRE_TOKENIZERS.values()),
            )
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _PRE_TOKENIZERS[key],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in self.merges],
        }

    def _type(self, number: int, spaces: bool) -> int:
        token = self.tokens[number]
        if number not in self.known:
            return _UNUSED
        if spaces and token == self.model.get("unk_token"):
            return _UNKNOWN
        if number in self.added:
            special = self.added[number].get("special") or _LOOKS_SPECIAL.fullmatch(token)
            return _CONTROL if special else _USER_DEFINED
        is_byte = self.model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        return _BYTE if is_byte else _NORMAL

    def _template(self) -> tuple[int | None, int | None]:
        """Return the tokens that are put before and behind every text."""
        for each in self._parts("post_processor"):
            if each["type"] == "TemplateProcessing":
                pieces = [
                    each["special_tokens"][piece["SpecialToken"]["id"]]["ids"][0]
                    if "SpecialToken" in piece
                    else None
                    for piece in each["single"]
                ]
                place = pieces.index(None)
                if place > 1 or len(pieces) > place + 2 or pieces.count(None) != 1:
                    raise self._unsupported(
                        "post_processor", each["single"], "at most one token on each side"
                    )
                return pieces[0], pieces[-1]
            if each["type"] != "ByteLevel":
                raise self._unsupported("post_processor", each, "TemplateProcessing")
        return None, None

    def _parts(self, key: str) -> Iterator[dict[str, Any]]:
        """Take the parts of a sequence apart, or of one alone, or of none."""
        part = self.content.get(key)
        if part is None:
            return
        listed = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
        yield from part[listed.get(key, "processors")] if part["type"] == "Sequence" else [part]

    def _unsupported(self, key: str, found: object, known: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f'{self.path}: "{key}" is {shown(found)}, which llama.cpp has no name for that is known '
            f"here; known are: {known}. Choose another format than gguf"
        )


def _chat_templates(folder: Path) -> dict[str, Any]:
    """Return the templates under their names; llama.cpp takes "tool_use" for chats with tools."""
    templates = {
        re.sub("[^A-Za-z0-9]", "_", name): template.source
        for name, template in chat_templates(folder).items()
    }
    default = templates.pop(DEFAULT, None)
    values: dict[str, Any] = {} if default is None else {"tokenizer.chat_template": default}
    if templates:
        values["tokenizer.chat_templates"] = sorted(templates)
    return values | {
        f"tokenizer.chat_template.{name}": templates[name] for name in sorted(templates)
    }
