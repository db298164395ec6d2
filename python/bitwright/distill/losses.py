"""Losses of a student relative to its teacher's most likely tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.models.operations import Float, Float32

LossFunction: TypeAlias = Callable[[Float, Float], tuple[NDArray[np.float64], Float]]
LOSSES = ("kl", "reverse_kl", "js", "cross_entropy", "logits_mse")


@dataclass(frozen=True, eq=False)
class TopTokens:
    """A teacher's distributions over the next token, by their most likely tokens.

    Parameters
    ----------
    ids
        ``[positions, k]`` int32, ascending in each row.
    log_probabilities
        ``[positions, k]`` float32.
    rest
        ``[positions]`` float32, the probability of all other tokens.
    """

    ids: NDArray[np.int32]
    log_probabilities: Float32
    rest: Float32

    @classmethod
    def of(cls, logits: Float32, count: int, temperature: float = 1.0) -> "TopTokens":
        """Return the `count` most likely tokens of ``softmax(logits / temperature)``."""
        ids = np.empty((len(logits), count), np.int32)
        known = np.empty((len(logits), count), np.float32)
        rest = np.empty(len(logits), np.float32)
        _kernels.top_tokens(logits, temperature, ids, known, rest)
        return cls(ids, known, rest)

    def rows(self, first: int, stop: int) -> "TopTokens":
        """Return some positions, as views."""
        rows = slice(first, stop)
        return TopTokens(self.ids[rows], self.log_probabilities[rows], self.rest[rows])


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """The losses of a batch, as `bitwright.models.network.Loss`.

    Parameters
    ----------
    teacher
        Returns its tokens for the positions [first, stop) of the batch.
    next_ids
        ``[positions]`` int32, the token that came next, -1 for none; for ``"cross_entropy"``.
    loss
        One of `LOSSES`, or a function of the teacher's and the student's log-probabilities
        ``[positions, k]`` that returns a loss per position and its gradient with respect to the latter.
    temperature
        Logits are divided by it.
    factor
        Gradients are multiplied by it: one over the number of positions, for their mean.
    """

    teacher: Callable[[int, int], TopTokens]
    next_ids: NDArray[np.int32]
    loss: str | LossFunction = "kl"
    temperature: float = 1.0
    factor: float = 1.0

    def __call__(
        self, first: int, logits: Float32, gradient: Float32 | None
    ) -> NDArray[np.float64]:
        """Return the losses of the positions from `first` on, and write the gradient of their logits."""
        stop = first + len(logits)
        teacher = self.teacher(first, stop)
        if isinstance(self.loss, str):
            return _kernels.distillation_loss(
                logits,
                teacher.ids,
                teacher.log_probabilities,
                teacher.rest,
                self.next_ids[first:stop],
                self.loss,
                self.temperature,
                self.factor,
                gradient,
            )
        scaled = logits / np.float32(self.temperature)
        scaled -= scaled.max(axis=1, keepdims=True)
        scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        known = np.take_along_axis(scaled, teacher.ids, axis=1)
        losses, slopes = self.loss(teacher.log_probabilities, known)
        slopes = np.asarray(slopes, np.float32)
        result = np.empty_like(logits) if gradient is None else gradient
        if np.shape(losses) != (len(logits),) or slopes.shape != known.shape:
            raise ValueError(
                f"loss: expected losses [{len(logits)}] and gradients {list(known.shape)}, got "
                f"{list(np.shape(losses))} and {list(slopes.shape)}"
            )
        # log q_j = z_j − log Σ exp(z): its gradient is 1 at z_j, less q everywhere.
        result[...] = -np.exp(scaled) * slopes.sum(axis=1, keepdims=True)
        reached = np.take_along_axis(result, teacher.ids, axis=1) + slopes
        np.put_along_axis(result, teacher.ids, reached, axis=1)
        result *= np.float32(self.factor / self.temperature)
        return np.asarray(losses, np.float64)


def next_tokens(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the token that follows each of ``[samples, length]``, flat; -1 after a sample's last."""
    following = np.full_like(ids, -1)
    following[:, :-1] = ids[:, 1:]
    return following.reshape(-1)
