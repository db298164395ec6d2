"""Budgets in messages: the two numbers differ, and the one that is offered works."""

import math
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitwright
from bitwright.runs.budget import Budget, gigabytes, told_apart

DEMO = bitwright.demo_folder()
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}
SAID = re.compile(
    r"needs at least (?P<least>[\d.]+ \w+), but .* (is|leaves is) (?P<there>[\d.]+ \w+)\. "
    r"(Give it more \(memory, --memory (?P<more>[\d.]+)\)|Raise that by (?P<raised>[\d.]+) GB)$"
)
counts = st.integers(1, 1 << 60)


def in_bytes(said: str) -> Decimal:
    number, unit = said.split()
    return Decimal(number) * UNITS[unit]


def refused(
    least: int, there: float, limit: float = math.inf, group: bool = False
) -> re.Match[str]:
    budget = Budget(there, 0, limit, "the budget", group)
    with pytest.raises(bitwright.MemoryBudgetError) as caught:
        budget.require(least, Path("model"))
    found = SAID.search(str(caught.value))
    assert found, str(caught.value)
    return found


@given(counts, st.floats(0, 1, exclude_max=True), st.sampled_from([1.0, 0.999999, 0.99999999]))
def test_a_budget_differs_from_what_is_needed(least: int, share: float, near: float) -> None:
    """However near they are; and the remedy is at least what is needed."""
    there = min(max(share, near * (share > 0.5)) * least, math.nextafter(least, 0))
    found = refused(least, there)
    needed, given_bytes = in_bytes(found["least"]), in_bytes(found["there"])
    assert needed > given_bytes
    assert found["least"].split()[1] == found["there"].split()[1]
    asked = float(found["more"]) * 1e9  # as the option is read
    assert asked >= least
    assert asked <= least + 2e7 + least * 1e-12
    Budget(asked, 0, math.inf, "the budget", False).require(least, Path("model"))


@given(counts, counts, st.booleans())
def test_a_limit_that_is_raised_as_told_is_enough(least: int, less: int, group: bool) -> None:
    limit = least - less  # of a group that has too much already it is less than nothing
    found = refused(least, limit, limit, group)
    assert in_bytes(found["least"]) > in_bytes(found["there"])
    assert limit + Decimal(found["raised"]) * 10**9 >= least


@given(st.integers(0, 1 << 60))
def test_bytes_in_three_figures(count: int) -> None:
    said = gigabytes(count)
    assert abs(in_bytes(said) - count) <= Decimal(count) / 198 or count < 1000
    figures = said.split()[0].replace(".", "").lstrip("0")
    assert len(figures) <= 4 or count >= 10**12


@pytest.mark.parametrize(
    ("more", "less", "told"),
    [
        (294_000_000, 290_000_000, ("0.294 GB", "0.290 GB")),
        (290_000_001, 290_000_000, ("0.290000001 GB", "0.290000000 GB")),
        (12_345_678_901, 12_300_000_000, ("12.35 GB", "12.30 GB")),
        (81_234_567, 80_000_000, ("81.2 MB", "80.0 MB")),
        (100, 99.5, ("0.100 kB", "0.099 kB")),
        (5_000_000_000, -3, ("5.00 GB", "0.00 GB")),
    ],
)
def test_numbers_that_are_told_apart(more: float, less: float, told: tuple[str, str]) -> None:
    assert told_apart(more, less) == told


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "--preset", "fast", "--bits", "3"),
        ("statistics", "collect"),
        ("evaluate",),
    ],
)
def test_the_budget_that_is_offered_works(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """The same command, in a process of its own as before, does its work with what was named."""
    places = ("--evaluation", str(DEMO / "evaluation.txt"))
    if arguments[0] != "evaluate":
        places = ("--calibration", str(DEMO / "calibration.txt"), "--out", str(tmp_path / "out"))
    words = ("collect",) if "collect" in arguments else ()
    command = [
        *(sys.executable, "-m", "bitwright", arguments[0], *words, str(DEMO)),
        *(word for word in arguments[1:] if word != "collect"),
        *(*places, "--samples", "8", "--length", "64", "--threads", "1", "--memory"),
    ]

    def run(memory: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, memory], capture_output=True, text=True, check=False)

    little = run("0.001")
    assert little.returncode == 1
    found = SAID.search(little.stderr.strip().removesuffix(", or take preset fast"))
    assert found, little.stderr
    assert in_bytes(found["least"]) > in_bytes(found["there"])
    done = run(found["more"])
    assert done.returncode == 0, done.stderr
