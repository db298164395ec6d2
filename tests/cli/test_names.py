"""Names and values from strangers' files in what bitwright says: nothing of them moves a terminal's cursor,
begins a line of its own or cannot be seen."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import bitwright
from bitwright.cli.main import main
from bitwright.errors import BitwrightError, printable
from bitwright.records.made_by import command_line

DEMO = bitwright.demo_folder()
EVIL = "x\x1b[31m\nEVIL\x07\x9b2J\x7f\u202e\u2028y"
# What a terminal acts on, begins a line with, or shows in another order; a line's own end is none of them.
CONTROLS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\udc80-\udcff]"
)
SMALL = ("--samples", "4", "--length", "32")

pytestmark = pytest.mark.filterwarnings("always::bitwright.BitwrightWarning")
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; returns its exit code and all that it has said."""
    monkeypatch.setattr("bitwright.cli.main.while_running", lambda: None)
    monkeypatch.setattr("bitwright.cli.main.while_ending", lambda status: None)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def check(said: str) -> None:
    assert not CONTROLS.search(said), ascii(said)
    assert not re.search("^EVIL", said, re.MULTILINE), ascii(said)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model in a hostile folder, with a tensor of a hostile name that no layer has."""
    folder = tmp_path / EVIL / f"model{EVIL}"
    shutil.copytree(DEMO, folder)
    weights = folder / "model.safetensors"
    extra = {f"model.layers.0.{EVIL}.weight": np.ones((4, 4), np.float32)}
    save_file({**load_file(weights), **extra}, weights, {"format": "pt"})
    shutil.copy(DEMO / "calibration.txt", folder.parent / f"{EVIL}.txt")
    return folder


@pytest.mark.slow
def test_commands_that_do_their_work(model: Path, command: Command) -> None:
    """All of them, with hostile names of models, texts and outputs."""
    place = model.parent
    text = place / f"{EVIL}.txt"
    out = {name: place / f"{name}{EVIL}" for name in "abcdefghij"}
    calibrated = ("--calibration", text, *SMALL)
    parts = [place / f"{name}{EVIL}" for name in ("part", "both")]
    for arguments in (
        ("inspect", model),
        ("quantize", model, "--out", out["a"], *calibrated, "--preset", "fast"),
        ("quantize", model, "--out", out["b"], "--method", "awq", *calibrated),
        ("evaluate", out["a"], "--reference", model, "--evaluation", text, *SMALL),
        ("evaluate", out["a"], "--evaluation", text, *SMALL, "--json"),
        ("convert", out["a"], "--out", out["c"], "--format", "float"),
        ("refine", out["a"], "--reference", model, "--out", out["d"], *calibrated),
        ("sensitivities", model, "--out", place / f"s{EVIL}.json", "--calibration", text, *SMALL),
        ("dynamic", model, "--out", out["e"], "--target-bpw", "4.5", "--calibration", text, *SMALL,
         "--sensitivities", place / f"s{EVIL}.json", "--recipe", place / f"r{EVIL}.json"),
        ("dwq", out["a"], "--reference", model, "--out", out["f"], "--calibration", text,
         "--length", "32", "--tokens", "256"),
        ("salient", model, "--out", out["g"], *calibrated,
         "--activations", place / f"a{EVIL}.npz", "--group-size", "32"),
        ("statistics", "collect", model, "--out", parts[0], *calibrated),
        ("statistics", "merge", parts[0], "--out", parts[1]),
        ("quantize", model, "--out", out["h"], "--statistics", parts[1], "--format", "gptq"),
    ):  # fmt: skip
        code, said = command(*arguments)
        assert code == 0, said
        check(said)
    cards = list(place.glob("*/README.md"))
    assert len(cards) >= 7
    for card in cards:
        check(card.read_text())


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def hostile_index(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, f"{EVIL}.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hostile_header(folder: Path) -> None:
    header = json.dumps({EVIL: {"dtype": EVIL, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(4)
    )


def renamed_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.1.self_attn.{EVIL}"] = weights.pop(
        "model.layers.1.self_attn.q_proj.weight"
    )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def hostile_template(folder: Path) -> None:
    template = "{{ raise_exception('" + EVIL.replace("\n", "\\n") + "') }}"
    change_json(folder / "tokenizer_config.json", chat_template=template)
    (folder / "data.jsonl").write_text(
        json.dumps({"messages": [{"role": EVIL, "content": "a"}]}) + "\n"
    )


def config(**values: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **values)


@pytest.mark.parametrize(
    "damage",
    [
        config(model_type=EVIL),
        config(hidden_act=EVIL),
        config(rope_scaling={"rope_type": EVIL, "factor": 2.0}),
        config(quantization_config={"quant_method": EVIL}),
        config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, EVIL: EVIL}),
        config(num_hidden_layers=EVIL),
        lambda folder: (folder / "config.json").write_text('{"' + EVIL),
        lambda folder: (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": EVIL}})),
        hostile_index,
        hostile_header,
        renamed_tensor,
        hostile_template,
    ],
)  # fmt: skip
def test_damaged_models(damage: Callable[[Path], object], tmp_path: Path, command: Command) -> None:
    """Each names what is wrong with it, in one line."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    damage(folder)
    texts = [path for path in (folder / "data.jsonl", DEMO / "calibration.txt") if path.exists()]
    found = ""
    for arguments in (
        ("inspect", folder),
        ("quantize", folder, "--out", tmp_path / "out", "--calibration", texts[0], *SMALL),
        ("evaluate", folder, "--evaluation", texts[0], *SMALL),
        ("convert", folder, "--out", tmp_path / "other", "--format", "gguf"),
    ):
        code, said = command(*arguments)
        check(said)
        assert (code == 1) == ("bitwright: " in said.replace("bitwright: warning: ", ""))
        found += said
    assert "bitwright: " in found


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "DEMO", "--out", "DIR/out", "--calibration", "DIR/absent.txt"),
        ("quantize", "DEMO", "--out", "DIR/taken", "--method", "rtn"),
        ("quantize", "DEMO", "--out", "DIR/taken", "--method", "rtn", "--overwrite"),
        ("quantize", "DEMO", "--out", "DIR/out", "--method", "rtn", "--recipe", "DIR/wrong.json"),
        ("quantize", "DEMO", "--out", "DIR/out", "--method", "rtn", "--recipe", "DIR/taken"),
        ("quantize", "DEMO", "--out", "DIR/out", "--method", "rtn", "--include", EVIL),
        ("quantize", "DEMO", "--out", "DIR/out", "--method", "rtn", "--override", f"{EVIL}=bits:4"),
        ("quantize", "DEMO", "--out", "DIR/out", "--method", EVIL),
        ("quantize", "DEMO", "--out", "DIR/out", "--statistics", "DIR/taken"),
        ("quantize", "DEMO", "--out", "DIR/out", f"--{EVIL}"),
        ("quantize", "DIR/none", "--out", "DIR/out"),
        ("dynamic", "DEMO", "--out", "DIR/out", "--target-bpw", "4", "--calibration", "DIR/absent.txt"),
        ("dynamic", "DEMO", "--out", "DIR/out", "--target-bpw", "4", "--calibration", "DIR/text.txt",
         "--sensitivities", "DIR/wrong.json"),
        ("sensitivities", "DEMO", "--out", "DIR/none/s.json", "--calibration", "DIR/text.txt"),
        ("sensitivities", "DEMO", "--out", "DIR/wrong.json", "--calibration", "DIR/text.txt"),
        ("dwq", "DIR/none", "--reference", "DEMO", "--out", "DIR/out"),
        ("dwq", "DEMO", "--out", "DIR/out", "--calibration", "DIR/text.txt", "--targets",
         "DIR/taken", "--length", "32"),
        ("salient", "DEMO", "--out", "DIR/out", "--activations",
         "DIR/wrong.npz"),
        ("convert", "DIR/wrong.gguf", "--out", "DIR/out", "--format", "mlx"),
        ("refine", "DEMO", "--reference", "DIR/none", "--out", "DIR/out", "--calibration", "a.txt"),
        ("statistics", "merge", "DIR/taken", "--out", "DIR/out"),
        ("statistics", "collect", "DEMO", "--out", "DIR/taken", "--calibration", "DIR/text.txt"),
        ("evaluate", "DEMO", "--evaluation", "DIR/text.pdf"),
        (EVIL,),
    ],
)  # fmt: skip
def test_wrong_names(arguments: tuple[str, ...], tmp_path: Path, command: Command) -> None:
    place = tmp_path / EVIL
    place.mkdir()
    (place / "taken").mkdir()
    (place / "taken" / f"{EVIL}.txt").write_text(EVIL)
    (place / "text.txt").write_text("Once upon a time there was a word. " * 200)
    (place / "wrong.json").write_text(json.dumps({"layers": {EVIL: {"bits": EVIL}}, EVIL: EVIL}))
    np.savez(place / "wrong.npz", **{EVIL: np.ones((2, 2), np.float32)})
    key = EVIL.encode()
    (place / "wrong.gguf").write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
        + len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little")
        + len(key).to_bytes(8, "little") + key
    )  # fmt: skip
    code, said = command(
        *(each.replace("DIR", str(place)).replace("DEMO", str(DEMO)) for each in arguments)
    )
    assert code in (1, 2), said
    check(said)


def test_names_that_are_no_text(tmp_path: Path, command: Command) -> None:
    """Bytes of a name that no encoding has are told, not the end of a table."""
    folder = tmp_path / "m\udc80\udcff"
    shutil.copytree(DEMO, folder)
    for arguments in (
        ("inspect", folder),
        ("inspect", folder, "--json"),
        ("inspect", f"{folder}?"),
    ):
        _, said = command(*arguments)
        said.encode()
        assert "m\\udc80\\udcff" in re.sub(r"\s", "", said)


@given(st.text())
def test_printable(text: str) -> None:
    told = printable(text)
    assert told.isprintable()
    assert printable(told) == told
    assert (told == text) == text.isprintable()
    assert str(BitwrightError(text)) == told


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_commands_in_cards_are_one_line(words: list[str]) -> None:
    assert command_line(words).isprintable()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_commands_in_cards_are_what_was_given() -> None:
    words = [f"a{EVIL}'b\\n", "ü ber", "$x", f"--out=q{EVIL}", "b\udcffc", "plain"]
    script = command_line(words).replace("bitwright", "printf '%s\\0'", 1)
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode(errors="surrogateescape").split("\0")[:-1] == words


def test_plots_are_sound_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {f"{EVIL}{i}": float(i) for i in range(3)}
    counts = dict.fromkeys(names, 10)
    found = bitwright.Sensitivities(names, counts, (3, 64), (5, 64), "m", "t", "kl", 0.1)
    bitwright.plot_sensitivities(found, tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text()
    ElementTree.fromstring(text)
    check(text.replace("\t", " "))
