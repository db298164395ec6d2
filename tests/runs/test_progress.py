"""Progress: bars in a terminal, lines in a pipe and a log, widgets in a notebook, records for callbacks."""

import logging
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import bitwright
from bitwright import Progress

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
SMALL = {"samples": 4, "length": 32}
Got = list[Progress]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "q"
    bitwright.quantize(DEMO, out, "rtn", 3, progress=False)
    return out


def quantize(out: Path, **options: object) -> list[str]:
    words = [sys.executable, "-m", "bitwright", "quantize", str(DEMO), "--out", str(out)]
    words += ["--bits", "3", "--calibration", str(TEXT), "--samples", "4", "--length", "32"]
    return words + [f"--{name}={value}" for name, value in options.items()]


def test_a_pipe_gets_a_line_for_every_block(tmp_path: Path) -> None:
    done = subprocess.run(quantize(tmp_path / "q"), capture_output=True, text=True, check=True)
    plan, *lines = done.stderr.splitlines()
    assert plan.startswith("plan: ")
    assert len(lines) == 3
    for number, line in enumerate(lines, start=1):
        told = rf"quantizing: {number} of 3 blocks, block error \S+, \d+ min \d+ s left"
        assert re.fullmatch(told, line), line
    assert "quantizing" not in done.stdout


def in_terminal(words: list[str], columns: int) -> str:
    """Return what a command shows in a terminal, without colours and movements."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, columns))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen(words, stdout=its, stderr=its, env=environment)
    os.close(its)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # as Linux says that nobody writes any more
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


@pytest.mark.slow
def test_a_terminal_gets_bars_and_one_for_all_phases(tmp_path: Path) -> None:
    columns = 80
    shown = in_terminal(quantize(tmp_path / "q", preset="high"), columns)
    rows = re.split(r"[\r\n]+", shown)
    last = {
        name: [row for row in rows if name in row][-1]
        for name in ("in all", "1/2 gradients of outputs", "2/2 quantizing")
    }
    assert "100 %" in last["in all"]
    assert "3/3 blocks" in last["2/2 quantizing"]
    for row in last.values():
        assert re.search(r"━+ .* 0:00:00 left", row), row
        assert len(row) <= columns
    assert not re.search(r"quantizing: \d", shown)


def test_one_phase_has_no_bar_for_all(tmp_path: Path) -> None:
    shown = in_terminal(quantize(tmp_path / "q"), 120)
    assert "in all" not in shown
    assert re.search(r"quantizing ━+ 3/3 blocks 0:00:00 left block error", shown)


CALLS: dict[str, tuple[Callable[[Path, Path, Callable[[Progress], object]], object], list[str]]] = {
    "quantize": (
        lambda out, _, tell: bitwright.quantize(
            DEMO, out / "q", calibration=TEXT, **SMALL, progress=tell
        ),
        ["quantizing"],
    ),
    "high": (
        lambda out, _, tell: bitwright.quantize(
            DEMO, out / "q", calibration=TEXT, preset="high", **SMALL, progress=tell
        ),
        ["gradients of outputs", "quantizing"],
    ),
    "best": (
        lambda out, _, tell: bitwright.quantize_best(
            DEMO, out / "q", bits=3, calibration=ids(64), progress=tell
        ),
        [
            *("estimating sensitivities", "gradients of outputs", "quantizing"),
            *("teaching", "distilling"),
        ],
    ),
    "dynamic": (
        lambda out, _, tell: bitwright.dynamic_quantize(
            *(DEMO, out / "q", 4.5, [(3, 64), (5, 64)], "rtn"),
            **{"calibration": ids(4), "evaluation": ids(2), "progress": tell},
        ),
        ["estimating sensitivities", "quantizing", "evaluating", "evaluating"],
    ),
    "dwq": (
        lambda out, made, tell: bitwright.dwq_quantize(
            DEMO, made, out / "q", ids(20), tokens=512, progress=tell
        ),
        ["teaching", "distilling"],
    ),
    "targets": (
        lambda out, _, tell: bitwright.compute_dwq_targets(DEMO, ids(4), out / "t", progress=tell),
        ["teaching"],
    ),
    "refine": (
        lambda out, made, tell: bitwright.refine_model(
            DEMO, made, out / "q", ids(4), progress=tell
        ),
        ["quantizing"],
    ),
    "convert": (
        lambda out, made, tell: bitwright.convert(made, out / "q", "float", progress=tell),
        ["converting"],
    ),
    "evaluate": (
        lambda _, made, tell: bitwright.evaluate(made, ids(4), reference=DEMO, progress=tell),
        ["evaluating"],
    ),
    "sensitivities": (
        lambda _, __, tell: bitwright.estimate_sensitivities(DEMO, ids(8), progress=tell),
        ["estimating sensitivities"],
    ),
    "statistics": (
        lambda out, _, tell: bitwright.collect_statistics(DEMO, out / "s", ids(4), progress=tell),
        ["collecting"],
    ),
    "activations": (
        lambda out, _, tell: bitwright.collect_activations(
            DEMO, out / "a.npz", ids(4), progress=tell
        ),
        ["collecting"],
    ),
}


def ids(samples: int) -> object:
    return bitwright.load_tokens(TEXT, tokenizer=DEMO, length=32, samples=samples)


@pytest.mark.parametrize("name", CALLS)
def test_long_calls_tell_a_function(
    name: str,
    quantized: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every phase from its beginning to its end, in shares that never fall, and nothing on the streams."""
    monkeypatch.setattr("bitwright.presets.best.TRAINED_TOKENS", 512)
    call, phases = CALLS[name]
    got: Got = []
    call(tmp_path, quantized, got.append)
    assert list(dict.fromkeys((each.number, each.phase) for each in got)) == list(
        enumerate(phases, start=1)
    )
    assert {each.phases for each in got} == {len(phases)}
    shares = [each.share for each in got]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    for number in range(1, len(phases) + 1):
        own = [each for each in got if each.number == number]
        assert (own[0].done, own[-1].done) == (0, own[-1].total)
    assert got[-1].seconds_left == 0
    seconds = [each.seconds for each in got]
    assert seconds == sorted(seconds)
    assert capfd.readouterr() == ("", "")


def test_statistics_that_are_merged_and_salient(tmp_path: Path) -> None:
    got: Got = []
    for name, rows in ("a", ids(4)[:2]), ("b", ids(4)[2:]):  # type: ignore[index]
        bitwright.collect_statistics(DEMO, tmp_path / name, rows, progress=False)
    parts = [tmp_path / "a", tmp_path / "b"]
    bitwright.merge_statistics(parts, tmp_path / "c", progress=got.append)
    assert (got[-1].phase, got[-1].share) == ("merging", 1)
    bitwright.collect_activations(DEMO, tmp_path / "a.npz", ids(4), progress=False)  # type: ignore[arg-type]
    got.clear()
    bitwright.awq_quantize_model(
        DEMO, tmp_path / "q", tmp_path / "a.npz", group_size=32, verbose=got.append
    )
    assert [each.done for each in got] == [0, 1, 2, 3]


def test_an_error_of_the_function_ends_the_call_which_resumes(tmp_path: Path) -> None:
    def stop(record: Progress) -> None:
        if record.done == 2:
            raise KeyboardInterrupt

    options = {"calibration": ids(4), "progress": stop}
    with pytest.raises(KeyboardInterrupt):
        bitwright.quantize(DEMO, tmp_path / "q", **options)  # type: ignore[arg-type]
    got: Got = []
    bitwright.quantize(DEMO, tmp_path / "q", **{**options, "progress": got.append})  # type: ignore[arg-type]
    assert [each.done for each in got] == [2, 3]


@pytest.mark.parametrize("progress", [True, False])
def test_the_log_gets_the_lines(
    progress: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under the name of the package, at level INFO, and standard error not again."""
    with caplog.at_level(logging.INFO, "bitwright"):
        bitwright.quantize(DEMO, tmp_path / "q", "rtn", progress=progress)
    lines = [each.getMessage() for each in caplog.records if each.name == "bitwright"]
    assert sum("blocks" in line for line in lines) == 3
    assert capsys.readouterr().err == ""


def in_notebook(code: str) -> tuple[str, list[str]]:
    """Run a cell; return what it has written on standard error, and the kinds of what it shows."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    text = "".join(each.text for each in outputs if each.get("name") == "stderr")
    return text, [kind for each in outputs for kind in each.get("data", {})]


CELL = f"""
import sys, warnings
warnings.simplefilter("error")
{{}}
import bitwright, tempfile
with tempfile.TemporaryDirectory() as folder:
    bitwright.quantize({str(DEMO)!r}, folder + "/q", "rtn")
pass
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own event loop
def test_a_notebook_without_widgets_gets_lines() -> None:
    text, kinds = in_notebook(CELL.format("sys.modules['ipywidgets'] = None"))
    assert text.count("quantizing: ") == 3
    assert "Warning" not in text
    assert not kinds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_gets_its_own_bars() -> None:
    pytest.importorskip("ipywidgets", reason="pip install bitwright[notebook]")
    text, kinds = in_notebook(CELL.format(""))
    assert "application/vnd.jupyter.widget-view+json" in kinds
    assert "quantizing" not in text
    assert "Warning" not in text
