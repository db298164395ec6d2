"""Tokens as text while they come: a character is shown when all of its bytes are there."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACED = "\N{REPLACEMENT CHARACTER}"
BEFORE = (
    8  # tokens of a prompt that the first ones are decoded with: spaces depend on what is before
)


class TextStream:
    """Text of tokens, piece by piece.

    Parameters
    ----------
    tokenizer
        The model's.
    prompt
        The tokens before the first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-BEFORE:])
        self._start, self._told = 0, len(self._ids)

    def push(self, token: int) -> str:
        """Return what a token adds to the text; nothing while a character lacks bytes."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith(REPLACED):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return text

    def rest(self) -> str:
        """Return what has been held back."""
        text = self._new()
        self._told = len(self._ids)
        return text

    def _new(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._told])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]
