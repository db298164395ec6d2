"""What may go wrong while a run is under way: each ends in an error that says so, and nothing is lost."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told import TOLD

import bitwright
from bitwright.checkpoint import CheckpointWriter
from bitwright.checkpoint.writer import write_safetensors
from bitwright.runs.journal import Journal

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
OPTIONS = ("--calibration", str(TEXT), "--samples", "32", "--length", "128", "--threads", "1")


def command(out: Path, *more: str, model: Path = DEMO) -> list[str]:
    start = [sys.executable, "-m", "bitwright", "quantize", str(model)]
    return [*start, "--out", str(out), *OPTIONS, *more]


def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=False, **options)


def quantize(out: Path, model: Path = DEMO, **options: Any) -> None:
    """As the command does."""
    settings = {"calibration": TEXT, "samples": 32, "length": 128, "threads": 1, "progress": False}
    bitwright.quantize(model, out, **(settings | options))


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint but for its card, which names the command."""
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in TOLD
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    threads = bitwright.build_info().threads
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(out)
    yield content(out)
    bitwright.set_num_threads(threads)


def after_block(
    monkeypatch: pytest.MonkeyPatch, blocks: int, act: Callable[[], None]
) -> Callable[[], None]:
    """Let something happen when so many blocks have been committed; return what takes that back."""
    commit = Journal.commit

    def committed(journal: Journal, done: int, *rest: Any) -> None:
        commit(journal, done, *rest)
        if done == blocks:
            act()

    monkeypatch.setattr(Journal, "commit", committed)
    return lambda: monkeypatch.setattr(Journal, "commit", commit)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruptions(tmp_path: Path, number: int, undisturbed: dict[str, bytes]) -> None:
    """By Ctrl-C, or by whoever shuts the machine down."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".out.work/state.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if not out.exists():  # or else it was too late
        assert process.returncode in (130, 143)
        assert f"the same call resumes from what is done, in {tmp_path}/.out.work" in said
        assert run(command(out)).returncode == 0
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(place)])
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    run(["umount", "--lazy", str(place)])


@pytest.mark.slow
def test_disks_without_room(
    small_disk: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """What is there before stays, and what is done is gone on from when there is room."""
    out = small_disk / "out"
    quantize(out, method="rtn", bits=2, calibration=None, samples=None, length=None)
    old = content(out)
    room = shutil.disk_usage(small_disk).free - (1 << 16)
    (small_disk / "ballast").write_bytes(bytes(max(0, room)))
    full = run(command(out, "--overwrite"))
    assert full.returncode == 1, full.stderr
    assert "No space left on device" in full.stderr or "of the disk are free" in full.stderr
    assert "Traceback" not in full.stderr
    assert content(out) == old
    (small_disk / "ballast").unlink()
    assert run(["mount", "-o", "remount,size=64m", str(small_disk)]).returncode == 0
    done = run(command(out, "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert content(out) == undisturbed
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_disk_that_fills_up_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill() -> None:
        monkeypatch.setattr("bitwright.checkpoint.writer.open", full, raising=False)

    back = after_block(monkeypatch, 2, fill)
    with pytest.raises(bitwright.OutputError, match="No space left.* the same call resumes"):
        quantize(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    back()
    monkeypatch.delattr("bitwright.checkpoint.writer.open")
    quantize(tmp_path / "out")
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    done = run(command(tmp_path / "closed/out"))
    assert done.returncode == 1
    assert "closed/out: cannot be written: Permission denied" in done.stderr


def test_file_systems_that_may_not_be_written() -> None:
    done = run(command(Path("/proc/out")))
    assert done.returncode == 1
    assert "/proc/out: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in many weight files."""
    folder = tmp_path_factory.mktemp("shards") / "model"
    source = bitwright.Checkpoint(DEMO)
    with CheckpointWriter(folder, shard_bytes=50_000, metadata={"format": "pt"}) as writer:
        for name in source.names():
            writer.add(name, source.read(name))
        writer.write_json("config.json", source.config)
        for path in DEMO.glob("tokenizer*"):
            writer.add_file(path)
    return folder


@pytest.mark.parametrize("truncated", [True, False])
def test_weight_files_that_disappear(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, truncated: bool
) -> None:
    """One that is cut short is named; one that is removed is still there for a run that has opened it."""
    model = Path(shutil.copytree(shards, tmp_path / "model"))
    quantize(tmp_path / "known", model)
    name = "model.layers.2.mlp.down_proj.weight"
    file = bitwright.Checkpoint(model).file(name)
    whole = file.read_bytes()

    def harm() -> None:
        if truncated:
            os.truncate(file, 100)
        else:
            file.unlink()

    back = after_block(monkeypatch, 1, harm)
    out = tmp_path / "out"
    if truncated:
        with pytest.raises(bitwright.CheckpointError, match=f"{file.name}.* the same call resumes"):
            quantize(out, model)
        assert not out.exists()
    else:
        quantize(out, model)
    back()
    file.write_bytes(whole)
    if truncated:
        quantize(out, model)
    assert content(out) == content(tmp_path / "known")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "known", "out"}


@pytest.mark.memory
@pytest.mark.parametrize("megabytes", [200, 1200])
def test_limited_addresses(tmp_path: Path, megabytes: int, undisturbed: dict[str, bytes]) -> None:
    """By ulimit -v: refused before it begins, with what would be enough, or within it to the end."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20,) * 2)

    done = run(command(tmp_path / "out"), preexec_fn=limit)
    if done.returncode == 0:
        assert content(tmp_path / "out") == undisturbed
        return
    assert megabytes == 200
    assert (
        "emory" in done.stderr or "Cannot allocate" in done.stderr or "map segment" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_runs_on_one_output(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (
        not (tmp_path / ".out.work/lock").exists() or not (tmp_path / ".out.work/scratch").exists()
    ):
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(bitwright.OutputError, match=f"process {first.pid}. is writing it"):
        quantize(out)
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 0
    assert content(out) == undisturbed


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_file_systems_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(bitwright.OutputError, match=f"cannot be written: {os.strerror(number)}"):
        quantize(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bits": 3}, r"bits \(was 4, is 3\)"),
        ({"samples": 31}, "calibration"),
        ({"damping": 0.02}, r"damping \(was 0.05, is 0.02\)"),
        ({"exclude": ["*.0.*"]}, "precision of layers"),
        ({"method": "awq"}, r"method \(was 'gptq', is 'awq'\)"),
    ],
)
def test_other_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], said: str
) -> None:
    back = after_block(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "out")
    back()
    before = content(tmp_path / ".out.work/checkpoint")
    with pytest.raises(
        bitwright.ResumeError, match=f"other options or inputs: .*{said}.*no-resume"
    ):
        quantize(tmp_path / "out", **changed)
    assert content(tmp_path / ".out.work/checkpoint") == before
    quantize(tmp_path / "out", resume=False, **changed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_model_is_refused(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(shards, tmp_path / "model"))
    back = after_block(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "out", model)
    back()
    file = bitwright.Checkpoint(model).file("model.norm.weight")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(bitwright.ResumeError, match="model .was"):
        quantize(tmp_path / "out", model)


@pytest.mark.parametrize("harm", ["state.json", "hidden", "data", "nonsense"])
def test_damaged_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, undisturbed: dict[str, bytes]
) -> None:
    back = after_block(monkeypatch, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "out")
    back()
    work = tmp_path / ".out.work"
    if harm == "nonsense":
        (work / "state.json").write_text('{"identity": {}, "state": {"blocks": "many"}}')
    else:
        start = {"state.json": "state.json", "hidden": "hidden-1", "data": "data.0"}[harm]
        os.truncate(work / start, (work / start).stat().st_size // 2)
    with pytest.raises(bitwright.BitwrightError, match=r"--no-resume|same") as caught:
        quantize(tmp_path / "out")
    assert isinstance(caught.value, bitwright.ResumeError | bitwright.OutputError)
    assert not (tmp_path / "out").exists()
    quantize(tmp_path / "out", resume=False)
    assert content(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_kept_of_what_will_fail_again(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(shards, tmp_path / "model"))
    checkpoint = bitwright.Checkpoint(model)
    name = "model.layers.2.mlp.down_proj.weight"
    file, others = checkpoint.file(name), {}
    for each in checkpoint.names():
        if checkpoint.file(each) == file:
            others[each] = checkpoint.read(each)
    others[name][0, 0] = np.nan
    file.unlink()
    write_safetensors(file, others, {"format": "pt"})
    with pytest.raises(bitwright.NonFiniteError, match=name):
        quantize(tmp_path / "out", model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
