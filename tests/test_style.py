"""The checks of style and types that a change must pass, as tests, so that one command runs all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SOURCES = sorted(str(path) for path in (PROJECT / "cpp").rglob("*.[ch]pp"))
PYTHON = ["python", "tests", "bench"]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", *PYTHON],
        ["ruff", "format", "--check", *PYTHON],
        ["mypy"],
        ["clang-format", "--dry-run", "--Werror", *SOURCES],
    ],
    ids=["ruff", "ruff-format", "mypy", "clang-format"],
)
def test_style(command: list[str]) -> None:
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    assert program, f"{command[0]} is missing: pip install .[test]"
    done = subprocess.run(
        [program, *command[1:]], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_stub_agrees_with_the_extension() -> None:
    """mypy's stubtest compares _kernels.pyi with the signatures of the compiled module."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "bitwright._kernels", "--ignore-disjoint-bases"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
