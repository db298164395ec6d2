"""SIGKILL at random moments: the same command goes on, ends in the same bytes and leaves nothing else."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from shared_data import TESTS

import bitwright

KILLS = 20
DEMO = bitwright.demo_folder()
MOE = TESTS / "data" / "tiny" / "qwen3_moe"


class Commands:
    """Runs commands one after another; see command_server.py."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._server = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )

    def run(self, arguments: list[str], delay: float | None = None) -> int:
        """Run a command, kill it after so many seconds, and return its exit status."""
        self.log.write_text("")
        given, answers = self._pipes()
        given.write(json.dumps([arguments, str(self.log), delay]) + "\n")
        given.flush()
        return int(answers.readline())

    def close(self) -> None:
        for pipe in self._pipes():
            pipe.close()
        self._server.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        return self._server.stdin, self._server.stdout


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("log") / "log.txt")
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO / "calibration.txt").read_text()[:9000])
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "student"
    bitwright.quantize(DEMO, out, "rtn", 3, 32, progress=False)
    vocabulary = bitwright.load_model(MOE).config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (8, 64))
    np.save(out.parent / "ids.npy", ids)
    return out


def content(place: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files in a folder."""
    files = [place] if place.is_file() else sorted(place.iterdir())
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("gptq", "rtn", "awq", "awq+gptq", "salient", "gguf", "experts", "refine", "statistics"),
        *("sensitivities", "targets", "dwq", "dwq made", "dynamic", "best"),
        *("activations", "dynamic files"),
    ],
)
def test_killed_commands_go_on(
    commands: Commands, tmp_path: Path, text: Path, student: Path, name: str
) -> None:
    out, targets = tmp_path / "out", tmp_path / "targets"
    beside = [tmp_path / name for name in ("a.npz", "s.json", "r.json")]
    data = ["--calibration", str(text), "--length", "32", "--threads", "1"]
    distil = ["dwq", "--out", str(out), *data, "--batch-size", "2"]
    given = [str(student), "--reference", str(DEMO)]
    often = ["--checkpoint-every", "1", "--validate-every", "4"]
    calibrated = ["--calibration", str(text), "--length", "64", "--samples", "24"]
    calibrated += ["--threads", "1", "--out", str(out)]
    experts = [
        *("quantize", str(MOE), "--calibration", str(student.parent / "ids.npy"), "--bits", "3"),
        *("--samples", "8", "--group-size", "32", "--threads", "1", "--out", str(out)),
    ]
    arguments = {
        **{
            method: ["quantize", str(DEMO), "--method", method, *calibrated]
            for method in ("gptq", "rtn", "awq", "awq+gptq", "salient")
        },
        "gguf": ["quantize", str(DEMO), "--format", "gguf", "--group-size", "32", *calibrated],
        "experts": experts,
        "refine": ["refine", str(student), "--reference", str(DEMO), *calibrated],
        "statistics": ["statistics", "collect", str(DEMO), *calibrated],
        "sensitivities": [
            *("sensitivities", str(DEMO), "--out", str(out), *data),
            *("--batch-size", "2", "--samples", "8"),
        ],
        "targets": [*distil, *given, "--targets", str(targets), "--tokens", "64"],
        "dwq": [*distil, *given, *often, "--tokens", "640"],
        "dwq made": [
            *distil,
            str(DEMO),
            *often,
            "--tokens",
            "320",
            "--bits",
            "3",
            "--target-bpw",
            "4.5",
        ],
        "dynamic": [
            *("dynamic", str(DEMO), "--out", str(out), *data, "--target-bpw", "4.5"),
            *("--samples", "8", "--sensitivity-samples", "16", "--evaluation", str(text)),
        ],
        "activations": [
            *(
                "salient",
                str(DEMO),
                "--out",
                str(out),
                "--group-size",
                "32",
            ),
            *("--activations", str(beside[0]), "--calibration", str(text)),
            *("--length", "64", "--samples", "24", "--threads", "1"),
        ],
        "dynamic files": [
            *("dynamic", str(DEMO), "--out", str(out), *data, "--target-bpw", "4.5"),
            *("--samples", "8", "--sensitivity-samples", "16", "--evaluation", str(text)),
            *("--sensitivities", str(beside[1]), "--recipe", str(beside[2])),
        ],
        "best": [
            *("quantize", str(DEMO), "--out", str(out), "--preset", "best", "--bits", "3"),
            *("--calibration", str(text), "--length", "32", "--samples", "8", "--threads", "1"),
        ],
    }[name]
    start = time.perf_counter()
    assert commands.run(arguments) == 0, commands.log.read_text()
    seconds = time.perf_counter() - start
    undisturbed, known = content(out), content(targets) if targets.exists() else None
    files = {path: path.read_bytes() for path in beside if path.exists()}
    names = {"out", "targets", *(path.name for path in files)}
    remove(out, targets, *beside)
    rng, kills = random.Random(name), 0
    while kills < KILLS:
        status = commands.run(arguments, seconds * rng.uniform(0.02, 0.7))
        assert status in (0, -signal.SIGKILL), commands.log.read_text()
        kills += status != 0
        if not out.exists():
            continue
        if status:  # killed at the very end: what is left to do is done, or there is nothing
            assert commands.run(arguments) in (0, 1)
        assert content(out) == undisturbed
        assert all(path.read_bytes() == known_bytes for path, known_bytes in files.items())
        assert {path.name for path in tmp_path.iterdir()} <= names
        remove(out, *beside)
        if known is not None:
            assert content(targets) == known
            remove(targets)
    assert commands.run(arguments) == 0, commands.log.read_text()
    assert content(out) == undisturbed
    assert all(path.read_bytes() == known_bytes for path, known_bytes in files.items())
    assert {path.name for path in tmp_path.iterdir()} <= names


def remove(*places: Path) -> None:
    for place in places:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
