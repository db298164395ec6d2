"""Multiple-choice scores by log-likelihood, as lm-evaluation-harness computes them."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitwright.checkpoint.hub import finds_models
from bitwright.errors import CalibrationError, check_choice
from bitwright.files.home import expands_home
from bitwright.generation.generate import Writer
from bitwright.generation.questions import ASKS, Asks, Question, read_questions
from bitwright.generation.session import Session
from bitwright.loading.model import Model
from bitwright.runs.progress import Progressing, phase
from bitwright.text.first_tokens import first_tokens


@dataclass(frozen=True)
class Score:
    """How many questions a model answers.

    Parameters
    ----------
    acc
        Share of the questions where the right choice is the likeliest.
    acc_norm
        The same, with log-likelihoods divided by the characters of the choices.
    acc_stderr, acc_norm_stderr
        Their standard errors.
    chance
        The share that guessing gets.
    questions
        How many there are.
    answers
        Of each question, the log-likelihoods of its choices.
    seconds
        Wall time, loading included.
    """

    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    chance: float
    questions: int
    answers: tuple[tuple[float, ...], ...]
    seconds: float


@expands_home
@finds_models
def score(
    model: str | os.PathLike[str] | Model,
    questions: str | os.PathLike[str],
    *,
    samples: int | None = None,
    asks: Asks = "auto",
    bos: bool = False,
    progress: Progressing = True,
) -> Score:
    """Score a model on multiple-choice questions.

    Every choice is put behind its question and a space, and judged by the sum of its tokens'
    log-probabilities, as lm-evaluation-harness does it without examples.

    Parameters
    ----------
    model
        Checkpoint folder or GGUF file, in float or quantized, or a loaded model.
    questions
        A file: JSON lines or an array, .csv or Parquet, with ARC's, HellaSwag's, MMLU's, PIQA's or
        OpenBookQA's keys, or "question", "choices" and "answer".
    samples
        Score the first so many; all by default.
    asks
        ``"text"`` compares the choices, ``"letters"`` the letters that they are listed under, as MMLU
        does; ``"auto"`` does that where a record has a "subject".
    bos
        Begin with what the tokenizer puts first; lm-evaluation-harness does so only when asked to.
    progress
        Show what is done and the time left, on standard error; or a function, see `Progress`.

    Returns
    -------
    Score

    Raises
    ------
    CheckpointError, CalibrationError, NonFiniteError
        If the model, its tokenizer or a record cannot be used; the message says which and why.

    Examples
    --------
    >>> import bitwright, json, pathlib, tempfile
    >>> record = {"question": "Is it?", "choices": ["Yes", "No"], "answer": "A"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "questions.jsonl"
    ...     _ = path.write_text(json.dumps(record))
    ...     bitwright.score(bitwright.demo_folder(), path).questions
    1
    """
    start = time.perf_counter()
    check_choice("asks", asks, ASKS)
    if samples is not None and samples < 1:
        raise ValueError(f"samples: expected 1 or more, got {samples}")
    asked = read_questions(Path(questions), asks)[:samples]
    writer = Writer(model)
    answers = []
    with phase("scoring", progress, len(asked), unit="questions") as shown:
        for question in asked:
            answers.append(_likelihoods(writer, question, bos))
            shown.step()
    right = np.array(
        [int(np.argmax(each)) == one.answer for each, one in zip(answers, asked, strict=True)],
        float,
    )
    normed = np.array(
        [
            int(np.argmax(np.array(each) / [len(choice) for choice in one.choices])) == one.answer
            for each, one in zip(answers, asked, strict=True)
        ],
        float,
    )
    return Score(
        acc=float(right.mean()),
        acc_norm=float(normed.mean()),
        acc_stderr=_stderr(right),
        acc_norm_stderr=_stderr(normed),
        chance=float(np.mean([1 / len(one.choices) for one in asked])),
        questions=len(asked),
        answers=tuple(answers),
        seconds=time.perf_counter() - start,
    )


def _stderr(right: np.ndarray) -> float:
    return float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else 0.0


def _likelihoods(writer: Writer, question: Question, bos: bool) -> tuple[float, ...]:
    """Return the log-likelihood of every choice."""
    pairs = [_pair(writer, question.context, f" {choice}", bos) for choice in question.choices]
    session, found = writer.session, []
    context: list[int] | None = None
    for before, after in pairs:
        room = session.limit + 1 - len(after)
        if room < 1:
            raise CalibrationError(
                f"{writer.folder}: a choice has {len(after)} tokens, but the model knows {session.limit} "
                f"positions; leave that question out"
            )
        before = before[-room:]
        if context != before:
            session.cut(0)
            states = session.read(before)
            context, mark, last = before, session.mark(), states[-1:]
        else:
            session.back(mark)
        found.append(_likelihood(session, last, after))
    return tuple(found)


def _likelihood(session: Session, last: np.ndarray, after: list[int]) -> float:
    states = last if len(after) == 1 else np.concatenate([last, session.read(after[:-1])])
    logits = session.logits(states).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(after)), after]
    return float((chosen - np.log(np.exp(logits).sum(axis=1))).sum())


def _pair(writer: Writer, context: str, choice: str, bos: bool) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of what follows: spaces between them belong to the latter, and
    both are tokenized together."""
    kept = context.rstrip()
    choice, context = context[len(kept) :] + choice, kept
    whole = writer.encode(context + choice, bos)
    before = writer.encode(context, bos) if context else list(first_tokens(writer.tokenizer))
    if not context:
        before = before[:1] or sorted(writer.stops)[:1]
        if not before:
            raise CalibrationError(
                f"{writer.folder}: a question without text needs a token to begin with, which neither the "
                f"tokenizer nor generation_config.json names; write the question's text"
            )
        return before, whole[1:] if whole[:1] == before else whole
    if len(whole) <= len(before):  # joined into the last token
        before = whole[:-1]
    return before, whole[len(before) :]
