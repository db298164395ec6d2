"""Multiple-choice questions from a file, in the shapes that public sets have."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitwright.errors import CalibrationError, shown
from bitwright.text.data_files import NoValue, read_data

Asks = Literal["auto", "text", "letters"]
ASKS: tuple[Asks, ...] = ("auto", "text", "letters")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWERS = (
    "answer",
    "answerKey",
    "answer_index",
    "answer_idx",
    "label",
    "gold",
    "correct",
    "target",
)
CHOICES = ("choices", "endings", "options")


@dataclass(frozen=True)
class Question:
    """What a model reads, what it may go on with, and which of these is right.

    Parameters
    ----------
    context
        Text before the choices.
    choices
        Each is put behind the context and a space.
    answer
        The place of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


class QuestionError(ValueError):
    """What is wrong with a record."""


def read_questions(path: Path, asks: Asks = "auto") -> list[Question]:
    """Read a file of questions.

    Parameters
    ----------
    path
        JSON lines, a JSON array, .csv or Parquet. A record is ARC's, HellaSwag's, MMLU's, PIQA's or
        OpenBookQA's, or has a question (or a "context" that is taken as it is), choices, and an answer:
        its place from 0 on, its letter, or the choice itself.
    asks
        ``"text"`` compares the choices; ``"letters"`` lists them in the question and compares their
        letters, as MMLU does; ``"auto"`` does that where a record has MMLU's "subject".

    Raises
    ------
    CalibrationError
        If a record is none of these; the message says which and why.
    """
    data = read_data(path)
    if isinstance(data, str):
        raise CalibrationError(
            f"{path}: is plain text; questions are JSON lines with question, choices and answer"
        )
    questions = []
    for where, value in data:
        try:
            if isinstance(value, NoValue):
                raise QuestionError(str(value))
            if not isinstance(value, dict):
                raise QuestionError(f"must be an object, but is {shown(value)}")
            questions.append(_question(value, asks))
        except QuestionError as error:
            said = str(error)
            raise CalibrationError(
                said if said.startswith(where) else f"{where}: {said}"
            ) from error
    if not questions:
        raise CalibrationError(f"{path}: has no questions")
    return questions


def _question(record: dict[str, Any], asks: Asks) -> Question:
    if "endings" in record and ("ctx" in record or "ctx_a" in record):
        return _hellaswag(record)
    if "goal" in record and "sol1" in record and "sol2" in record:
        choices = [_text(record, "sol1"), _text(record, "sol2")]
        context = f"Question: {_text(record, 'goal')}\nAnswer:"
        return Question(context, tuple(choices), _answer(record, choices, None))
    choices, labels = _choices(record)
    answer = _answer(record, choices, labels)
    for name in ("context", "query", "prompt", "question_stem"):
        if name in record and "question" not in record:
            return Question(_text(record, name), tuple(choices), answer)
    if "question" not in record:
        raise QuestionError(
            f"has no question: its keys are {shown(sorted(map(str, record)))}, but one of question, "
            f"context, query, prompt must be there"
        )
    question = _text(record, "question")
    if asks == "letters" or (asks == "auto" and "subject" in record):
        return _with_letters(record, question, choices, answer)
    context = f"{_text(record, 'context')}\n" if "context" in record else ""
    return Question(f"{context}Question: {question}\nAnswer:", tuple(choices), answer)


def _with_letters(
    record: dict[str, Any], question: str, choices: Sequence[str], answer: int
) -> Question:
    if len(choices) > len(LETTERS):
        raise QuestionError(f"has {len(choices)} choices, more than there are letters")
    listed = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    about = ""
    if isinstance(record.get("subject"), str):
        subject = record["subject"].replace("_", " ")
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    context = f"{about}{question.strip()}\n{listed}\nAnswer:"
    return Question(context, tuple(LETTERS[: len(choices)]), answer)


def _hellaswag(record: dict[str, Any]) -> Question:
    if "ctx_a" in record and "ctx_b" in record:
        context = f"{_text(record, 'ctx_a')} {str(record['ctx_b'] or '').capitalize()}"
    else:
        context = _text(record, "ctx")
    if isinstance(record.get("activity_label"), str):
        context = f"{record['activity_label']}: {context}"
    choices = [_plain(each) for each in _choices(record)[0]]
    return Question(_plain(context), tuple(choices), _answer(record, choices, None))


def _plain(text: str) -> str:
    """Return a text without WikiHow's marks, as lm-evaluation-harness cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _text(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise QuestionError(f"{name} must be text, but is {shown(value)}")
    return value


def _choices(record: dict[str, Any]) -> tuple[list[str], list[str] | None]:
    """Return the choices, and what they are called if the record says it."""
    name = next((each for each in CHOICES if each in record), None)
    if name is None:
        raise QuestionError(
            f"has no choices: its keys are {shown(sorted(map(str, record)))}, but one of "
            f"{', '.join(CHOICES)} must be there"
        )
    found, labels = record[name], None
    if isinstance(found, str):  # in a table
        try:
            found = json.loads(found)
        except ValueError as error:
            raise QuestionError(f"{name} must be a list, but is {shown(found)}") from error
    if isinstance(found, dict) and "text" in found:
        found, labels = found["text"], found.get("label")
    elif isinstance(found, dict):
        found, labels = list(found.values()), list(found)
    if isinstance(found, list) and all(isinstance(each, dict) and "text" in each for each in found):
        found, labels = (
            [each["text"] for each in found],
            [each.get("label", LETTERS[place % 26]) for place, each in enumerate(found)],
        )
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise QuestionError(
            f"{name} must be a list of texts that are not empty, but is {shown(found)}"
        )
    if len(found) < 2:
        raise QuestionError(f"{name} has {len(found)} of the 2 or more that a choice takes")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(found)):
        raise QuestionError(f"{name} must have a label for each text")
    return found, None if labels is None else [str(each) for each in labels]


def _answer(record: dict[str, Any], choices: Sequence[str], labels: Sequence[str] | None) -> int:
    """Return the place of the right choice."""
    name = next((each for each in ANSWERS if each in record), None)
    if name is None:
        raise QuestionError(
            f"has no answer: its keys are {shown(sorted(map(str, record)))}, but one of "
            f"{', '.join(ANSWERS)} must be there"
        )
    value = record[name]
    if isinstance(value, str):
        word = value.strip()
        if labels is not None and word in labels:
            return list(labels).index(word)
        if word in choices and word.upper() not in LETTERS[: len(choices)]:
            return list(choices).index(word)
        if len(word) == 1 and word.upper() in LETTERS[: len(choices)]:
            return LETTERS.index(word.upper())
        value = int(word) if re.fullmatch(r"\d+", word, re.ASCII) else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise QuestionError(
            f"{name} is {shown(record[name])}, but must be a place from 0 to {len(choices) - 1}, a letter "
            f"or one of the choices"
        )
    return value
