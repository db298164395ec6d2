"""Kills before every kind of event, as a sample of what kill_at_events.py does with every command."""

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import file_system_events
import numpy as np
import pytest
from file_system_events import KILL
from safetensors.numpy import save_file
from shared_data import TESTS

PROBLEM = file_system_events.missing()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
SEED = 18


def change_files() -> int:
    """Change files in all ways that anything here does, by Python, C, Rust, threads and other processes."""
    with open("a", "wb") as file:
        np.arange(3.0).tofile(file)
        os.fsync(file.fileno())
        os.truncate("a", 8)
    os.mkdir("folder")
    os.rename("a", "folder/b")
    os.link("folder/b", "c")
    os.symlink("c", "link")
    folder = os.open("folder", os.O_RDONLY)  # is not changed by that
    os.unlink("b", dir_fd=folder)
    os.rmdir("folder")
    thread = threading.Thread(target=Path("d").touch)
    thread.start()
    thread.join()
    subprocess.run(["cp", "c", "e"], check=True)
    save_file({"x": np.ones(3, np.float32)}, "f")
    Path("d").read_bytes()
    for what in lambda: os.write(1 << 20, b""), lambda: os.mkdir(b"no/folder"):
        with suppress(OSError):
            what()
    return 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(os.path.realpath(tmp_path))


def test_every_change_is_an_event(folder: Path) -> None:
    status, events = file_system_events.run(change_files, folder)
    assert status == 3
    wanted = [
        ("open", "a"),
        ("write", "a"),
        ("fsync", "a"),
        ("truncate", "a"),
        ("mkdir", "folder"),
        ("rename", "a", "folder/b"),
        ("link", "folder/b", "c"),
        ("symlink", "link"),
        ("unlink", "folder/b"),
        ("rmdir", "folder"),
        ("open", "d"),
        ("open", "e"),
        ("copy", "e"),
    ]
    found = [(call_name(event.call, event.paths), *event.paths) for event in events]
    assert list(dict.fromkeys(each for each in found if each in wanted)) == wanted
    assert found[-2][0] == "rename"  # of what safetensors has written
    assert found[-2][-1] == "f"


def call_name(call: str, paths: tuple[str, ...]) -> str:
    """Return one name for calls of the same use; cp copies by one or the other."""
    if call in file_system_events.WRITES:
        return "copy" if paths == ("e",) else "write"
    return next(
        (name for name in ("rmdir", "mkdir", "open", "rename", "unlink", "symlink", "link", "fsync")
         if call.startswith(name)),
        call,
    )  # fmt: skip


@pytest.mark.parametrize("last", [0, 3, 5, 8, 11, 14])
def test_the_event_of_a_kill_does_not_happen(folder: Path, last: int) -> None:
    changes = (
        lambda: Path("a").write_bytes(b"one"),
        lambda: Path("a").write_bytes(b"twice"),
        lambda: os.mkdir("folder"),
        lambda: os.rename("a", "b"),
        lambda: subprocess.run(["mv", "b", "folder/b"], check=True),
        lambda: os.truncate("folder/b", 1),
        lambda: os.unlink("folder/b"),
        lambda: os.rmdir("folder"),
    )

    def change() -> int:
        for each in changes:
            each()
        return 0

    everything = file_system_events.run(change, folder)[1]
    last %= len(everything)
    status, events = file_system_events.run(
        change, folder, lambda number, event: KILL if number == last else 0
    )
    assert status == -signal.SIGKILL
    assert events == everything[: last + 1]
    event = events[-1]
    if event.call in file_system_events.WRITES:
        assert (folder / event.paths[0]).read_bytes() == b""
    elif event.call.startswith(("mkdir", "rename")):
        assert not (folder / event.paths[-1]).exists()
    elif event.call.startswith(("unlink", "rmdir", "truncate")):
        assert (folder / event.paths[0]).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_events_can_end_with_an_error(folder: Path, number: int) -> None:
    def change() -> int:
        os.mkdir("folder")
        try:
            Path("a").write_bytes(b"one")
        except OSError as error:
            return error.errno or 0
        return 0

    status, events = file_system_events.run(
        change, folder, lambda found, event: number if event.call == "write" else 0
    )
    assert status == number
    assert Path("a").read_bytes() == b""
    assert len(events) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands",
    [
        ["quantize gptq", "quantize to GGUF files", "quantize in files", "convert again"],
        ["quantize again", "quantize in place again"],
        ["quantize resumed", "quantize best", "refine"],
        ["statistics resumed", "statistics merge"],
        ["dwq targets", "dwq made", "dwq plot"],
        ["salient", "salient dry", "salient again"],
        ["dynamic files", "dynamic again", "sensitivities plot"],
    ],
    ids=lambda commands: commands[0],
)
def test_killed_commands_go_on(commands: list[str]) -> None:
    check(commands)


@pytest.mark.slow
def test_commands_go_on_after_errors_of_the_disk() -> None:
    check(["quantize again", "dwq again", "statistics merge"], "--errors")


def check(commands: list[str], *options: str) -> None:
    program = [sys.executable, str(TESTS / "kill_at_events.py"), "--sample", str(SEED), *options]
    done = subprocess.run([*program, *commands], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]
    assert rows == commands
