"""What README.md and docs/ promise: each has a test, and tests that belong nowhere else are here."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright
from bitwright import _processor
from bitwright.runs.journal import Journal

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "operations.md"
DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
LEVELS = [
    level
    for level in range(2, _processor.x86_64_level() + 1)
    if any(Path(bitwright.__file__).parent.glob(f"_kernels_x86_64_v{level}.*"))
]


def rows() -> list[list[str]]:
    """Return the cells of the table of promises."""
    table = PAGE.read_text().split("<!-- promises -->")[1].split("<!-- end -->")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [each for each in cells if each[0] not in ("promise", "---")]


def test_every_promise_names_a_test_that_is_there() -> None:
    assert len(rows()) > 80
    for row in rows():
        assert len(row) == 3, row
        promise, said, tests = row
        assert promise, row
        for page in said.split(", "):
            assert (TESTS.parent / page).is_file() or (PAGE.parent / page).is_file(), row
        named = re.findall(r"`(\w+/test_\w+\.py)::(\w+)`", tests)
        assert named, row
        assert len(named) == tests.count("`") // 2, f"not all of this are tests: {tests}"
        for file, name in named:
            assert f"def {name}(" in (TESTS / file).read_text(), f"{file}::{name}"


def test_promises_are_told_once() -> None:
    promises = [row[0] for row in rows()]
    assert len(promises) == len(set(promises))


def run(program: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.memory
def test_kernels_take_arrays_without_copies() -> None:
    program = """
import numpy as np
import bitwright
from bitwright.process.memory import peak_memory_bytes
bitwright.set_num_threads(1)
def work(rows):
    inputs = np.ones((rows, 64), np.float32)
    before = peak_memory_bytes()
    bitwright.gram(inputs)
    weight = inputs[:, :64]
    if rows > 64:
        bitwright.LayerStatistics(64).add(inputs)
    return inputs.nbytes, peak_memory_bytes() - before
work(64)
print(*work(1_000_000))
"""
    size, grown = map(int, run(program).split())
    assert size == 256_000_000
    assert grown < size / 8


def test_nothing_needs_torch_or_a_network(tmp_path: Path) -> None:
    """Neither is there: imports of the one fail, and so does every connection."""
    program = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise SystemExit(f"{event}: {arguments}")
sys.addaudithook(refuse)
for name in ("torch", "transformers", "requests", "mpi4py", "matplotlib"):
    sys.modules[name] = None
import bitwright
out, demo = sys.argv[1:]
text = f"{demo}/calibration.txt"
options = {"samples": 4, "length": 32}
bitwright.quantize(demo, f"{out}/q", calibration=text, progress=False, **options)
bitwright.evaluate(f"{out}/q", text, reference=demo, **options)
bitwright.convert(f"{out}/q", f"{out}/g", "gguf", allow_requantize=True, progress=False)
"""
    run(program, tmp_path, DEMO)
    assert {path.name for path in tmp_path.iterdir()} == {"q", "g"}


def test_what_a_state_names_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut takes what was not synchronized: nothing that a committed state, or an output that is
    moved to its place, counts on may have been written since."""
    safe: dict[int, tuple[int, int]] = {}
    fsync, commit, rename = os.fsync, Journal.commit, os.rename
    checked: list[str] = []

    def synchronized(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        safe[found.st_ino] = (found.st_mtime_ns, found.st_size)

    def check(path: Path) -> None:
        found = path.stat()
        assert safe.get(found.st_ino) == (found.st_mtime_ns, found.st_size), path
        checked.append(path.name)

    def committed(journal: Journal, *arguments: Any) -> None:
        commit(journal, *arguments)
        work = journal.scratch.parent
        state = json.loads((work / "state.json").read_text())["state"]
        for name in ("state.json", *state["states"].values()):
            check(work / name)
        for path in work.glob("data.*"):
            check(path)

    def moved(folder: Path, target: Path) -> Path:
        if folder.name == "output" or (folder.parent.name == ".out.work" and folder.is_dir()):
            for path in folder.iterdir():
                check(path)
            check(folder)
        rename(folder, target)
        return Path(target)

    monkeypatch.setattr(os, "fsync", synchronized)
    monkeypatch.setattr(Journal, "commit", committed)
    monkeypatch.setattr(Path, "rename", moved)
    bitwright.quantize(
        DEMO, tmp_path / "out", calibration=TEXT, samples=4, length=64, memory=None, progress=False
    )
    assert {"state.json", "hidden-1", "data.0"} <= set(checked)
    assert {"config.json", "model.safetensors"} <= set(checked)


def test_presets_that_need_no_choice_store_as_many_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": TEXT, "samples": 4, "length": 64, "progress": False}
    for format in ("mlx", "gptq", "gguf"):
        sizes = {
            preset: bitwright.quantize(
                DEMO, tmp_path / f"{format}-{preset}", format=format, preset=preset, **options
            ).size_bytes
            for preset in ("fast", "default", "high")
        }
        assert len(set(sizes.values())) == 1


def test_statistics_take_the_room_that_is_said(tmp_path: Path) -> None:
    """4 · in² bytes for each group of layers with one input, and headers."""
    found = bitwright.collect_statistics(
        DEMO, tmp_path / "s", TEXT, samples=4, length=64, progress=False
    )
    channels = [stage.channels for stage in found.stages.values()]
    said = sum(4 * count * count for count in channels)
    there = sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert said <= there <= said + sum(8 * count + 500 for count in channels) + 5_000


def test_a_run_says_first_what_it_takes(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "bitwright",
                "quantize",
                str(DEMO),
                "--out",
                str(tmp_path / "q"),
            ),
            *("--calibration", str(TEXT), "--samples", "4", "--length", "64"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    first = done.stderr.splitlines()[0]
    told = re.fullmatch(
        r"plan: about ([\d.]+) ([GM])B of memory \(budget [\d.]+ GB\), [\d.]+ [GMk]B of disk, "
        r"\d+ min \d+ s; writes [\d.]+ [GMk]B",
        first,
    )
    assert told, first
    assert 0.02 < float(told[1]) * {"G": 1, "M": 1e-3}[told[2]] < 1


@pytest.mark.slow
@pytest.mark.skipif(len(LEVELS) < 2, reason="one build of the kernels is installed")
def test_weights_have_the_same_bits_on_every_processor() -> None:
    """Rounding and decoding, by each build that this processor runs."""
    program = """
import hashlib, sys, types
processor = types.ModuleType("bitwright._processor")
processor.x86_64_level = lambda: int(sys.argv[1])
sys.modules["bitwright._processor"] = processor
import numpy as np
import bitwright
source = np.random.default_rng(0)
known = hashlib.sha256()
for grid in ("affine", "zero_point", "symmetric"):
    for bits, size in ((2, 32), (3, 64), (4, 128), (8, 32)):
        weight = (source.standard_normal((96, 256)) * 10.0 ** source.integers(-6, 4, (96, 1)))
        tensor = bitwright.quantize_rtn(weight.astype(np.float32), bits, size, grid=grid)
        for array in (tensor.codes, tensor.scales, tensor.dequantize()):
            known.update(np.ascontiguousarray(array).tobytes())
print(bitwright.build_info().instruction_set, known.hexdigest())
"""
    told = [run(program, level).split() for level in LEVELS]
    assert len({name for name, _ in told}) > 1
    assert len({digest for _, digest in told}) == 1


def test_a_smaller_budget_changes_no_bytes(tmp_path: Path) -> None:
    """Though most of the states then go to files."""
    ids = np.random.default_rng(0).integers(0, 512, (24, 128))
    options: dict[str, Any] = {"calibration": ids, "preset": "fast", "progress": False}
    with pytest.raises(bitwright.MemoryBudgetError) as caught:
        bitwright.quantize(DEMO, tmp_path / "none", memory=1e-3, **options)
    found = re.search(r"--memory ([\d.]+)", str(caught.value))
    assert found
    bitwright.quantize(DEMO, tmp_path / "a", memory=float(found[1]) + 0.01, **options)
    bitwright.quantize(DEMO, tmp_path / "b", memory=4, **options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    """It is carried along."""
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "own.Config"}
    (model / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("modeling_own.py", "own.py", "conftest.py", "sitecustomize.py", "numpy.py"):
        (model / name).write_text(code)
    command = [sys.executable, "-m", "bitwright"]
    text = ("--samples", "4", "--length", "32")
    for arguments in (
        ("quantize", str(model), "--out", "q", "--calibration", str(TEXT), *text),
        ("convert", "q", "--out", "f", "--format", "float"),
    ):
        subprocess.run([*command, *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert not ran.exists()
    for name in ("q", "f"):
        assert (tmp_path / name / "modeling_own.py").read_text() == code
