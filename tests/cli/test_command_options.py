"""The options of all commands: in groups, one name for one thing, old spellings still read."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from told import TOLD

import bitwright
from bitwright.cli.grouped import GROUPS, Command, Option
from bitwright.cli.main import cli, main
from bitwright.cli.parameters import Bits, Model
from bitwright.cli.spellings import spelled_out
from bitwright.spellings import Old

DEMO = bitwright.demo_folder()
TEXT = str(DEMO / "evaluation.txt")


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            assert isinstance(command, Command)
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())
OPTIONS = [
    (name, option)
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
]
RENAMED = [(name, old) for name, command in COMMANDS.items() for old in command.old]


def long(option: click.Option) -> str:
    return max(option.opts, key=len)


@pytest.mark.parametrize(
    ("command", "option"), OPTIONS, ids=[f"{name} {each.name}" for name, each in OPTIONS]
)
def test_every_option_is_in_a_group_and_explained(command: str, option: click.Option) -> None:
    assert isinstance(option, Option)
    assert option.group in GROUPS
    assert option.help
    assert option.help.endswith((".", ")"))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [40, 52, 66, 80, 200])
def test_help_fits_any_terminal(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = CliRunner().invoke(cli, [*name.split(), "--help"], prog_name="bitwright").output
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    assert not any(line.endswith(" ") for line in lines if not line.startswith("Usage:"))
    headings = [line.removesuffix(":") for line in lines if line.removesuffix(":") in GROUPS]
    assert headings == [each for each in GROUPS if each in headings]
    beginnings = {word for line in lines if line.startswith("  -") for word in line.split()}
    for option in COMMANDS[name].params:
        assert isinstance(option, click.Argument) or set(option.opts) <= {
            word.rstrip(",") for word in beginnings
        }


def test_the_list_of_commands_fits_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--help"], ["statistics", "--help"]):
        for columns in (40, 60, 80):
            monkeypatch.setenv("COLUMNS", str(columns))
            shown = CliRunner().invoke(cli, arguments, prog_name="bitwright").output
            assert max(map(len, shown.splitlines())) <= columns


# What is the same thing, by what it takes or what its name in Python says, and the one name that it has.
SAME = {
    "what a command writes": ({"out", "output", "output_path", "to_folder"}, "-o, --out"),
    "text to calibrate on": ({"calibration", "data", "train"}, "--calibration"),
    "text to judge on": ({"evaluation", "evaluate", "evaluate_on", "text", "eval"}, "--evaluation"),
    "the original": ({"reference", "original", "teacher"}, "--reference"),
    "format of what is written": ({"format", "to"}, "-f, --format"),
    "bits of a code": ({"bits"}, "-b, --bits"),
    "input channels of a scale": ({"group_size"}, "-g, --group-size"),
    "how codes are found": ({"method"}, "-m, --method"),
    "a file of activations": ({"activations", "activations_path"}, "--activations"),
}


@pytest.mark.parametrize("thing", SAME)
def test_one_thing_has_one_name(thing: str) -> None:
    names, expected = SAME[thing]
    found = {", ".join(each.opts) for _, each in OPTIONS if each.name in names}
    assert found == {expected}


def test_options_of_one_type_have_one_name() -> None:
    """Models that are read are MODEL, and what they are compared with is --reference."""
    for name, command in COMMANDS.items():
        arguments = [each for each in command.params if isinstance(each, click.Argument)]
        assert [each.name for each in arguments] in (
            [],
            ["model"],
            ["parts"],
            ["statistics"],
            ["folder", "name"],
        ), name
        assert all(isinstance(each.type, Model) for each in arguments if each.name == "model")
        read = [each.name for each in command.params if isinstance(each.type, Model)]
        assert read in ([], ["model"], ["model", "reference"], ["model", "against"]), name
    bits = {long(each) for _, each in OPTIONS if isinstance(each.type, Bits)}
    assert bits == {"--embedding-bits", "--head-bits"}


def test_one_name_has_one_type_and_one_place() -> None:
    kinds: dict[str, set[str]] = {}
    groups: dict[str, set[str]] = {}
    for name, option in OPTIONS:
        # salient has only numbers for --group-size, and compare several of everything.
        if name not in ("evaluate", "salient", "compare"):
            kinds.setdefault(long(option), set()).add(type(option.type).__name__)
        if name not in ("evaluate", "compare", "score", "generate", "chat"):  # of other things
            assert isinstance(option, Option)
            groups.setdefault(long(option), set()).add(option.group)
    assert {name for name, found in kinds.items() if len(found) > 1} <= {
        *("--recipe", "--out", "--imatrix")
    }
    assert {name for name, found in groups.items() if len(found) > 1} == {
        *("--loss", "--batch-size"),  # of the training that dwq is
        "--recipe",  # which dynamic writes, and quantize follows
        "--imatrix",  # which statistics export writes, and quantize follows
    }


@pytest.mark.parametrize(
    ("name", "typed", "expected"),
    [
        ("evaluate", "m --text t.txt", "m --evaluation t.txt"),
        ("evaluate", "--text=t.txt m --json", "--evaluation=t.txt m --json"),
        ("evaluate", "m --reference --text --text a", "m --reference --text --evaluation a"),
        ("evaluate", "m -- --text", "m -- --text"),
        ("sensitivities", "m -o s.json --data t", "m --out s.json --calibration t"),
        ("dynamic", "m --data t --evaluate e", "m --calibration t --evaluation e"),
        ("dynamic", "m --data t --calibration c", "m --sensitivity-calibration t --calibration c"),
        ("salient", "--model-path m --output-path o --activations-path a",
         "m --out o --activations a"),
        ("salient", "--output-path=o --model-path=-m", "./-m --out=o"),
        ("convert", "m --to gguf -oq", "m --format gguf --out=q"),
        ("refine", "q --original m --no-drift", "q --reference m --no-drift"),
        ("dwq", "--teacher m --student q --data t", "q --reference m --calibration t"),
        ("dwq", "--student q --data t --teacher=m", "q --calibration t --reference=m"),
        ("dwq", "--teacher m --data t -b3 -g 32", "m --calibration t --bits=3 --group-size 32"),
        ("dwq", "--teacher m --data t --calibration c",
         "m --calibration t --student-calibration c"),
        ("dwq", "--teacher m --calibration c --targets t",
         "m --student-calibration c --targets t"),
        ("dwq", "m --calibration c --targets t", "m --calibration c --targets t"),
        ("convert", "m --out o --to", "m --out o --format"),
        ("salient", "--out o --model-path", "--out o"),
        ("quantize", "m -o q -b 3 -g64 -f gptq -m rtn", "m --out q --bits 3 --group-size=64 "
         "--format gptq --method rtn"),
        ("quantize", "m -o=q --no-bos --exclude -o", "m --out==q --no-bos --exclude -o"),
        ("statistics collect", "m -o s --calibration=-b", "m --out s --calibration=-b"),
    ],
)  # fmt: skip
def test_words_are_spelled_out(name: str, typed: str, expected: str) -> None:
    command = COMMANDS[name]
    words, used = spelled_out(command.params, command.old, typed.split())
    assert " ".join(words) == expected
    olds = {old.name for old in command.old if old.beside is None}
    known = {word.partition("=")[0] for word in typed.split()} & olds
    assert known - {"--text"} <= {old.name for old in used}


@pytest.mark.parametrize(
    ("name", "old"), RENAMED, ids=[f"{name} {old.name} {old.beside}" for name, old in RENAMED]
)
def test_old_spellings_are_hidden_and_lead_to_what_is_there(name: str, old: Old) -> None:
    command = COMMANDS[name]
    present = {spelling for each in command.params for spelling in each.opts}
    present |= {str(each.name).upper() for each in command.params}
    assert old.new in present
    assert old.name not in present or old.beside is not None
    shown = CliRunner().invoke(cli, [*name.split(), "--help"]).output
    assert old.name in present or f"{old.name} " not in shown


Run = Any


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command as `main` does: exit code, standard output, standard error."""
    for name in ("while_running", "while_ending", "tell_of_lost_output"):
        monkeypatch.setattr(f"bitwright.cli.main.{name}", lambda *_: None)

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return command


FEW = ("--samples", "4", "--length", "16", "--threads", "1")
DYNAMIC = ("--target-bpw", "4.5", "--candidates", "4:64,5:64", "--method", "rtn")
DISTIL = ("--length", "16", "--tokens", "64", "--threads", "1", "--bits", "3", "--method", "rtn")
BOTH = [
    (
        ("evaluate", DEMO, "--text", TEXT, *FEW),
        ("evaluate", DEMO, "--evaluation", TEXT, *FEW),
        "--evaluation in place of --text",
    ),
    (
        ("sensitivities", DEMO, "--out", "OUT/s.json", "--data", TEXT, *FEW),
        ("sensitivities", DEMO, "-o", "OUT/s.json", "--calibration", TEXT, *FEW),
        "--calibration in place of --data",
    ),
    (
        ("dynamic", DEMO, "--out", "OUT/q", *DYNAMIC, "--data", TEXT, "--evaluate", TEXT, *FEW),
        ("dynamic", DEMO, "-o", "OUT/q", *DYNAMIC, "--calibration", TEXT, "--evaluation", TEXT,
         *FEW),
        "--calibration in place of --data, --evaluation in place of --evaluate",
    ),
    (
        ("dwq", "--teacher", DEMO, "--out", "OUT/q", "--data", TEXT, *DISTIL),
        ("dwq", DEMO, "-o", "OUT/q", "--calibration", TEXT, *DISTIL[:-4], "-b3", "-mrtn"),
        "MODEL in place of --teacher, --calibration in place of --data",
    ),
    (
        ("dwq", "--teacher", DEMO, "--student", "PACKED", "--out", "OUT/q", "--data", TEXT,
         *DISTIL[:-4]),
        ("dwq", "PACKED", "--reference", DEMO, "-o", "OUT/q", "--calibration", TEXT, *DISTIL[:-4]),
        "--reference in place of --teacher, MODEL in place of --student, --calibration in place of "
        "--data",
    ),
    (
        ("salient", "--model-path", DEMO, "--output-path", "OUT/q", "--activations-path",
         "OUT/a.npz", "--calibration", TEXT, "--group-size", "32", *FEW),
        ("salient", DEMO, "-o", "OUT/q", "--activations", "OUT/a.npz", "--calibration", TEXT, "-g32",
         *FEW),
        "MODEL in place of --model-path, --out in place of --output-path, --activations in place of "
        "--activations-path",
    ),
    (
        ("convert", "PACKED", "--to", "float", "--out", "OUT/q"),
        ("convert", "PACKED", "-f", "float", "-o", "OUT/q"),
        "--format in place of --to",
    ),
    (
        ("refine", "PACKED", "--original", DEMO, "--out", "OUT/q", "--calibration", TEXT, *FEW),
        ("refine", "PACKED", "--reference", DEMO, "-o", "OUT/q", "--calibration", TEXT, *FEW),
        "--reference in place of --original",
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now", "said"), BOTH, ids=[f"{before[0]} {len(before)}" for before, _, _ in BOTH]
)
def test_old_spellings_do_the_same_and_tell_the_new(
    run: Run, tmp_path: Path, before: tuple[str, ...], now: tuple[str, ...], said: str
) -> None:
    packed = tmp_path / "packed"
    bitwright.quantize(DEMO, packed, "rtn", 4, 64, progress=False)
    written, printed = [], []
    for words in (before, now):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        places = {"PACKED": str(packed), "OUT": str(out)}
        given = [
            str(word).replace("OUT", places["OUT"]).replace("PACKED", places["PACKED"])
            for word in words
        ]
        status, shown, errors = run(*given)
        assert status == 0, errors
        note = [line for line in errors.splitlines() if line.startswith("bitwright: ")]
        assert note == ([f"bitwright: deprecated: write {said}"] if words is before else [])
        # The card tells how it was made: of both in the present words.
        written.append({
            path.relative_to(out): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != "dwq.json"  # which tells seconds
        })  # fmt: skip
        printed.append(shown)
        out.rename(tmp_path / f"out {len(written)}")
    assert written[0].keys() == written[1].keys()
    if before[0] == "evaluate":
        assert not written[0]
    for name, content in written[0].items():
        if name.name not in TOLD:
            assert content == written[1][name], name
    cards = [
        sorted(command_of(content).split())
        for each in written
        for name, content in each.items()
        if name.name == "README.md"
    ]
    assert cards[1:] == cards[:1]


def command_of(card: bytes) -> str:
    """Return the command that a model card tells, its values without "=", without line breaks."""
    text = card.decode().split("```sh\n")[1].split("```")[0]
    assert not any(old.name in text.split() for _, old in RENAMED if old.beside is None)
    return text.replace("\\\n", " ").replace("=", " ")


def test_errors_name_the_present_options(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed = tmp_path / "packed"
    bitwright.quantize(DEMO, packed, "rtn", 4, 64, progress=False)
    for arguments, expected in (
        (("dwq", packed, "--out", out, "--calibration", TEXT), "--reference, its original"),
        (("dwq", packed, "--reference", DEMO, "-o", out, "-b3"), "--bits says how to quantize"),
        (("dwq", DEMO, "--reference", DEMO, "-o", out, "--calibration", TEXT), "--reference)"),
        (("salient", DEMO, "--activations", "a.npz"), "--out is missing"),
        (("convert", DEMO, "-o", out), "Missing option '-f' / '--format'"),
        (("evaluate", DEMO), "Missing option '--evaluation'"),
        (("quantize", DEMO, "-o", out, "-b", "7"), "'-b' / '--bits'"),
        (("refine", "--original", DEMO, "--out", out), "Missing argument 'MODEL'"),
    ):
        status, _, errors = run(*arguments)
        assert status in (1, 2)
        assert expected in " ".join(errors.split()), errors
    assert not out.exists()


def test_help_imports_no_more_than_the_package() -> None:
    """What only some commands need, matplotlib and torch say, is imported by these when they run."""
    program = """
import sys
sys.argv = ["bitwright", "--help"]
from bitwright.cli.main import main
try:
    main()
except SystemExit:
    print(*(set(sys.modules) & {"torch", "transformers", "matplotlib", "mpi4py"}), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "Commands:" in done.stdout
    assert done.stderr == "\n"


def test_commands_for_users_of_other_tools_are_such_as_there_are() -> None:
    """Each is read to its end, choices and numbers included; only nothing is run."""
    page = (Path(__file__).parents[2] / "docs" / "from_other_tools.md").read_text()
    told = re.findall(r"`bitwright ([^`]+)`", page)
    assert len(told) > 20
    for line in told:
        given = line.replace("evaluate OUT", "evaluate MODEL").replace("QUANTIZED", "MODEL")
        words = shlex.split(given.replace("MODEL", str(DEMO)))
        if words == ["convert"]:
            continue
        count = 2 if words[0] == "statistics" else 1
        command = COMMANDS[" ".join(words[:count])]
        command.make_context(words[count], words[count:])
