"""What a decoder block keeps of the tokens before: keys and values, or the states of recurrences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.generation.matrices import StoredMatrix
from bitwright.models.operations import Float, Operations

LEAST_ROOM = 256  # tokens that a cache has room for at first; it doubles


class BlockCache:
    """The past of one block.

    Attributes
    ----------
    length
        Tokens whose keys and values are there.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget everything."""
        self.length = 0
        self._keys: Float | None = None
        self._values: Float | None = None
        self._convolved: Float | None = None
        self._state: Float | None = None

    def append(self, key: Float, value: Float) -> tuple[Float, Float]:
        """Add keys and values ``[tokens, channels]``; return all of them."""
        total = self.length + len(key)
        self._keys = self._with_room(self._keys, key, total)
        self._values = self._with_room(self._values, value, total)
        self._keys[self.length : total] = key
        self._values[self.length : total] = value
        self.length = total
        return self._keys[:total], self._values[:total]

    def _with_room(self, kept: Float | None, new: Float, total: int) -> Float:
        if kept is not None and len(kept) >= total:
            return kept
        room = max(LEAST_ROOM, total, 0 if kept is None else 2 * len(kept))
        larger = np.empty((room, new.shape[1]), new.dtype)
        if kept is not None:
            larger[: self.length] = kept[: self.length]
        return larger

    def with_last(self, states: Float, count: int) -> Float:
        """Return what is convolved with the `count` rows before it, and keep its own last ones."""
        before = self._convolved
        if before is None:
            before = np.zeros((count, states.shape[1]), states.dtype)
        joined = np.concatenate([before, states])
        self._convolved = joined[len(joined) - count :].copy()
        return joined

    def state(self, shape: tuple[int, int], dtype: Any) -> Float:
        """Return the state of the recurrence, which its kernel writes to."""
        if self._state is None:
            self._state = np.zeros(shape, dtype)
        return self._state

    @property
    def is_recurrent(self) -> bool:
        """Whether there is a state, which cannot go back to one of before."""
        return self._convolved is not None or self._state is not None

    def mark(self) -> tuple[int, Float | None, Float | None]:
        """Return what `back` takes."""
        states = [None if each is None else each.copy() for each in (self._convolved, self._state)]
        return self.length, states[0], states[1]

    def back(self, mark: tuple[int, Float | None, Float | None]) -> None:
        """Forget what came after a mark."""
        self.length = mark[0]
        self._convolved, self._state = (None if each is None else each.copy() for each in mark[1:])

    def cut(self, length: int) -> None:
        """Forget the keys and values after the first so many."""
        self.length = min(self.length, length)


@dataclass(eq=False)
class CachedOperations(Operations):
    """The operations on the states of new tokens, that go on from a block's cache.

    Parameters
    ----------
    matrices
        By name relative to the block.
    cache
        Of the block.
    """

    matrices: Mapping[str, StoredMatrix]
    cache: BlockCache

    def linear(self, name: str, states: Float) -> Float:
        """Return a linear's outputs."""
        matrix = self.matrices[name]
        out = np.empty((len(states), matrix.shape[0]), states.dtype)
        if len(states):
            matrix.product(states, self.bias(name), out)
        return out

    def add_linear(self, name: str, states: Float, hidden: Float) -> None:
        """Add a linear's outputs to the hidden states."""
        self.matrices[name].product(states, self.bias(name), hidden, add=True)

    def attend(
        self, query: Float, key: Float, value: Float, rule: Mapping[str, Any], heads: int
    ) -> Float:
        """Return the output of attention to all tokens so far."""
        rule = {**rule, "past": self.cache.length}
        return super().attend(query, *self.cache.append(key, value), rule, heads)

    def convolve(self, name: str, states: Float, length: int) -> Float:
        """Return the causal convolution of each channel."""
        before = self.taps(name).shape[1] - 1
        joined = self.cache.with_last(states, before)
        return super().convolve(name, joined, len(joined))[before:]

    def recurrence(self, parts: Sequence[Float], rule: Mapping[str, Any]) -> Float:
        """Return the outputs of a recurrence from the state that it has been left in."""
        query, value = parts[0], parts[2]
        width = query.shape[1] // rule["key_heads"] * (value.shape[1] // rule["heads"])
        state = self.cache.state((rule["heads"], width), value.dtype)
        return super().recurrence(parts, {**rule, "states": state})
