"""Multiple-choice scores, as lm-evaluation-harness computes them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import bitwright
from bitwright.generation.questions import Question, read_questions

DEMO = bitwright.demo_folder()


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


RECORDS = [
    (
        {"question": "Why?", "choices": ["a", "b"], "answer": 1},
        Question("Question: Why?\nAnswer:", ("a", "b"), 1),
    ),
    (
        {"question": "Why?", "choices": ["so", "not"], "answer": "not"},
        Question("Question: Why?\nAnswer:", ("so", "not"), 1),
    ),
    (
        {
            "id": "x",
            "question": "Why?",
            "choices": {"text": ["so", "not"], "label": ["1", "2"]},
            "answerKey": "1",
        },
        Question("Question: Why?\nAnswer:", ("so", "not"), 0),
    ),
    (
        {
            "activity_label": "Cooking",
            "ctx_a": "A man [x] cooks.",
            "ctx_b": "he",
            "endings": ["runs. [title] Then", "eats."],
            "label": "1",
        },
        Question("Cooking: A man cooks. He", ("runs.. Then", "eats."), 1),
    ),
    (
        {"question": " 1+1? ", "subject": "high_school_math", "choices": ["1", "2"], "answer": 1},
        Question(
            "The following are multiple choice questions (with answers) about high school math.\n\n"
            "1+1?\nA. 1\nB. 2\nAnswer:",
            ("A", "B"),
            1,
        ),
    ),
    (
        {"goal": "Open it", "sol1": "Pull", "sol2": "Push", "label": 0},
        Question("Question: Open it\nAnswer:", ("Pull", "Push"), 0),
    ),
    (
        {"query": "One day", "options": ["he", "she"], "gold": "B"},
        Question("One day", ("he", "she"), 1),
    ),
]


@pytest.mark.parametrize(("record", "expected"), RECORDS)
def test_shapes(record: dict[str, Any], expected: Question, tmp_path: Path) -> None:
    assert read_questions(written(tmp_path / "q.jsonl", record)) == [expected]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "Why?", "answer": 1}, "has no choices"),
        ({"choices": ["a", "b"], "answer": 1}, "has no question"),
        ({"question": "Why?", "choices": ["a", "b"]}, "has no answer"),
        ({"question": "Why?", "choices": ["a", "b"], "answer": 2}, "answer is 2, but must be"),
        ({"question": "Why?", "choices": ["a", "b"], "answer": "E"}, "answer is 'E', but must be"),
        ({"question": "Why?", "choices": ["a"], "answer": 0}, "choices has 1 of the 2"),
        ({"question": "Why?", "choices": "a", "answer": 0}, "choices must be a list"),
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "question must be text"),
        ([1], "must be an object"),
    ],
)
def test_bad_records_are_named(record: Any, said: str, tmp_path: Path) -> None:
    good = {"question": "Why?", "choices": ["a", "b"], "answer": 1}
    with pytest.raises(bitwright.CalibrationError, match=rf"line 2: {said}"):
        read_questions(written(tmp_path / "q.jsonl", good, record))


def test_likelihoods_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """Each choice by itself through the whole model: context and choice tokenized together."""
    records = [
        {"question": "Who is it?", "choices": ["The cat", "A dog in the house"], "answer": 0},
        {"query": "Once upon a time ", "choices": ["there was", "x"], "answer": "B"},
    ]
    found = bitwright.score(DEMO, written(tmp_path / "q.jsonl", *records))
    model = bitwright.load_model(DEMO)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    contexts = ["Question: Who is it?\nAnswer:", "Once upon a time"]
    right, normed = [], []
    for record, context, answers in zip(records, contexts, found.answers, strict=True):
        between = "  " if context == contexts[1] else " "
        for choice, value in zip(record["choices"], answers, strict=True):
            whole = tokenizer.encode(f"{context}{between}{choice}", add_special_tokens=False).ids
            start = len(tokenizer.encode(context, add_special_tokens=False).ids)
            logits = model.logits([whole])[0].astype(np.float64)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected = sum(logits[i - 1, whole[i]] for i in range(start, len(whole)))
            assert value == pytest.approx(expected, abs=1e-3)
        place = 0 if record is records[0] else 1
        lengths = [len(choice) for choice in record["choices"]]
        right.append(int(np.argmax(answers)) == place)
        normed.append(int(np.argmax(np.array(answers) / lengths)) == place)
    assert found.acc == np.mean(right)
    assert found.acc_norm == np.mean(normed)
    assert found.chance == 0.5


def test_score_as_a_command(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", *(record for record, _ in RECORDS))
    command = [sys.executable, "-m", "bitwright", "score", str(DEMO), "--questions", str(path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["questions"] == len(RECORDS)
    path.write_text("{}\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
