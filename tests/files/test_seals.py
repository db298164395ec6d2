"""What a run goes on from, and what it reads, is what it was; anything else is named, and not used."""

import itertools
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from told import TOLD

import bitwright
import bitwright.distill.training
import bitwright.precision.estimate
import bitwright.presets.best
from bitwright.checkpoint.work_folder import LOCK
from bitwright.cli.main import cli
from bitwright.errors import BitwrightError, CheckpointError, ResumeError
from bitwright.files import inputs
from bitwright.files.seals import Seals, files_of
from bitwright.runs.journal import Journal

DEMO = bitwright.demo_folder()
TEXT = DEMO / "evaluation.txt"  # which is short
FEW: dict[str, Any] = {"length": 32, "samples": 12, "progress": False}
TRIALS, FEWER_TRIALS = 10, 4
SEEN = "seen.npz"  # an output of salient, which is there before the other


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


def command(name: str, *arguments: object) -> None:
    chosen = cli.get_command(None, name)
    with chosen.make_context(name, [str(each) for each in arguments]) as context:
        chosen.invoke(context)


def salient(model: Path, out: Path) -> None:
    command(
        "salient",
        *(model, "--out", out, "--calibration", TEXT),
        *("--activations", out.parent / SEEN, "--group-size", 32),
        *("--samples", 8, "--length", 32),
    )


def dynamic(model: Path, out: Path, **options: Any) -> object:
    given = {"calibration": TEXT, "sensitivity_samples": 12, **FEW} | options
    return bitwright.dynamic_quantize(model, out, 4.6, [(3, 32), (5, 32)], "gptq", **given)


STUDENT: list[Path] = []  # of the models that are refined and trained


@pytest.fixture(scope="module", autouse=True)
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "student"
    bitwright.quantize(DEMO, out, "rtn", 3, 32, progress=False)
    STUDENT[:] = [out]
    return out


def refine(model: Path, out: Path) -> object:
    return bitwright.refine_model(model, STUDENT[0], out, TEXT, **FEW)


# A step of each command after which its work folder holds something, and how often it is made before.
COMMITS = (Journal, "commit", 2)
BATCHES = (bitwright.precision.estimate._Estimate, "_batch", 3)
BLOCKS = bitwright.load_model(DEMO).config.num_hidden_layers
COMMANDS: dict[str, tuple[Callable[[Path, Path], object], tuple[type, str, int]]] = {
    "gptq": (quantize("gptq"), COMMITS),
    "awq": (quantize("awq", format="gptq"), COMMITS),
    "gguf": (quantize("gptq", bits=4, format="gguf"), COMMITS),
    "small files": (quantize("gptq", preset="fast"), COMMITS),
    "statistics": (collect, COMMITS),
    "activations": (activations, COMMITS),
    "sensitivities": (sensitivities, BATCHES),
    "dwq": (dwq, (bitwright.distill.training._Run, "_save", 2)),
    "salient collects": (salient, COMMITS),
    "salient": (salient, (Journal, "commit", BLOCKS + 2)),
    "dynamic estimates": (dynamic, BATCHES),
    "dynamic": (dynamic, COMMITS),
    "refine": (refine, COMMITS),
}
# Those that take longer, and whose stages are other commands.
STAGES = ("salient collects", "salient", "dynamic estimates", "dynamic")
NAMED = ("gptq", "awq", "statistics", "activations", "sensitivities", "dwq")
NAMED += (*STAGES, "refine")


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


def interrupted(
    monkeypatch: pytest.MonkeyPatch, name: str, model: Path, out: Path
) -> Callable[[Path, Path], object]:
    """Interrupt a command that works on `out`, and return it."""
    run, step = COMMANDS[name]
    out.parent.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        after(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, out)
    return run


def refusal(run: Callable[[Path, Path], object], out: Path) -> str:
    """Return why a command did not go on, nothing if it did."""
    try:
        run(DEMO, out)
    except BitwrightError as error:
        return str(error)
    return ""


def copy_work(source: str, place: str) -> None:
    """Copy a file of an interrupted run; its first output is known by its inode, too."""
    (os.link if source.endswith(SEEN) else shutil.copy2)(source, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_changed_work_files_are_named_or_do_not_matter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "small files":
        monkeypatch.setattr(bitwright.checkpoint.writer, "SHARD_BYTES", 40_000)
    place, kept = tmp_path / "place", tmp_path / "kept"
    (tmp_path / "whole").mkdir()
    COMMANDS[name][0](DEMO, tmp_path / "whole" / "out")
    wanted = content(tmp_path / "whole" / "out")
    run = interrupted(monkeypatch, name, DEMO, place / "out")
    place.rename(kept)
    others = (LOCK, SEEN)
    files = [path.relative_to(kept) for path in files_of(kept) if path.name not in others]
    rng = random.Random(name)
    refused, stages = 0, name in STAGES
    rng.shuffle(files)
    for trial in range(FEWER_TRIALS if stages else TRIALS):
        # Every file once, then any.
        file = files[trial] if trial < len(files) else rng.choice(files)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(kept, place, copy_function=copy_work)
        changed = bytearray((place / file).read_bytes())
        if not changed:
            continue
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        (place / file).write_bytes(changed)
        error = refusal(run, place / "out")
        if error:
            assert str(place / file) in error or file.name == "targets.json", (
                file
            )  # its folder is named
            refused += 1
            continue
        assert content(place / "out") == wanted, file
    # Damaged batches of sensitivities are looked at again, which costs less than starting over.
    assert refused or BATCHES in COMMANDS[name] or stages


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


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name in NAMED for change in CHANGES if name not in STAGES]
    + [(name, weights) for name in STAGES],
)
def test_models_that_change_meanwhile_are_named(
    name: str, change: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (kind, step, times) = COMMANDS[name]
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    with monkeypatch.context() as patch:
        changed: list[Path] = []
        after(patch, (kind, step, times - 1), lambda: changed.append(change(model)))
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
    converting = sys.modules["bitwright.tools.convert"]  # the package has a function of that name
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
        for name in TOLD:  # which name the model
            each.pop(name, None)
    assert found == wanted


def flip(path: Path, place: int = -1) -> None:
    """Change a bit of a byte of a file, in place."""
    with open(path, "r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        file.write(bytes([byte ^ 1]))


def test_statistics_that_change_meanwhile_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are still to be read; of others nothing can be made any more."""
    collect(DEMO, tmp_path / "known")
    path = sorted((tmp_path / "known").glob("block*.safetensors"))[-1]
    with monkeypatch.context() as patch:
        after(patch, (Journal, "commit", 1), lambda: flip(path))
        with pytest.raises(bitwright.StatisticsError, match="not what was written") as caught:
            bitwright.quantize(
                DEMO, tmp_path / "out", "gptq", 3, 32, statistics=tmp_path / "known", progress=False
            )
    assert str(path) in str(caught.value)


def test_activations_that_change_meanwhile_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seen.npz"
    activations(DEMO, path)
    with np.load(path) as file:
        array = file[file.files[-1]].tobytes()
    place = path.read_bytes().rindex(array) + len(array) // 2
    with monkeypatch.context() as patch:
        after(patch, (Journal, "commit", 1), lambda: flip(path, place))
        with pytest.raises(bitwright.CalibrationError, match=r"seen\.npz: array .* damaged"):
            bitwright.awq_quantize_model(DEMO, tmp_path / "out", path, 32, verbose=False)
    assert not (tmp_path / "out").exists()


def test_targets_that_change_meanwhile_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = tmp_path / "targets"

    def train() -> object:
        return bitwright.dwq_quantize(
            *(DEMO, STUDENT[0], tmp_path / "out", TEXT),
            **{"targets": targets, "length": 32, "tokens": 640, "k": 32, "batch_size": 2},
            **{"checkpoint_every": 2, "progress": False},
        )

    def change() -> None:
        flip(next(targets.glob("*.safetensors")))

    after(monkeypatch, (bitwright.distill.training._Run, "_step", 1), change)
    with pytest.raises(CheckpointError, match=r"targets-00001\.safetensors: was changed"):
        train()
    assert not (tmp_path / "out").exists()


# What a fingerprint of a model does not look at, where a file is larger than what it looks at.
PIECE, PIECES = 1 << 16, 64


def large_model(folder: Path) -> Path:
    """Copy the demo's model, and make its weight file longer than the pieces of a fingerprint."""
    shutil.copytree(DEMO, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["unused"] = np.zeros(3 * PIECE * PIECES, np.uint8)
    save_file(tensors, path, {"format": "pt"})
    return path


def change_unseen(path: Path) -> None:
    """Change a byte between the pieces, and make the file as old as it was."""
    before, size = path.stat(), path.stat().st_size
    starts = [(size - PIECE) * piece // (PIECES - 1) for piece in range(PIECES)]
    flip(path, starts[PIECES // 2] + PIECE + 64)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def _no_warnings() -> Any:
    """The tensor that makes a model large is named as one that nothing computes with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bitwright.BitwrightWarning)
        yield


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("name", ["gptq", "statistics", "sensitivities", "dwq", "dynamic"])
def test_changes_anywhere_in_large_files_are_named_meanwhile(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (kind, step, _) = COMMANDS[name]
    path = large_model(tmp_path / "model")
    after(monkeypatch, (kind, step, 1), lambda: change_unseen(path))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while"):
        run(path.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("name", NAMED)
def test_changes_anywhere_in_large_files_are_named_between_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = large_model(tmp_path / "model"), tmp_path / "place" / "out"
    run = interrupted(monkeypatch, name, path.parent, out)
    change_unseen(path)
    with pytest.raises(
        ResumeError, match=r"content of model\.safetensors \(was '[0-9a-f]{8}.*', is "
    ):
        run(path.parent, out)
    assert not out.exists()


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("name", ["gptq", "statistics", "sensitivities", "dwq"])
def test_copies_of_a_model_are_gone_on_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another file system, say: inodes and times are others, and what is read is the same."""
    path, out = large_model(tmp_path / "model"), tmp_path / "place" / "out"
    run = interrupted(monkeypatch, name, path.parent, out)
    (tmp_path / "copy").mkdir()
    for each in path.parent.iterdir():
        shutil.copyfile(each, tmp_path / "copy" / each.name)
    shutil.rmtree(path.parent)
    (tmp_path / "copy").rename(path.parent)
    run(path.parent, out)
    found = content(out)
    (tmp_path / "whole").mkdir()
    run(path.parent, tmp_path / "whole" / "out")
    assert found == content(tmp_path / "whole" / "out")


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the files that are read for a checksum from now on."""
    read: list[Path] = []
    original = inputs.file_checksum

    def counted(path: Path, start: int, end: int) -> int:
        read.append(path)
        return original(path, start, end)

    monkeypatch.setattr(inputs, "file_checksum", counted)
    return read


@pytest.mark.parametrize("name", ["gptq", "sensitivities", "dynamic"])
def test_no_input_is_read_twice_for_its_checksum(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all stages of a command together, and not at all when nothing has touched it since."""
    monkeypatch.setattr(inputs, "SETTLED", 0)
    read = counted_reads(monkeypatch)
    run = interrupted(monkeypatch, name, DEMO, tmp_path / "place" / "out")
    assert DEMO / "model.safetensors" in read
    assert len(set(read)) == len(read)
    known = set(read) - {TEXT}
    del read[:]
    run(DEMO, tmp_path / "place" / "out")
    assert known.isdisjoint(read)


def test_files_that_were_just_written_are_compared_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another change in the same moment may have left the same times."""
    model, out = tmp_path / "model", tmp_path / "place" / "out"
    shutil.copytree(DEMO, model)
    run = interrupted(monkeypatch, "gptq", model, out)
    read = counted_reads(monkeypatch)
    run(model, out)
    assert model / "model.safetensors" in read


@pytest.mark.parametrize("name", ["gptq", "statistics", "sensitivities"])
def test_file_systems_that_make_up_inodes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = COMMANDS[name]
    (tmp_path / "whole").mkdir()
    run(DEMO, tmp_path / "whole" / "out")
    numbers, original = itertools.count(1), inputs._Stamp.of

    def made_up(place: Path) -> inputs._Stamp:
        return original(place)._replace(inode=next(numbers))

    monkeypatch.setattr(inputs._Stamp, "of", made_up)
    read = counted_reads(monkeypatch)
    run = interrupted(monkeypatch, name, DEMO, tmp_path / "place" / "out")
    assert (
        read.count(DEMO / "model.safetensors") <= 2
    )  # to know it, and to know that inodes mean nothing
    run(DEMO, tmp_path / "place" / "out")
    assert content(tmp_path / "place" / "out") == content(tmp_path / "whole" / "out")


@pytest.fixture
def _no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run that has only begun, of a large model."""
    monkeypatch.setattr(inputs, "AT_ONCE", 0)
    monkeypatch.setattr(inputs, "SHARE", 0)


@pytest.mark.usefixtures("_no_time")
@pytest.mark.parametrize("name", ["gptq", "statistics", "sensitivities"])
def test_without_checksums_stamps_decide(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "model", tmp_path / "place" / "out"
    shutil.copytree(DEMO, model)
    read = counted_reads(monkeypatch)
    run = interrupted(monkeypatch, name, model, out)
    shutil.copytree(out.parent, tmp_path / "kept")
    run(model, out)
    of_the_output = [model / "model.safetensors"]  # which tells of its model
    assert read == ([] if name == "gptq" else of_the_output)
    shutil.rmtree(out.parent)
    (tmp_path / "kept").rename(out.parent)
    os.utime(model / "model.safetensors")
    with pytest.raises(ResumeError, match=r"content of model\.safetensors \(was 'not known', is "):
        run(model, out)


@pytest.mark.usefixtures("_no_time")
def test_without_checksums_touched_files_count_as_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (kind, step, _) = COMMANDS["gptq"]
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    after(monkeypatch, (kind, step, 1), lambda: os.utime(model / "config.json"))
    with pytest.raises(CheckpointError, match=r"config\.json: was changed or touched while"):
        run(model, tmp_path / "out")


def test_checksums_take_their_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "AT_ONCE", 25)
    now = [100.0]
    monkeypatch.setattr(inputs.time, "monotonic", lambda: now[0])
    paths = [tmp_path / name for name in ("a", "b", "c", "d")]
    for path in paths:
        path.write_bytes(bytes(10))
    files = inputs.InputFiles()
    files.watch(paths, recorded=True)
    found = []
    for seconds in (0, 0, 3, 1):
        now[0] += seconds / (inputs.SHARE * inputs.SPEED) * 10
        found.append((files.take_checksums(), len(files.checksums())))
    assert found == [(True, 2), (False, 2), (True, 3), (True, 4)]
    assert not files.take_checksums()


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


def words(path: Path) -> None:
    """Change a word of a text that ends up in a sample."""
    path.write_text(path.read_text().replace("the", "one"))


def other_statistics(path: Path) -> None:
    bitwright.collect_statistics(
        DEMO, path, TEXT, length=32, samples=5, overwrite=True, progress=False
    )


def other_activations(path: Path) -> None:
    path.unlink()
    bitwright.collect_activations(DEMO, path, TEXT, length=32, samples=5)


def other_recipe(path: Path) -> None:
    recipe = json.loads(path.read_text())
    layer = next(iter(recipe["layers"]))
    recipe["layers"][layer]["bits"] = 4
    path.write_text(json.dumps(recipe))


def other_sensitivities(path: Path) -> None:
    found = json.loads(path.read_text())
    values = [each["alignment"] for each in found["layers"].values()]
    for each, value in zip(found["layers"].values(), sorted(values, reverse=True), strict=True):
        each["alignment"] = value * 10
    path.write_text(json.dumps(found))


def flip_student(path: Path) -> None:
    flip(path / "model.safetensors")


# What a command reads whole or by its digests: who makes it, who changes it, the command that reads it,
# and the word by which it is missed.
Input = tuple[
    Callable[[Path], object], Callable[[Path], object], Callable[[Path, Path], object], str
]


def copy_text(path: Path) -> None:
    shutil.copy(TEXT, path)


def text_input(run: Callable[[Path, Path], object], word: str) -> Input:
    return copy_text, words, run, word


def by(method: str, **options: Any) -> Callable[[Path, Path], object]:
    """Return a call of `quantize` that is given its input by the name of an option."""
    (name,) = (key for key, value in options.items() if value is None)

    def run(path: Path, out: Path) -> object:
        given = {key: path if key == name else value for key, value in options.items()}
        return bitwright.quantize(DEMO, out, method, 4, 32, progress=False, **given)

    return run


def train(path: Path, out: Path) -> object:
    return bitwright.dwq_quantize(
        *(DEMO, STUDENT[0], out, path),
        **{"length": 32, "tokens": 640, "k": 32, "batch_size": 2, "checkpoint_every": 2},
        **{"validate_every": 4, "progress": False},
    )


def train_student(path: Path, out: Path) -> object:
    return bitwright.dwq_quantize(
        *(DEMO, path, out, TEXT),
        **{"length": 32, "tokens": 640, "k": 32, "batch_size": 2, "checkpoint_every": 2},
        **{"validate_every": 4, "progress": False},
    )


LIMITS = {"length": 32, "samples": 8}
INPUTS: dict[str, Input] = {
    "text of quantize": text_input(by("gptq", calibration=None, **LIMITS), "calibration"),
    "text of refine": text_input(
        lambda path, out: bitwright.refine_model(DEMO, STUDENT[0], out, path, **FEW), "calibration"
    ),
    "text of statistics": text_input(
        lambda path, out: bitwright.collect_statistics(DEMO, out, path, **FEW), "calibration"
    ),
    "text of activations": text_input(
        lambda path, out: bitwright.collect_activations(DEMO, out, path, **LIMITS), "calibration"
    ),
    "text of sensitivities": text_input(
        lambda path, out: bitwright.estimate_sensitivities(
            DEMO, path, out=out, batch_size=2, **FEW
        ),
        "tokens",
    ),
    "text of dynamic": text_input(lambda path, out: dynamic(DEMO, out, calibration=path), "tokens"),
    "calibration of dynamic": text_input(
        lambda path, out: dynamic(DEMO, out, sensitivity_calibration=TEXT, calibration=path),
        "calibration",
    ),
    "text of dwq": text_input(train, "tokens"),
    "recipe": (
        lambda path: bitwright.Recipe(
            dict.fromkeys(bitwright.load_model(DEMO).linear_shapes(), (5, 32)), 6, 6
        ).save(path),
        other_recipe,
        by("gptq", recipe=None, calibration=TEXT, **LIMITS),
        "precision of layers",
    ),
    "sensitivities": (
        lambda path: bitwright.estimate_sensitivities(DEMO, TEXT, 3, 32, 5, 32, out=path, **FEW),
        other_sensitivities,
        lambda path, out: dynamic(DEMO, out, sensitivities=path),
        "precision of layers",
    ),
    "statistics": (
        lambda path: bitwright.collect_statistics(DEMO, path, TEXT, **FEW),
        other_statistics,
        by("gptq", statistics=None),
        "statistics",
    ),
    "activations": (
        lambda path: bitwright.collect_activations(DEMO, path, TEXT, length=32),
        other_activations,
        by("salient", activations=None),
        "activations",
    ),
    "student of dwq": (
        lambda path: shutil.copytree(STUDENT[0], path),
        flip_student,
        train_student,
        "student|content of model.safetensors",
    ),
    "student of refine": (
        lambda path: shutil.copytree(STUDENT[0], path),
        flip_student,
        lambda path, out: bitwright.refine_model(DEMO, path, out, TEXT, **FEW),
        "quantized model",
    ),
}
SUFFIXES = {"text": ".txt", "calibration": ".txt", "activations": ".npz"}


@pytest.mark.parametrize("name", INPUTS)
def test_all_inputs_are_known_by_their_content(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one is refused by name, and the same one, written anew, is gone on with."""
    make, change, run, word = INPUTS[name]
    path = tmp_path / f"input{SUFFIXES.get(name.split()[0], '')}"
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    make(path)
    step: tuple[type, str, int] = COMMITS
    if name == "text of sensitivities":
        step = BATCHES
    elif "of dwq" in name:
        step = (bitwright.distill.training._Run, "_save", 2)
    elif name == "text of dynamic":
        step = BATCHES
    with monkeypatch.context() as patch:
        after(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(path, out)
    copy = shutil.copytree if path.is_dir() else shutil.copyfile
    copy(path, tmp_path / "kept")
    change(path)
    with pytest.raises(ResumeError, match=rf"({word}) \(was "):
        run(path, out)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    copy(tmp_path / "kept", path)
    run(path, out)
    assert out.exists()


ESTIMATED = (bitwright.precision.estimate._Estimate, "go", 1)


def dynamic_text(path: Path, out: Path) -> object:
    return dynamic(DEMO, out, calibration=path)


def dynamic_evaluation(path: Path, out: Path) -> object:
    return dynamic(DEMO, out, evaluation=path, length=64)


def best(path: Path, out: Path) -> object:
    return bitwright.quantize(
        DEMO, out, "gptq", 3, 32, calibration=path, preset="best", length=32, progress=False
    )


def dwq_command(path: Path, out: Path) -> None:
    command(
        "dwq",
        *("--teacher", DEMO, "--out", out, "--data", TEXT, "--calibration", path, "--bits", 3),
        *("--group-size", 32, "--length", 32, "--tokens", 640, "--samples", 8),
    )


@pytest.mark.parametrize(
    ("run", "step"),
    [
        (dynamic_text, ESTIMATED),
        (dynamic_evaluation, ESTIMATED),
        (best, ESTIMATED),
        (dwq_command, (bitwright.distill.training, "plan_training", 1)),
    ],
)
def test_texts_that_change_between_two_stages_are_named(
    run: Callable[[Path, Path], object],
    step: tuple[Any, str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "text.txt"
    copy_text(path)
    after(monkeypatch, step, lambda: words(path))
    with pytest.raises(CheckpointError, match=r"text\.txt: was changed while"):
        run(path, tmp_path / "out")


@pytest.mark.usefixtures("_no_warnings")
def test_models_that_change_between_two_stages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large_model(tmp_path / "model")
    after(monkeypatch, ESTIMATED, lambda: change_unseen(path))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while"):
        dynamic(path.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def by_statistics(model: Path, made: Path, out: Path) -> object:
    return bitwright.quantize(model, out, "gptq", 3, 32, statistics=made, progress=False)


def by_sensitivities(model: Path, made: Path, out: Path) -> object:
    return bitwright.choose_precisions(
        model, bitwright.Sensitivities.load(made), 3.7, [(3, 64), (5, 64)]
    )


def targets(model: Path, out: Path) -> object:
    return bitwright.compute_dwq_targets(model, TEXT, out, samples=4, length=32, k=8)


def by_targets(model: Path, made: Path, out: Path) -> object:
    return targets(model, made)


# What writes a file that tells of its model, where the file says so, and what reads it.
MADE: dict[
    str, tuple[Callable[[Path, Path], object], str, Callable[[Path, Path, Path], object]]
] = {
    "statistics": (collect, "statistics.json", by_statistics),
    "sensitivities": (sensitivities, "", by_sensitivities),
    "targets": (targets, "targets.json", by_targets),
}


@pytest.mark.usefixtures("_no_warnings")
@pytest.mark.parametrize("name", MADE)
def test_changes_anywhere_in_a_model_are_named_by_other_commands(name: str, tmp_path: Path) -> None:
    """As far as the file has a checksum; by those of versions that took none they go unnoticed."""
    (make, manifest, use), made = MADE[name], tmp_path / "made"
    path = large_model(tmp_path / "model")
    shutil.copytree(path.parent, tmp_path / "copy")
    make(path.parent, made)
    use(tmp_path / "copy", made, tmp_path / "of the same")
    change_unseen(path)
    with pytest.raises(BitwrightError, match="have changed since|are not those of"):
        use(path.parent, made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    content = json.loads((made / manifest).read_text())
    del content["checksum"]
    (made / manifest).write_text(json.dumps(content))
    use(path.parent, made, tmp_path / "out")


@pytest.mark.usefixtures("_no_warnings")
def test_statistics_of_changed_weights_are_not_merged(tmp_path: Path) -> None:
    path = large_model(tmp_path / "model")
    parts = [tmp_path / name for name in "abc"]
    for part, seed in zip(parts[:2], (0, 1), strict=True):
        tokens = np.random.default_rng(seed).integers(0, 90, (2, 16))
        bitwright.collect_statistics(path.parent, part, tokens, progress=False)
    change_unseen(path)
    tokens = np.random.default_rng(2).integers(0, 90, (2, 16))
    bitwright.collect_statistics(path.parent, parts[2], tokens, progress=False)
    assert (
        bitwright.merge_statistics(parts[:2], tmp_path / "one").checksum
        == bitwright.Statistics(parts[0]).checksum
    )
    with pytest.raises(BitwrightError, match="the model had other weights than when"):
        bitwright.merge_statistics(parts, tmp_path / "all")


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
