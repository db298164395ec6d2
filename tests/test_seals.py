"""What a run goes on from, and what it reads, is what it was; anything else is named, and not used."""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitwright
import bitwright.dwq
import bitwright.sensitivity
from bitwright.checkpoint.seals import Seals, files_of
from bitwright.checkpoint.work_folder import LOCK
from bitwright.errors import BitwrightError, CheckpointError
from bitwright.journal import Journal

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
FEW: dict[str, Any] = {"length": 32, "samples": 12, "progress": False}
TRIALS = 10


def quantize(method: str, bits: int = 3, **options: Any) -> Callable[[Path, Path], object]:
    def run(model: Path, out: Path) -> object:
        return bitwright.quantize(model, out, method, bits, 32, calibration=TEXT, **FEW, **options)

    return run


def sensitivities(model: Path, out: Path) -> object:
    options: dict[str, Any] = {"length": 32, "samples": 12, "batch_size": 2, "progress": False}
    return bitwright.estimate_sensitivities(model, TEXT, out=out, **options)


def dwq(model: Path, out: Path) -> object:
    return bitwright.dwq_quantize(
        model,
        lambda place: bitwright.quantize(model, place, "rtn", 3, 32, progress=False),
        out,
        TEXT,
        length=32,
        tokens=640,
        batch_size=2,
        checkpoint_every=2,
        validate_every=4,
        k=32,
        progress=False,
        made_with={},
    )


def collect(model: Path, out: Path) -> object:
    return bitwright.collect_statistics(model, out, TEXT, **FEW)


def activations(model: Path, out: Path) -> object:
    return bitwright.collect_activations(model, out, TEXT, length=32, samples=8)


# A step of each command after which its work folder holds something, and how often it is made before.
COMMITS = (Journal, "commit", 2)
COMMANDS: dict[str, tuple[Callable[[Path, Path], object], tuple[type, str, int]]] = {
    "gptq": (quantize("gptq"), COMMITS),
    "awq": (quantize("awq", format="gptq"), COMMITS),
    "gguf": (quantize("gptq", bits=4, format="gguf"), COMMITS),
    "small files": (quantize("gptq", preset="fast"), COMMITS),
    "statistics": (collect, COMMITS),
    "activations": (activations, COMMITS),
    "sensitivities": (sensitivities, (bitwright.sensitivity._Estimate, "_batch", 3)),
    "dwq": (dwq, (bitwright.dwq._Run, "_save", 2)),
}


def after(
    monkeypatch: pytest.MonkeyPatch, step: tuple[type, str, int], do: Callable[[], None]
) -> None:
    """Let something happen when a step has been made so often."""
    kind, name, times = step
    original, made = getattr(kind, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        made[0] += 1
        if made[0] == times:
            do()
        return result

    monkeypatch.setattr(kind, name, counted)


def content(place: Path) -> dict[str, bytes]:
    if place.is_file():
        return {"": place.read_bytes()}
    return {path.name: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def interrupt() -> None:
    raise KeyboardInterrupt


def refusal(run: Callable[[Path, Path], object], out: Path) -> str:
    """Return why a command did not go on, nothing if it did."""
    try:
        run(DEMO, out)
    except BitwrightError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", COMMANDS)
def test_changed_work_files_are_named_or_do_not_matter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = COMMANDS[name]
    if name == "small files":
        monkeypatch.setattr(bitwright.checkpoint.writer, "SHARD_BYTES", 40_000)
    run(DEMO, tmp_path / "whole" / "out")
    wanted = content(tmp_path / "whole" / "out")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        after(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(DEMO, out)
    work, kept = tmp_path / ".out.work", tmp_path / "kept"
    shutil.copytree(work, kept)
    files = [path.relative_to(kept) for path in files_of(kept) if path.name != LOCK]
    rng = random.Random(name)
    refused = 0
    for trial in range(TRIALS):
        # Every file once, then any.
        file = files[trial] if trial < len(files) else rng.choice(files)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(kept, work)
        changed = bytearray((work / file).read_bytes())
        if not changed:
            continue
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        (work / file).write_bytes(changed)
        error = refusal(run, out)
        if error:
            assert str(work / file) in error or file.name == "targets.json", (
                file
            )  # its folder is named
            refused += 1
            continue
        assert content(out) == wanted, file
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    # Damaged batches of sensitivities are looked at again, which costs less than starting over.
    assert refused or name == "sensitivities"


def weights(model: Path) -> Path:
    path = model / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    return path


def tokenizer(model: Path) -> Path:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"', "'", 2))
    return path


def other_file(model: Path) -> Path:
    path = model / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    (model / "new").write_bytes(changed)
    (model / "new").rename(path)
    return path


CHANGES = (weights, tokenizer, other_file)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["gptq", "awq", "statistics", "activations", "sensitivities", "dwq"]
)
def test_models_that_change_meanwhile_are_named(
    name: str, change: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (kind, step, _) = COMMANDS[name]
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    with monkeypatch.context() as patch:
        changed: list[Path] = []
        after(patch, (kind, step, 1), lambda: changed.append(change(model)))
        with pytest.raises(CheckpointError, match="while it was read") as caught:
            run(model, tmp_path / "out")
    assert str(changed[0]) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_change_while_they_are_evaluated_are_named(
    change: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    changed: list[Path] = []

    def on_progress(share: float) -> None:
        if not changed:
            changed.append(change(model))

    with pytest.raises(CheckpointError, match="while it was read") as caught:
        bitwright.evaluate(DEMO, TEXT, reference=model, samples=2, on_progress=on_progress)
    assert str(changed[0]) in str(caught.value)


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_change_while_they_are_converted_are_named(
    change: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    bitwright.quantize(DEMO, model, "rtn", 4, 32, progress=False)
    converting = sys.modules["bitwright.convert"]  # the package has a function of that name
    original = converting.copy_side_files

    def copy(*arguments: Any) -> Any:
        found = original(*arguments)
        change(model)
        return found

    monkeypatch.setattr(converting, "copy_side_files", copy)
    with pytest.raises(CheckpointError, match="while it was read"):
        bitwright.convert(model, tmp_path / "out", "float", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gptq", "statistics", "sensitivities"])
def test_files_that_are_only_touched_end_no_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (kind, step, _) = COMMANDS[name]
    model, path = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    shutil.copytree(DEMO, model)
    run(DEMO, tmp_path / "whole")

    def copied_over_itself() -> None:
        shutil.copy(path, model / "new")
        (model / "new").rename(path)

    with monkeypatch.context() as patch:
        after(patch, (kind, step, 1), copied_over_itself)
        with pytest.warns(bitwright.BitwrightWarning, match=r"model\.safetensors: was touched"):
            run(model, tmp_path / "out")
    found, wanted = content(tmp_path / "out"), content(tmp_path / "whole")
    for each in (found, wanted):
        each.pop("README.md", None)  # which names the model
    assert found == wanted


def test_statistics_that_change_meanwhile_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(DEMO, tmp_path / "known")
    path = sorted((tmp_path / "known").glob("*.safetensors"))[-1]

    def change() -> None:
        changed = bytearray(path.read_bytes())
        changed[-1] ^= 1
        path.write_bytes(changed)

    with monkeypatch.context() as patch:
        after(patch, (Journal, "commit", 1), change)
        with pytest.raises(CheckpointError, match="while it was read") as caught:
            bitwright.quantize(
                DEMO, tmp_path / "out", "gptq", 3, 32, statistics=tmp_path / "known", progress=False
            )
    assert str(path) in str(caught.value)


def test_seals_go_on_where_files_have_grown(tmp_path: Path) -> None:
    path, seals = tmp_path / "data", Seals(tmp_path)
    for size in (10, 70_000, 70_000, 200_000):
        path.write_bytes(bytes(range(250)) * 800)
        os.truncate(path, max(size, 1))
        assert seals.of({path: size}) == Seals(tmp_path).of({path: size})
    found = seals.of({path: 150_000})  # less than before
    assert found == Seals(tmp_path).of({path: 150_000})
    assert Seals(tmp_path).broken(found) is None
    os.truncate(path, 149_999)
    assert Seals(tmp_path).broken(found) == path


@pytest.mark.parametrize("added", [b"\0", b"more than there was"])
def test_students_that_have_grown_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: bytes
) -> None:
    """Files that a run has not written to the end may have more; these are whole, and all are used."""
    run, step = COMMANDS["dwq"]
    with monkeypatch.context() as patch:
        after(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(DEMO, tmp_path / "out")
    files = [path for path in files_of(tmp_path / ".out.work") if path.parent.name == "student"]
    assert len(files) > 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole + added)
        assert f"{path}: was changed since it was written" in refusal(run, tmp_path / "out")
        path.write_bytes(whole)
    assert refusal(run, tmp_path / "out") == ""
