"""Settings of commands in YAML files, and precisions by known names."""

import sys
from pathlib import Path
from typing import Any

import click
import pytest
from test_command_options import COMMANDS

import bitwright
from bitwright.cli.config_file import read_settings
from bitwright.cli.main import main

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
SETTINGS = f"""
model: {DEMO}
out: a
bits: 3
group-size: 64   # either spelling
refine: no
drift: ~
exclude: ["*.v_proj"]
overrides:
  "*.o_proj": {{bits: 4, group_size: 32}}
calibration: {TEXT}
samples: 4
length: 64
"""


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(SETTINGS)
    return tmp_path


def weights(name: str) -> bytes:
    return Path(name, "model.safetensors").read_bytes()


def test_a_run_from_a_file_and_the_file_of_a_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as by options; the file that is written gives them again; options count more."""
    assert run(monkeypatch, "quantize", "--config", "c.yaml", "--save-config", "s.yaml") == 0
    words = [str(DEMO), "--out", "b", "--bits", "3", "--group-size", "64", "--no-refine"]
    words += ["--exclude", "*.v_proj", "--override", "*.o_proj=bits:4,group_size:32"]
    words += ["--calibration", str(TEXT), "--samples", "4", "--length", "64"]
    assert run(monkeypatch, "quantize", *words) == 0
    assert run(monkeypatch, "quantize", "--config", "s.yaml", "--out", "c") == 0
    assert run(monkeypatch, "quantize", "--config", "c.yaml", "--out", "d", "--bits", "4") == 0
    assert weights("a") == weights("b") == weights("c") != weights("d")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bits: 3", "bits: 7", "c.yaml, line 4: bits: '7' is no precision"),
        ("bits: 3", "bit: 3", "c.yaml, line 4: quantize has no setting 'bit'; is bits meant?"),
        ("bits: 3", "zzz: 3", "c.yaml, line 4: quantize has no setting 'zzz'"),
        ("bits: 3", "bits: 3\nbits: 4", "c.yaml, line 5: 'bits' is there twice"),
        ("bits: 3", "bits: [3, 4]", "c.yaml, line 4: bits: must be one value, but is a list"),
        (
            "refine: no",
            "refine: perhaps",
            "c.yaml, line 6: refine: 'perhaps' is not a valid boolean",
        ),
        ("samples: 4", "samples: none", "c.yaml, line 12: samples: 'none' is not a valid int"),
        ("{bits: 4, group_size: 32}", "4", "c.yaml, line 9: overrides: must map each glob"),
        ("{bits: 4, group_size: 32}", "{bits: [4]}", "c.yaml, line 9: overrides: must map each"),
        ("{bits: 4, group_size: 32}", "{[a]: 4}", "c.yaml, line 9: a key must be a word"),
        ('["*.v_proj"]', "&a [*a]", "c.yaml, line 8: is nested too deeply"),
        ('["*.v_proj"]', f"{'[' * 3000}a{']' * 3000}", "c.yaml: is nested too deeply"),
        ("samples: 4", f"samples: {'9' * 5000}", "c.yaml, line 12: samples: '9999"),
        ("out: a", "out: [", "is not sound YAML"),
        (SETTINGS, "- a", "c.yaml, line 1: must be settings, KEY: VALUE"),
        ("", "", "there is no such file"),
    ],
)
def test_mistakes_are_named_with_their_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    said: str,
) -> None:
    Path("c.yaml").write_text(SETTINGS.replace(old, new))
    assert run(monkeypatch, "quantize", "--config", "c.yaml" if old else "no.yaml") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert len(lines[0]) < 1000
    assert [path.name for path in place.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("content", ["mine: 1\n", "", "\0\xff"])
def test_settings_replace_no_file_of_others(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    """Unless that is asked for; a link to settings is followed."""
    Path("s.yaml").write_text(content)
    words = ["quantize", "--config", "c.yaml", "--method", "rtn", "--save-config"]
    assert run(monkeypatch, *words, "s.yaml") == 1
    assert "s.yaml: exists already, and is not what this command" in capsys.readouterr().err
    assert Path("s.yaml").read_text() == content
    assert not Path("a").exists()
    Path("link.yaml").symlink_to("s.yaml")
    assert run(monkeypatch, *words, "link.yaml", "--overwrite") == 0
    assert run(monkeypatch, *words, "link.yaml", "--out", "b") == 0
    assert Path("link.yaml").is_symlink()
    assert "out: b" in Path("s.yaml").read_text()


def test_words_are_words(tmp_path: Path) -> None:
    """YAML takes 3:32 for the number 212, and no for a truth; here both are what is written."""
    (tmp_path / "c.yaml").write_text("low: 3:32\nhigh: 5:64\nloss: kl\n")
    command = COMMANDS["sensitivities"]
    found = read_settings(tmp_path / "c.yaml", command, click.Context(command))
    assert found == {"low": "3:32", "high": "5:64", "loss": "kl"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_a_file(name: str) -> None:
    options = {each for option in COMMANDS[name].params for each in option.opts}
    assert {"--config", "--save-config"} <= options


@pytest.mark.parametrize("name", bitwright.SCHEMES)
def test_schemes(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme is the options that it stands for, which others on the command line replace."""
    settings: dict[str, Any] = dict(bitwright.SCHEMES[name])
    small = ["--group-size", "32"] if settings["group_size"] == 128 else []
    words = ["quantize", str(DEMO), "--method", "rtn"]
    assert run(monkeypatch, *words, "--out", "a", "--scheme", name, *small) == 0
    options = [
        word
        for key, value in settings.items()
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    assert run(monkeypatch, *words, "--out", "b", *options, *small) == 0
    assert weights("a") == weights("b")
    said = [Path(each, "config.json").read_bytes() for each in "ab"]
    assert said[0] == said[1]
    Path("s.yaml").write_text(f"scheme: {name}\nbits: 4\ngroup_size: 32\n")
    assert run(monkeypatch, *words, "--out", "c", "--config", "s.yaml") == 0
    assert bitwright.load_model("c").quantized("model.layers.0.mlp.up_proj").bits == 4  # type: ignore[union-attr]
