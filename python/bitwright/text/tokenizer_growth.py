"""A bound on how much a tokenizer lengthens a text: a few lines of JSON can double it forty times."""

import base64
import json
from typing import Any

from tokenizers import Tokenizer

from bitwright.errors import CalibrationError

MOST_GROWTH = 8  # times the text; spaces as ▁ and bytes as letters need 3 and 2
SPARE = 1 << 20  # bytes, for short texts
PIECE = 1 << 12  # characters
PIECE_LIMIT = 64 << 20  # bytes that a piece may become
_FACTORS = {"NFKC": 11, "NFKD": 11, "NFC": 3, "NFD": 3, "BertNormalizer": 3, "Metaspace": 3}
_FACTORS |= {"Lowercase": 2, "ByteLevel": 2}


def check_growth(tokenizer: Tokenizer, text: str, origin: str) -> None:
    """Raise CalibrationError if a tokenizer makes a text so much longer that memory may not suffice.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        Its normalizers and pre-tokenizers are looked at.
    text : str
        What is to be tokenized.
    origin : str
        Where it is from, for the message.

    Examples
    --------
    >>> from tokenizers import models, normalizers
    >>> tokenizer = Tokenizer(models.BPE())
    >>> tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)
    >>> check_growth(tokenizer, "a", "text.txt")
    Traceback (most recent call last):
    bitwright.errors.CalibrationError: text.txt: the tokenizer may make it 1099511627776 times as long
    """
    normalizer, splitter = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    size = len(text.encode(errors="replace"))
    most = MOST_GROWTH * size + SPARE
    if _grown(splitter, _grown(normalizer, size)) <= most:
        return
    # That was the worst of all texts of this size. This one is tried, if no piece of it can do harm.
    if _grown(splitter, _grown(normalizer, 4 * PIECE)) > PIECE_LIMIT:
        times = _grown(splitter, _grown(normalizer, 1 << 40)) >> 40
        raise CalibrationError(f"{origin}: the tokenizer may make it {times} times as long")
    pieces = (text[first : first + PIECE] for first in range(0, len(text), PIECE))
    found = sum(len(_normalized(tokenizer, piece).encode(errors="replace")) for piece in pieces)
    if _grown(splitter, found) > most:
        raise CalibrationError(f"{origin}: the tokenizer makes {found} bytes of its {size}")


def _parts(part: Any) -> dict[str, Any]:
    """Return a normalizer or pre-tokenizer as tokenizer.json has it; without one, a sequence of none."""
    return {"type": "Sequence"} if part is None else dict(json.loads(part.__getstate__()))


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    return text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)


def _grown(part: dict[str, Any], size: int) -> int:
    """Return the most bytes that a part can make of a text of so many."""
    match part["type"]:
        case "Sequence":
            for each in part.get("normalizers") or part.get("pretokenizers") or ():
                size = _grown(each, size)
        case "Prepend":
            size += len(part["prepend"].encode())
        case "Replace":
            content, found = part["content"].encode(), part["pattern"].get("String", "").encode()
            # An expression, like nothing, may be found before every character.
            size = max(size, size * len(content) // len(found)) if found else _times(size, content)
        case "Precompiled":
            table = base64.b64decode(part["precompiled_charsmap"])
            words = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
            size = _times(size, max(words, key=len))
        case kind:
            size *= _FACTORS.get(kind, 1)
    return size


def _times(size: int, content: bytes) -> int:
    return size + (size + 1) * len(content)
