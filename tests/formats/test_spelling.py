"""How precisions are written: what each spelling says, and what several say together."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bitwright
from bitwright.cli.main import cli
from bitwright.formats.gguf import TYPES
from bitwright.formats.spelling import Spelling, combined
from bitwright.precision.options import PrecisionOptions

DEMO = Path(str(bitwright.demo_folder()))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("4", (4, "auto", None)),
        ("4:64", (4, 64, None)),
        ("3:-1", (3, -1, None)),
        ("symmetric", (None, "auto", "symmetric")),
        ("Affine:32", (None, 32, "affine")),
        ("k", (None, "auto", "k")),
        ("Q4_K", (4, 32, "k")),
        ("q6_k", (6, 16, "k")),
        ("Q8_0", (8, 32, "symmetric")),
        ("Q5_1", (5, 32, "affine")),
        ("IQ4_XS", (4, 32, "iq4_xs")),
        ("iq4_nl:32", (4, 32, "iq4_nl")),
    ],
)
def test_what_is_said(text: str, wanted: tuple[Any, ...]) -> None:
    found = Spelling.parse(text)
    assert (found.bits, found.group_size, found.grid) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "'7' is no precision; write bits"),
        ("4:0", "group size is a number, or -1 for whole rows"),
        ("4:", "group size is a number"),
        ("4:x", "group size is a number"),
        ("", "is no precision"),
        ("Q4_K:64", "Q4_K has groups of its own; leave 64 out"),
        ("iq4_nl:64", "iq4_nl has groups of 32, no others"),
        ("IQ4_X", "such as .*IQ4_XS"),
        ("Q4K", "such as .*Q4_K"),
        ("x" * 500, "is no precision"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Spelling.parse(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450


def test_every_type_has_its_name() -> None:
    for (grid, bits), name in TYPES.items():
        found = Spelling.parse(name)
        assert (found.grid, found.bits) == (grid, bits)


def test_together() -> None:
    said = {"--bits": Spelling.parse("4"), "--grid": Spelling.parse("symmetric:32")}
    assert combined(said) == Spelling(4, 32, "symmetric")
    with pytest.raises(ValueError, match="^--grid: Q4_K contradicts --bits 3, which says bits 3"):
        combined({"--bits": Spelling.parse("3"), "--grid": Spelling.parse("Q4_K")})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (4, "auto", None)),
        ({"bits": "IQ4_XS"}, (4, 32, "iq4_xs")),
        ({"grid": "Q6_K"}, (6, 16, "k")),
        ({"bits": "3:128"}, (3, 128, None)),
        ({"bits": 8, "group_size": None}, (8, -1, None)),
    ],
)
def test_options_in_python(given: Any, wanted: tuple[Any, ...]) -> None:
    found = PrecisionOptions(format="gguf", **given)
    assert (found.bits, found.group_size, found.grid) == wanted
    # What is resumed compares these, so spellings of one precision are the same run.
    again = PrecisionOptions(found.bits, found.group_size, "gguf", found.grid)
    assert again == found


@pytest.mark.parametrize(
    "given", [{"bits": 3, "grid": "Q4_K"}, {"bits": "4:64", "group_size": 32}, {"bits": "Q9_K"}]
)
def test_contradictions_in_python(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contradicts|is no precision"):
        bitwright.quantize(DEMO, tmp_path / "q", "rtn", format="gguf", progress=False, **given)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-b 3 --grid Q4_K", "--grid: Q4_K contradicts --bits 3"),
        ("-b 4:32 -g 64", "--group-size: 64 contradicts --bits 4:32"),
        ("--grid Q4_K -g 64", "--group-size: 64 contradicts --grid Q4_K"),
        ("-b 4 --grid Q8_0", "--grid: Q8_0 contradicts --bits 4"),
    ],
)
def test_contradictions_that_are_typed(words: str, message: str, tmp_path: Path) -> None:
    command = ["quantize", str(DEMO), "-o", str(tmp_path / "q"), "-m", "rtn", *words.split()]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 2
    assert message in found.output


def test_one_precision_in_many_words(tmp_path: Path) -> None:
    """The same files, whichever way it was written; and an override in either form."""
    words = {
        "a": "-b 4 -g 32 --grid symmetric --override *.o_proj=bits:8,group_size:32",
        "b": "-b 4:32 --grid symmetric --override *.o_proj=Q8_0",
        "c": "-b q4_0 --override *.o_proj=8:32",
    }
    files = set()
    for name, each in words.items():
        out = tmp_path / name
        command = ["quantize", str(DEMO), "-o", str(out), "-m", "rtn", "-f", "gguf", *each.split()]
        found = CliRunner().invoke(cli, command)
        assert found.exit_code == 0, found.output
        files.add((out / "model.gguf").read_bytes())
    assert len(files) == 1
