"""One JSON object from every command, and the same beside every output."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, client_of_server
from test_command_options import COMMANDS

import bitwright
from bitwright.cli.main import main
from bitwright.records.described import VARYING

DEMO = bitwright.demo_folder()
TEXT = str(DEMO / "calibration.txt")
DATA = ("--calibration", TEXT, "--samples", "4", "--length", "32")
RUNS: dict[str, tuple[str, ...]] = {
    "quantize": (str(DEMO), "--out", "new", "--method", "awq", "--bits", "3", *DATA),
    "dynamic": (
        *(str(DEMO), "--out", "new", "--method", "rtn", "--target-bpw", "4.5", *DATA),
        *("--candidates", "3:64,5:64", "--evaluation", TEXT),
    ),
    "dwq": ("q", "--reference", str(DEMO), "--out", "new", *DATA[:2], *DATA[4:], "--tokens", "256"),
    "salient": (str(DEMO), "--out", "new", "--activations", "a.npz", "-g", "32", *DATA),
    "refine": ("q", "--reference", str(DEMO), "--out", "new", *DATA),
    "convert": ("q", "--out", "new", "--format", "float"),
    "inspect": (str(DEMO),),
    "evaluate": ("q", "--reference", str(DEMO), "--evaluation", TEXT, *DATA[2:]),
    "sensitivities": (str(DEMO), "--out", "s.json", *DATA),
    "statistics collect": (str(DEMO), "--out", "s", *DATA),
    "statistics merge": ("made", "--out", "s"),
    "statistics export": ("made", "--imatrix", "i.gguf"),
    "upload": ("q", "me/q", "--base-model", "org/story"),
    "demo": (),
    "info": (),
}
SLOW = ("demo",)
PAGE = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()


@pytest.fixture
def place(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.chdir(tmp_path)
    bitwright.quantize(DEMO, "q", "rtn", 3, progress=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def documented(command: str) -> list[str]:
    """Return the keys that the page tells of a command."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{command}` |"))
    same = re.search(r"those of `([\w ]+)`", row)
    return documented(same[1]) if same else re.findall(r"`(\w+)`", row.split("|")[2])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "hub").mkdir()
    with client_of_server(tmp_path / "hub", monkeypatch) as found:
        found.models["org/story", "main"] = DEMO
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield


def test_every_command_is_tried() -> None:
    assert RUNS.keys() == COMMANDS.keys()


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS]
)
def test_one_object_with_the_keys_that_are_documented(
    command: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if command == "upload":
        request.getfixturevalue("hub")
        monkeypatch.chdir(place)
    if "made" in RUNS[command]:
        bitwright.collect_statistics(DEMO, "made", TEXT, samples=2, length=32, progress=False)
    capfd.readouterr()
    assert run(monkeypatch, *command.split(), *RUNS[command], "--json") == 0
    printed = capfd.readouterr().out
    assert printed.count("\n") == 1
    found = json.loads(printed, parse_constant=pytest.fail)
    assert list(found) == documented(command)
    if "new" in RUNS[command]:
        check_beside(command, found)


def check_beside(command: str, printed: dict[str, Any]) -> None:
    """What lies beside the output is what was printed but for what varies, with the settings."""
    told = json.loads(Path("new", "report.json").read_text())
    settings = yaml.safe_load(Path("new", "bitwright.yaml").read_text())
    assert told.pop("settings") == settings
    assert told.pop("command").startswith(f"bitwright {command} ")
    assert told.pop("bitwright") == bitwright.__version__
    assert told == without(printed)
    assert settings["out"] == "new"
    assert not any(str(DEMO.parent) in str(value) for value in settings.values())


def without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without(each) for name, each in value.items() if name not in VARYING}
    return [without(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quantize", "nowhere", "--out", "new"), "nowhere"),
        (("evaluate", "q", "--evaluation", "nothing.txt"), "nothing.txt"),
        (("inspect", "nowhere"), "nowhere"),
    ],
)
def test_errors_are_a_line_on_standard_error(
    words: tuple[str, ...],
    said: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    assert run(monkeypatch, *words, "--json") == 1
    found = capfd.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
    assert said in found.err


def test_the_settings_beside_an_output_give_it_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("text.txt").symlink_to(TEXT)
    Path("model").symlink_to(DEMO)
    words = ["quantize", "model", "--out", "a", "--bits", "3", "--exclude", "*.v_proj"]
    words += ["--override", "*.o_proj=4:32", "--calibration", "text.txt", *DATA[2:]]
    assert run(monkeypatch, *words) == 0
    assert run(monkeypatch, "quantize", "--config", "a/bitwright.yaml", "--out", "b") == 0
    for name in ("model.safetensors", "config.json"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    first, second = (json.loads(Path(each, "report.json").read_text()) for each in "ab")
    assert first["layers"] == second["layers"]
    assert first["settings"] | {"out": "b"} == second["settings"]


def test_settings_of_training_do_not_contradict_themselves(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are written, those too that a student that is there already refuses to be told."""
    for name in ("text.txt", "model"):
        Path(name).symlink_to(TEXT if name == "text.txt" else DEMO)
    words = ["q", "--reference", "model", "--calibration", "text.txt", *DATA[4:]]
    assert run(monkeypatch, "dwq", *words, "--tokens", "256", "--out", "a") == 0
    assert run(monkeypatch, "dwq", "--config", "a/bitwright.yaml", "--out", "b") == 0
    for name in ("model.safetensors", "config.json"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_reports_are_not_copied_from_one_output_to_the_next(place: Path) -> None:
    """A call in Python has no settings of a command, so those of the folder it reads must not stay."""
    Path("q", "bitwright.yaml").write_text("bits: 3\n")
    bitwright.convert("q", "f", "float", progress=False)
    found = json.loads(Path("f", "report.json").read_text())
    assert (found["format"], found["settings"]) == ("float", None)
    assert found["command"].startswith("bitwright.convert(")
    assert not Path("f", "bitwright.yaml").exists()
