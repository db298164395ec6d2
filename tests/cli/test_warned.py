"""Warnings: one line each, once, on standard error and in every report that is being made."""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bitwright
from bitwright.warned import collected, reports_warnings, warn


@dataclass(frozen=True)
class _Report:
    name: str
    warnings: tuple[str, ...] = ()


@reports_warnings
def _inner(*messages: str) -> _Report:
    for message in messages:
        warn(message)
    return _Report("inner")


@reports_warnings
def _outer() -> _Report:
    first, second = _inner("one"), _inner("two\n  lines", "one")
    assert first.warnings == ("one",)
    assert second.warnings == ("two\\n  lines", "one")
    return _Report("outer")


def test_reports_hold_their_own_warnings_and_those_of_what_they_call() -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert _outer().warnings == ("one", "two\\n  lines")
    assert [str(each.message) for each in given] == ["one", "two\\n  lines"]
    assert {each.category for each in given} == {bitwright.BitwrightWarning}
    assert {each.filename for each in given} == {__file__}


def test_without_a_report_every_warning_is_given() -> None:
    for _ in range(2):
        with pytest.warns(bitwright.BitwrightWarning, match="alone"):
            warn("alone")


@pytest.mark.filterwarnings("ignore")
def test_collected_ends_with_its_block() -> None:
    with collected() as messages:
        warn("inside")
    warn("outside")
    assert messages == ["inside"]


def test_on_the_command_line_a_warning_is_one_line() -> None:
    program = """
import sys, click
from bitwright.cli.main import cli, main
from bitwright.warned import warn
cli.add_command(click.Command("w", callback=lambda: warn("a\\nb")))
sys.argv[1:] = ["w"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "bitwright: warning: a\\nb\n"


def test_a_command_says_each_warning_once() -> None:
    """Though it may open a model several times, in calls of their own."""
    program = """
import sys, bitwright.cli.main
from bitwright.warned import warn
def said():
    for each in ("a", "b", "a", "a"):
        warn(each)
bitwright.cli.main.cli.add_command(bitwright.cli.main.click.Command("w", callback=said))
sys.argv[1:] = ["w"]
bitwright.cli.main.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "bitwright: warning: a\nbitwright: warning: b\n"


@pytest.mark.parametrize("name", ["evaluate", "convert", "inspect_model"])
def test_warnings_are_told_of_the_line_that_calls(tmp_path: Path, name: str) -> None:
    """Whatever decorates a public function."""
    model = tmp_path / "model"
    shutil.copytree(bitwright.demo_folder(), model)
    tensors = load_file(model / "model.safetensors")
    tensors["mtp.layers.0.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    calls: dict[str, Callable[[], object]] = {
        "evaluate": lambda: bitwright.evaluate(model, np.arange(16, dtype=np.int32).reshape(2, 8)),
        "convert": lambda: bitwright.convert(model, tmp_path / "out", "gguf", progress=False),
        "inspect_model": lambda: bitwright.inspect_model(model),
    }
    with pytest.warns(bitwright.BitwrightWarning) as caught:
        calls[name]()
    assert {each.filename for each in caught} == {__file__}
