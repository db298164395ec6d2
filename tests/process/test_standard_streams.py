"""Standard output and standard error that are full, closed, or pipes that nobody reads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bitwright

DEMO = str(bitwright.demo_folder())
FULL = "/dev/full"
NO_ROOM = "bitwright: standard output: cannot be written: No space left on device"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")
MESSAGES = (("inspect", DEMO), ("inspect", DEMO, "--json"), ("--help",))
BUFFERED = [("", each) for each in MESSAGES] + [("1", MESSAGES[0])]
QUANTIZE = ("quantize", DEMO, "--method", "rtn", "--out")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stderr": subprocess.PIPE, "text": True, "check": False} | options
    return subprocess.run([sys.executable, "-m", "bitwright", *arguments], **options)


@needs_full
@pytest.mark.parametrize(("unbuffered", "arguments"), BUFFERED)
def test_a_full_output_is_named(unbuffered: str, arguments: tuple[str, ...]) -> None:
    with open(FULL, "w") as full:
        done = run(*arguments, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 1
    assert done.stderr.startswith(NO_ROOM), done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs_full
def test_a_full_output_is_named_after_the_work(tmp_path: Path) -> None:
    """What was to be written is there, whole, and only the report is missing."""
    with open(FULL, "w") as full:
        done = run(*QUANTIZE, str(tmp_path / "full"), stdout=full)
    assert done.returncode == 1
    assert NO_ROOM in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    bitwright.load_model(tmp_path / "full")


@pytest.mark.slow
@needs_full
def test_a_full_error_output_ends_nothing(tmp_path: Path) -> None:
    """Progress bars, plans and warnings have no place, the work is done; an error still has its code."""
    with open(FULL, "w") as full:
        done = run(*QUANTIZE, str(tmp_path / "out"), stdout=subprocess.PIPE, stderr=full)
        assert (done.returncode, "worst layers" in done.stdout) == (0, True)
        evaluate = ("evaluate", DEMO, "--evaluation", f"{DEMO}/evaluation.txt", "--samples", "2")
        done = run(*evaluate, "--length", "32", "--json", stdout=subprocess.PIPE, stderr=full)
        assert done.returncode == 0
        assert json.loads(done.stdout)["tokens"] == 64
        assert run("inspect", "nowhere", stderr=full).returncode == 1
        assert run("inspect", DEMO, stdout=full, stderr=full).returncode == 1


@pytest.mark.parametrize(("unbuffered", "arguments"), BUFFERED)
def test_a_pipe_that_nobody_reads(unbuffered: str, arguments: tuple[str, ...]) -> None:
    """As of ``bitwright … | true``: no word, and the code that shells know of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*arguments, stdout=writing, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_pipes_that_nobody_reads_do_not_end_the_work(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*QUANTIZE, str(tmp_path / "out"), stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 141
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    bitwright.load_model(tmp_path / "out")


@pytest.mark.slow
def test_closed_streams_take_no_file(tmp_path: Path) -> None:
    """Their numbers are not given to the next file, into which messages would go."""
    outputs = []
    for closed in ("", ">&- 2>&-", "<&- >&- 2>&-"):
        folder = tmp_path / str(len(outputs))
        folder.mkdir()
        command = [sys.executable, "-m", "bitwright", *QUANTIZE, "out"]
        script = f'"$@" {closed}'
        subprocess.run(
            ["sh", "-c", script, "sh", *command], cwd=folder, check=True, capture_output=True
        )
        outputs.append({path.name: path.read_bytes() for path in (folder / "out").iterdir()})
    assert outputs[0] == outputs[1] == outputs[2]
