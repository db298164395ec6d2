"""Strangers' folders, and commands that read them, run in this process and watched."""

import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import bitwright
from bitwright.cli.main import main

TEXT = str(bitwright.demo_folder() / "evaluation.txt")
SECONDS = 20  # that a command may take here; most take a fraction of one
SIDE = {
    "LICENSE": "You may.",
    "NOTICE": "Note.",
    "merges.txt": "a b",
    "modeling_own.py": "import own",
    "own/layers/attention.py": "layers = 1",
    "modules.json": '[{"path": ""}]',
    "vocab.json": "{}",
}
READ = {
    "generation_config.json": "{}",
    "special_tokens_map.json": '{"bos_token": "<bos>"}',
    "chat_template.jinja": "{% for each in messages %}{{ each.content }} {% endfor %}",
    "README.md": "---\nlicense: mit\n---\n# A model\n",
}


GGUF = ("--format", "gguf", "--bits", "8", "--grid", "symmetric")
FEW = ("--samples", "4", "--length", "16")
DYNAMIC = ("--target-bpw", "4.5", "--candidates", "4:64,5:64", "--method", "rtn")
COMMANDS = {
    "inspect": ("inspect", "MODEL"),
    "evaluate": ("evaluate", "MODEL", "--evaluation", "TEXT", *FEW, "--json"),
    "rounded": ("quantize", "MODEL", "--out", "OUT/q", "--method", "rtn"),
    "gptq": ("quantize", "MODEL", "--out", "OUT/q", "--calibration", "TEXT", "--preset", "fast", *FEW),
    "gguf": ("quantize", "MODEL", "--out", "OUT/q", "--method", "rtn", *GGUF),
    "statistics": ("statistics", "collect", "MODEL", "--out", "OUT/s", "--calibration", "TEXT", *FEW),
    "sensitivities": ("sensitivities", "MODEL", "--out", "OUT/s.json", "--calibration", "TEXT", *FEW),
    "dynamic": ("dynamic", "MODEL", "--out", "OUT/q", "--calibration", "TEXT", *FEW, *DYNAMIC,
                "--sensitivities", "OUT/s.json", "--recipe", "OUT/r.json"),
    "salient": ("salient", "MODEL", "--out", "OUT/q", "--activations",
                "OUT/a.npz", "--calibration", "TEXT", *FEW),
    "convert": ("convert", "PACKED", "--out", "OUT/q", "--format", "float"),
    "to gguf": ("convert", "PACKED", "--out", "OUT/q", "--format", "gguf", "--allow-requantize"),
    "refine": ("refine", "PACKED", "--reference", "MODEL", "--out", "OUT/q", "--calibration", "TEXT", *FEW),
    "dwq": ("dwq", "PACKED", "--reference", "MODEL", "--out", "OUT/q", "--calibration", "TEXT",
            "--length", "16", "--tokens", "64", "--targets", "OUT/t"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """The command answers to SIGTERM, and none may hang."""

    def stop(_number: int, _frame: object) -> None:
        raise AssertionError(f"a command takes more than {SECONDS} seconds")

    before = [(each, signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGALRM)]
    signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    for number, handler in before:
        signal.signal(number, handler)


Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit code, its lines on standard error, and all that it says."""

    def command(*arguments: str | Path) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
        capsys.readouterr()
        signal.alarm(SECONDS)
        with pytest.raises(SystemExit) as ended:
            main()
        signal.alarm(0)
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("bitwright: ")]
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), lines, said.err + said.out

    return command


def put(folder: Path, content: Mapping[str, bytes] | Mapping[str, str]) -> Path:
    for name, each in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(each if isinstance(each, bytes) else each.encode())
    return folder


def link(place: Path, target: Path | str) -> Path:
    """Put a link in the place of whatever is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(target)
    return place


def given(command: tuple[str, ...], models: dict[str, Path], out: Path) -> list[str]:
    words = {**{name: str(path) for name, path in models.items()}, "TEXT": TEXT}
    out.mkdir()
    return [words.get(word, word.replace("OUT", str(out))) for word in command]
