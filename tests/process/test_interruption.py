"""Ctrl-C and SIGTERM at each moment of the command: one line, the exit code that shells have for it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bitwright
from bitwright.process.startup import is_command

DEMO = bitwright.demo_folder()
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
STARTED = ("interrupted; nothing was written\n", 130)
# Sends itself a signal when a module is about to be imported, as another process would at that moment.
SITE = """
import os, signal, sys
at, number = os.environ["AT"], int(os.environ["NUMBER"])
def hook(event, arguments):
    global at
    if event == "import" and arguments[0] == at:
        at = None
        os.kill(os.getpid(), number)
sys.addaudithook(hook)
"""
# As pip writes it.
SCRIPT = """
import re
import sys
from bitwright.cli.main import main
if __name__ == "__main__":
    sys.argv[0] = re.sub(r"(-script\\.pyw|\\.exe)?$", "", sys.argv[0])
    sys.exit(main())
"""
# Is busy until it is interrupted, and then with its clean-up for so many seconds.
SLOW = """
import sys, time
import bitwright.cli.main, bitwright.blocks.hidden_states
from bitwright.checkpoint import work_folder
seconds, remove = float(sys.argv.pop(1)), work_folder.remove_tree
def slowly(folder):
    print("cleaning up", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    remove(folder)
def busy(*arguments):
    work_folder.remove_tree = slowly
    print("busy", flush=True)
    time.sleep(60)
bitwright.blocks.hidden_states.States = busy
bitwright.cli.main.main()
"""
# Is done, but does not end.
LATE = """
import atexit, sys, time
import bitwright.cli.main
def late():
    print("done", flush=True)
    time.sleep(60)
atexit.register(late)
bitwright.cli.main.main()
"""


def program(kind: str, folder: Path) -> list[str]:
    if kind == "module":
        return [sys.executable, "-m", "bitwright"]
    script = folder / "bitwright"
    script.write_text(SCRIPT)
    return [sys.executable, str(script)]


def interrupted_at(
    module: str, number: int, folder: Path, *start: str
) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*start, "quantize", str(DEMO), "--out", str(folder / "out"), "--method", "rtn"],
        capture_output=True,
        text=True,
        env=os.environ | {"AT": module, "NUMBER": str(int(number)), "PYTHONPATH": path},
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("module", "importlib.metadata"),
        ("script", "numpy"),
        ("module", "numpy._core._multiarray_umath"),  # whose errors NumPy words anew
        ("module", "bitwright._kernels"),
        ("script", "tokenizers"),
        ("module", "safetensors"),
        ("script", "click"),
        ("script", "bitwright.distill.student"),
    ],
)
def test_while_modules_are_imported(kind: str, module: str, tmp_path: Path) -> None:
    number = signal.SIGTERM if module == "click" else signal.SIGINT
    done = interrupted_at(module, number, tmp_path, *program(kind, tmp_path))
    expected = STARTED if number == signal.SIGINT else ("terminated; nothing was written\n", 143)
    assert (done.stderr, done.returncode) == expected
    assert done.stdout == ""


def caught(process: int) -> int:
    """Return the signals that a process has handlers for, as bits."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc")
@pytest.mark.parametrize("kind", ["module", "script"])
def test_at_random_moments(kind: str, tmp_path: Path) -> None:
    """From the first moment on that is ours to the end, whatever is going on."""
    source = random.Random(kind)
    codes = []
    for _ in range(4):
        process = subprocess.Popen(
            [*program(kind, tmp_path), "inspect", str(DEMO)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not caught(process.pid) >> (signal.SIGTERM - 1) & 1:  # Python itself only has SIGINT
            assert process.poll() is None
        time.sleep(source.uniform(0, 1))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        codes.append(process.returncode)
        assert (said, process.returncode) in (STARTED, ("", 0))
    assert set(codes) <= {0, 130}


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("patient", [True, False])
def test_once_more_during_clean_up(patient: bool, tmp_path: Path) -> None:
    """Who asks twice at once, as a terminal and mpiexec do, gets a clean end; who asks again, an end."""
    run = (
        "quantize",
        str(DEMO),
        "--out",
        str(tmp_path / "out"),
        "--samples",
        "4",
        "--length",
        "64",
    )
    run = (*run, "--calibration", str(DEMO / "calibration.txt"))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "0.2" if patient else "60", *run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert line_of(process) == "busy"
    process.send_signal(signal.SIGINT)
    assert line_of(process) == "cleaning up"
    time.sleep(0 if patient else 1.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    *plan, last = said.splitlines()
    assert all(line.startswith(("plan: ", "quantizing ")) for line in plan if line), said
    if patient:
        assert last == "interrupted; nothing was written"
        assert list(tmp_path.iterdir()) == []
        return
    assert last.startswith("interrupted; what is left of this run is found by the next one")
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    done = subprocess.run([sys.executable, "-m", "bitwright", *run], check=False)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("model", "code"), [(str(DEMO), 0), ("nowhere", 1)])
def test_after_the_end(model: str, code: int) -> None:
    """What is done is done."""
    process = subprocess.Popen(
        [sys.executable, "-c", LATE, "inspect", model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "done\n":
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in said
    assert len(said.splitlines()) == code


@pytest.mark.slow
def test_in_the_background_of_a_shell() -> None:
    """Which lets its jobs ignore Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitwright", "inspect", str(DEMO)],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")
@pytest.mark.parametrize("module", ["numpy", "bitwright.cli.main", "mpi4py"])
def test_ranks_that_start(module: str, tmp_path: Path) -> None:
    """One of them says it."""
    pytest.importorskip("mpi4py")
    start = (str(MPIEXEC), "-n", "2", sys.executable, "-m", "bitwright")
    done = interrupted_at(module, signal.SIGINT, tmp_path, *start)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.count("interrupted; nothing was written") == 1
    assert not (tmp_path / "out").exists()


def test_programs_keep_their_signals() -> None:
    """What imports bitwright as a library is asked by Ctrl-C as ever."""
    program = """
import signal, sys
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
import bitwright
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("arguments", "words", "expected"),
    [
        (["/usr/bin/bitwright", "info"], ["python", "/usr/bin/bitwright", "info"], True),
        (["-m", "info"], ["python", "-X", "dev", "-m", "bitwright", "info"], True),
        (["-m"], ["python", "-mbitwright"], True),
        (["-m", "bitwright"], ["python", "-m", "mytool", "bitwright"], False),
        (["-m"], ["python", "-m", "mybitwright"], False),
        (["-m"], ["python", "-m", "bitwright.report.format_table"], False),
        (["-c"], ["python", "-c", "import bitwright"], False),
        (["my_bitwright"], ["python", "my_bitwright"], False),
        (["-m", "a", "b"], [], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_which_program_is_the_command(
    arguments: list[str], words: list[str], expected: bool
) -> None:
    assert is_command(arguments, words) is expected
