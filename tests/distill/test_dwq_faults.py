"""DWQ under bad input, bad luck and interruptions: what is refused, what is kept, what is written."""

import functools
import hashlib
import json
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
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shared_data import TESTS
from told import TOLD

import bitwright
from bitwright import _kernels
from bitwright.distill import training as dwq_module
from bitwright.distill.adam import Adam
from bitwright.report.printing import print_dwq_report

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
MOE = TESTS / "data/tiny/qwen3_moe"
LLAMA = TESTS / "data/tiny/llama-linear"
ROWS, LENGTH = 18, 16
IDS = bitwright.load_tokens(TEXT, tokenizer=DEMO, length=LENGTH, samples=ROWS)
HELD = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=DEMO, length=LENGTH, samples=4)
MOE_IDS = np.random.default_rng(0).integers(0, 96, (10, 12)).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps are so small that more threads only wait for each other."""
    before = _kernels.num_threads()
    bitwright.set_num_threads(1)
    yield
    bitwright.set_num_threads(before)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("students")

    @functools.cache
    def make(teacher: Path = DEMO, format: str = "mlx", **options: Any) -> Path:
        out = folder / str(len(list(folder.iterdir())))
        settings = {"bits": 4 if format == "awq" else 3, "group_size": 32} | options
        bitwright.quantize(teacher, out, "rtn", format=format, progress=False, **settings)
        return out

    return make


@pytest.fixture
def student(students: Callable[..., Path]) -> Path:
    return students()


def train(
    student: Any, out: Path, data: Any = IDS, teacher: Path = DEMO, **options: Any
) -> bitwright.DwqReport:
    """8 steps of 2 samples, validated on 2."""
    settings = {
        "batch_size": 2,
        "validation_samples": 2,
        "validate_every": 4,
        "checkpoint_every": 2,
        "learning_rate": 5e-4,
        "progress": False,
    }
    return bitwright.dwq_quantize(teacher, student, out, data, **(settings | options))


def accept_all(patch: pytest.MonkeyPatch) -> None:
    """Let the last validation count as the best, so that what training did is written in any case."""
    validate = dwq_module._Run._validate

    def accepted(run: Any) -> bool:
        sound = validate(run)
        run.best = {name: array.copy() for name, array in run.student.parameters.items()}
        run.state.best_step = run.state.step
        return sound

    patch.setattr(dwq_module._Run, "_validate", accepted)


def tensors(folder: Path) -> dict[str, bytes]:
    arrays = load_file(folder / "model.safetensors")
    return {name: array.tobytes() for name, array in arrays.items()}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def changed(student: Path, out: Path) -> set[str]:
    """Return the last parts of the names of tensors that differ."""
    before, after = tensors(student), tensors(out)
    assert set(before) == set(after)
    return {name.rpartition(".")[2] for name in before if before[name] != after[name]}


def validation_kl(teacher: Path, folder: Path, ids: Any) -> float:
    """The KL of a written folder, from nothing but the folders and float64."""
    parts = []
    for model in map(bitwright.load_model, (teacher, folder)):
        logits = np.concatenate([model.logits(row[None]).reshape(len(row), -1) for row in ids])
        logits = logits.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        parts.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    first, second = parts
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


# What is written.


@pytest.mark.parametrize(
    ("teacher", "format", "options"),
    [
        (DEMO, "mlx", {"float_embeddings": True}),
        (DEMO, "mlx", {"embedding_bits": 4}),
        (DEMO, "gptq", {"grid": "symmetric"}),
        (DEMO, "gptq", {"grid": "zero_point"}),
        (DEMO, "gptq", {"grid": "zero_point", "bits": 8}),
        (DEMO, "awq", {}),
        (DEMO, "awq", {"grid": "symmetric"}),
        (LLAMA, "mlx", {"embedding_bits": 4, "head_bits": 3}),
        (MOE, "mlx", {}),
        (MOE, "gptq", {}),
        (MOE, "gptq", {"grid": "zero_point"}),
    ],
)
@pytest.mark.parametrize("zeros", ["fixed", "project"])
def test_formats_round_trip(
    students: Callable[..., Path],
    tmp_path: Path,
    teacher: Path,
    format: str,
    options: dict[str, Any],
    zeros: Any,
) -> None:
    if format == "mlx" and zeros == "project":
        pytest.skip("has no zeros")
    start, out = students(teacher, format, **options), tmp_path / "out"
    ids = IDS if teacher == DEMO else MOE_IDS
    kept: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        write = dwq_module._write

        def kept_write(writer: Any, learner: Any, report: Any) -> None:
            kept.update(
                {name: each.tensor().dequantize() for name, each in learner.tensors.items()}
            )
            write(writer, learner, report)

        patch.setattr(dwq_module, "_write", kept_write)
        accept_all(patch)
        report = train(
            start, out, ids, teacher, validation=ids[:2], zeros=zeros, learning_rate=1e-2
        )
    assert report.best_step == report.steps
    assert (
        changed(start, out)
        == {
            "mlx": {"scales", "biases"},
            "gptq": {"scales", "qzeros"} if zeros == "project" else {"scales"},
            "awq": {"scales", "qzeros"} if zeros == "project" else {"scales"},
        }[format]
    )
    before, after = bitwright.load_model(start), bitwright.load_model(out)
    moved = 0
    for name, weights in kept.items():
        read, given = after.quantized(name), before.quantized(name)
        assert read is not None
        assert given is not None
        assert (read.dequantize() == weights).all()
        assert (read.codes == given.codes).all()
        assert read.bits == given.bits
        if read.zeros is not None and given.zeros is not None:
            moved += int((read.zeros != given.zeros).sum())
            assert read.zeros.max() < 1 << read.bits
    assert (moved > 0) == (zeros == "project")
    names = set(kept)
    in_float = format != "mlx" or "float_embeddings" in options
    assert (after.embedding_name in names) != in_float
    assert len(names) >= len(before.linear_shapes())
    for name, shape in before.linear_shapes().items():
        assert np.isfinite(after.weight(name, shape)).all()
    written = validation_kl(teacher, out, ids[:2])
    assert written == pytest.approx(report.validations[-1][1], rel=5e-3)
    assert validation_kl(teacher, start, ids[:2]) == pytest.approx(report.kl_before, rel=5e-3)
    assert not (tmp_path / ".out.work").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in start.iterdir():
        if path.name not in ("model.safetensors", "config.json", *TOLD):
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert json.loads((out / "dwq.json").read_text())["kl_after"] == report.kl_after


def test_moved_zeros_are_not_called_symmetric(
    students: Callable[..., Path], tmp_path: Path
) -> None:
    """Engines that read "sym" do not read the zeros: their weights would be others."""
    start = students(DEMO, "gptq", grid="symmetric")
    with pytest.MonkeyPatch.context() as patch:
        accept_all(patch)
        train(start, tmp_path / "fixed")
        train(start, tmp_path / "moved", zeros="project", learning_rate=2e-2)
    fixed, moved = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("fixed", "moved")
    )
    assert fixed["sym"] is True
    assert moved == fixed | {"sym": False}


@pytest.mark.parametrize("stored", [0, 7, 15])
def test_zeros_at_the_edge_stay_when_nothing_is_learnt(
    students: Callable[..., Path], tmp_path: Path, stored: int
) -> None:
    """Version 1 stores zeros less one, so that they go from 1 to 16 in other people's files."""
    start = shutil.copytree(students(DEMO, "gptq", grid="symmetric", bits=4), tmp_path / "start")
    arrays = load_file(start / "model.safetensors")
    for name, array in arrays.items():
        if name.endswith("0.mlp.up_proj.qzeros"):
            array[...] = np.array([stored * 0x11111111], np.uint32).view(np.int32)
    save_file(arrays, start / "model.safetensors", metadata={"format": "pt"})
    report = train(start, tmp_path / "out", zeros="project", learning_rate=1e-12)
    assert report.kl_after <= report.kl_before
    assert changed(start, tmp_path / "out") == set()


@pytest.mark.parametrize("format", ["mlx", "gptq", "awq"])
def test_absurd_learning_rate_keeps_the_start(
    students: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    start, out = students(DEMO, format), tmp_path / "out"
    report = train(start, out, learning_rate=1e6, zeros="project", validate_every=1)
    assert report.best_step == 0
    assert report.kl_after == report.kl_before
    assert tensors(out) == tensors(start)
    console = Console(width=200)
    with console.capture() as capture:
        print_dwq_report(report, console)
    assert "Training made nothing better" in capture.get()
    config = json.loads((start / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config


@pytest.mark.parametrize("rate", [1e20, 1e38, 1e300])
def test_learning_rates_beyond_float32(student: Path, tmp_path: Path, rate: float) -> None:
    report = train(student, tmp_path / "out", learning_rate=rate)
    assert report.stopped is not None
    assert (report.best_step, changed(student, tmp_path / "out")) == (0, set())


def kl(teacher: Any, known: Any) -> tuple[Any, Any]:
    return (np.exp(teacher) * (teacher - known)).sum(axis=1), -np.exp(teacher)


def test_a_loss_that_becomes_nan_stops(student: Path, tmp_path: Path) -> None:
    calls = 0

    def loss(teacher: Any, known: Any) -> tuple[Any, Any]:
        nonlocal calls
        calls += 1
        losses, slopes = kl(teacher, known)
        return (losses * np.nan if calls == 6 else losses), slopes

    report = train(student, tmp_path / "out", loss=loss, validate_every=2)
    assert report.stopped == "the loss is nan at step 6 of 8"
    assert report.steps == 5
    assert [step for step, _ in report.validations] == [0, 2, 4]
    assert report.best_step in (2, 4)
    assert changed(student, tmp_path / "out") == {"scales", "biases"}
    assert not (tmp_path / ".out.work").exists()


def test_gradients_that_become_nan_stop(student: Path, tmp_path: Path) -> None:
    def loss(teacher: Any, known: Any) -> tuple[Any, Any]:
        losses, slopes = kl(teacher, known)
        return losses, slopes * np.inf

    with np.errstate(all="ignore"):
        report = train(student, tmp_path / "out", loss=loss)
    assert report.stopped == "the loss is nan at step 1 of 8"
    assert changed(student, tmp_path / "out") == set()


def test_patience(student: Path, tmp_path: Path) -> None:
    report = train(
        student, tmp_path / "out", learning_rate=10.0, validate_every=1, patience=2, warmup=0
    )
    assert report.stopped == "no better validation KL since step 0"
    assert report.steps == 2


def test_a_student_that_says_nan_is_named(student: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(student, tmp_path / "broken")
    arrays = load_file(broken / "model.safetensors")
    arrays["model.layers.1.mlp.up_proj.scales"][...] = np.nan
    save_file(arrays, broken / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(bitwright.NonFiniteError, match=f"{broken}: its KL"):
        train(broken, tmp_path / "out")


# What is refused.


def wider_vocabulary(folder: Path, student: Path) -> Path:
    shutil.copytree(student, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_wrong_students(students: Callable[..., Path], student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong, kind, word in (
        (DEMO, bitwright.UnsupportedModelError, "none of its layers is quantized"),
        (students(MOE), bitwright.CheckpointError, "model_type is qwen3_moe, not llama"),
        (students(LLAMA), bitwright.CheckpointError, "vocab_size is"),
        (
            wider_vocabulary(tmp_path / "w", student),
            bitwright.CheckpointError,
            "another vocabulary",
        ),
        (tmp_path / "absent", bitwright.CheckpointNotFoundError, "absent"),
        (lambda folder: None, bitwright.CheckpointNotFoundError, "student"),
    ):
        with pytest.raises(kind, match=word):
            train(wrong, out)
        assert [path.name for path in tmp_path.iterdir() if path.name != "w"] == []


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"data": IDS[:1]}, "calibration: has 1 samples"),
        ({"validation_samples": ROWS}, "18 are for validation"),
        ({"data": IDS[:0]}, "token array"),
        ({"data": TEXT.with_name("absent.txt")}, "absent.txt"),
        ({"validation": HELD[:, :8]}, "shorter|length|long"),
        ({"schedule": "sine"}, "schedule: expected one of cosine"),
        ({"zeros": "free"}, "zeros: expected one of"),
        ({"loss": "l1"}, "loss: expected one of kl"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"batch_size": 1.5}, "batch_size: expected"),
        ({"accumulate": 0}, "accumulate: expected"),
        ({"validate_every": 0}, "validate_every: expected"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected"),
        ({"patience": 0}, "patience: expected"),
        ({"tokens": 0}, "tokens: expected"),
        ({"validation_samples": 0}, "validation_samples: expected"),
        ({"k": 0}, "k: expected"),
        ({"k": 513}, "k: expected 1 to 512"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"warmup": 1.5}, "warmup"),
        ({"warmup": float("nan")}, "warmup"),
        ({"temperature": 0}, "temperature: expected"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"seed": -1}, "seed"),
        ({"length": LENGTH + 1}, "length"),
        ({"threads": 0}, "threads|0"),
        ({"loss": lambda teacher, known: (known, known)}, "loss: expected losses"),
    ],
)
def test_wrong_options(student: Path, tmp_path: Path, options: dict[str, Any], word: str) -> None:
    made: list[Path] = []

    def maker(folder: Path) -> None:
        made.append(folder)
        shutil.copytree(student, folder)

    with pytest.raises(ValueError, match=word):
        train(maker, tmp_path / "out", **options)
    # Making a student may take hours, so what can be known before is told before.
    assert not made or "k" in options or callable(options.get("loss"))
    shutil.rmtree(tmp_path / ".out.work/targets", ignore_errors=True)
    assert not (tmp_path / "out").exists()


def test_places_that_are_taken(student: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(student, tmp_path / "start"))
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    for out, options, word in (
        (tmp_path / "taken", {}, "exists already"),
        (tmp_path / "taken", {"overwrite": True}, "is not a checkpoint folder"),
        (start, {}, "exists already"),
        (start, {"overwrite": True}, "overlaps the student"),
        (start / "inside", {}, "overlaps the student"),
        (DEMO, {"overwrite": True}, "overlaps the checkpoint that is read"),
        (DEMO / "inside", {}, "overlaps the checkpoint that is read"),
        (tmp_path / "out", {"targets": tmp_path / "out"}, "overlaps the targets"),
        (tmp_path / "out", {"targets": tmp_path / "out" / "targets"}, "overlaps the targets"),
        (tmp_path / "out", {"targets": tmp_path / ".out.work"}, "overlaps the targets"),
        (tmp_path / "out", {"targets": tmp_path / "taken"}, "holds no targets"),
    ):
        with pytest.raises(bitwright.OutputError, match=word):
            train(start, out, **options)
        assert {path.name for path in tmp_path.iterdir()} == {"start", "taken"}
        assert {path.name: path.read_bytes() for path in start.iterdir()} == before
        assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    (tmp_path / ".out.work").write_text("a file of mine")
    with pytest.raises(bitwright.OutputError, match=".out.work: cannot be written"):
        train(start, tmp_path / "out")
    assert (tmp_path / ".out.work").read_text() == "a file of mine"


def test_output_is_replaced_when_asked(student: Path, tmp_path: Path) -> None:
    train(student, tmp_path / "out")
    first = digest(tmp_path / "out")
    train(student, tmp_path / "out", overwrite=True, seed=1)
    assert digest(tmp_path / "out") != first


# Targets.


def test_targets_stand_for_data(student: Path, tmp_path: Path) -> None:
    bitwright.compute_dwq_targets(DEMO, IDS, tmp_path / "targets", k=64)
    names = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()}
    train(student, tmp_path / "a", None, targets=tmp_path / "targets")
    train(student, tmp_path / "b", IDS, targets=tmp_path / "targets")
    train(student, tmp_path / "c", IDS, k=64)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()}
    assert {name for name in names if names[name] != after[name]} <= {"targets.json"}
    for options, word in (
        ({"data": IDS[:, ::-1].copy()}, "other tokens"),
        ({"data": None, "k": 32}, "another k"),
        ({"data": None, "temperature": 2.0}, "another temperature"),
        ({"data": None, "length": 8}, "length"),
        ({"data": None, "teacher": MOE}, "is not made from"),
    ):
        with pytest.raises(ValueError, match=word):
            train(student, tmp_path / "d", targets=tmp_path / "targets", **options)
        assert not (tmp_path / "d").exists()
        assert not (tmp_path / ".d.work").exists()


@pytest.mark.parametrize("data", [None, IDS])
def test_targets_and_validation_data(student: Path, tmp_path: Path, data: Any) -> None:
    """Targets of the training data serve whatever is validated on."""
    bitwright.compute_dwq_targets(DEMO, IDS, tmp_path / "targets", k=64)
    given = train(student, tmp_path / "a", data, targets=tmp_path / "targets", validation=HELD)
    made = train(student, tmp_path / "b", IDS, k=64, validation=HELD)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert given.validations == made.validations


def test_targets_that_are_made_serve_again(student: Path, tmp_path: Path) -> None:
    first = train(student, tmp_path / "a", targets=tmp_path / "targets")
    again = train(student, tmp_path / "b", targets=tmp_path / "targets")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert first.validations == again.validations
    train(student, tmp_path / "c", None, targets=tmp_path / "targets")


# Interruptions.


class Interrupts:
    """Adam whose step is interrupted, like by Ctrl-C, at some step."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.steps = 0
        step = Adam.step

        def counted(adam: Adam, *arguments: Any) -> None:
            self.steps += 1
            if adam.steps + 1 == at:
                raise error
            step(adam, *arguments)

        patch.setattr(Adam, "step", counted)


def interrupt(student: Any, out: Path, at: int, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Interrupts(patch, at, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=f"the same call resumes .*{out.name}.work"):
            train(student, out, **options)
    assert not out.exists()


def steps_of(student: Any, out: Path, **options: Any) -> tuple[int, bitwright.DwqReport]:
    with pytest.MonkeyPatch.context() as patch:
        counter = Interrupts(patch, -1, KeyboardInterrupt())
        report = train(student, out, **options)
    return counter.steps, report


@pytest.fixture(scope="module")
def undisturbed(
    students: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, bitwright.DwqReport]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    report = train(students(), out)
    return digest(out), report


@pytest.mark.parametrize("at", [1, 2, 3, 6, 8])
def test_interrupted_runs_go_on(
    student: Path, tmp_path: Path, undisturbed: tuple[str, bitwright.DwqReport], at: int
) -> None:
    interrupt(student, tmp_path / "out", at)
    assert {path.name for path in tmp_path.iterdir()} == {".out.work"}
    steps, report = steps_of(student, tmp_path / "out")
    assert steps == 8 - (at - 1) // 2 * 2
    assert digest(tmp_path / "out") == undisturbed[0]
    assert (report.losses, report.validations) == (
        undisturbed[1].losses,
        undisturbed[1].validations,
    )
    assert report.as_dict() == undisturbed[1].as_dict()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_run_that_is_interrupted_often(
    student: Path, tmp_path: Path, undisturbed: tuple[str, bitwright.DwqReport]
) -> None:
    for at in (4, 4, 5, 7):
        interrupt(student, tmp_path / "out", at)
    steps, _ = steps_of(student, tmp_path / "out")
    assert steps == 2
    assert digest(tmp_path / "out") == undisturbed[0]


def test_students_that_are_made_go_on(
    student: Path, tmp_path: Path, undisturbed: tuple[str, bitwright.DwqReport]
) -> None:
    def maker(folder: Path) -> None:
        shutil.copytree(student, folder)

    interrupt(maker, tmp_path / "out", 5)
    steps, _ = steps_of(maker, tmp_path / "out")
    assert steps == 4
    assert digest(tmp_path / "out") == undisturbed[0]


def test_interrupted_by_a_loss_function(student: Path, tmp_path: Path) -> None:
    calls, at = 0, 5

    def loss(teacher: Any, known: Any) -> tuple[Any, Any]:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return kl(teacher, known)

    with pytest.raises(KeyboardInterrupt, match="resumes"):
        train(student, tmp_path / "out", loss=loss)
    train(student, tmp_path / "out", loss=loss)
    assert calls == 5 + 4
    calls, at = 0, -1
    train(student, tmp_path / "whole", loss=loss)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_interrupted_while_the_result_is_written(
    student: Path, tmp_path: Path, undisturbed: tuple[str, bitwright.DwqReport]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dwq_module.CheckpointWriter, "write_json", lambda *_: signal.raise_signal(2))
        with pytest.raises(KeyboardInterrupt, match="the same call resumes"):
            train(student, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {".out.work"}
    train(student, tmp_path / "out")
    assert digest(tmp_path / "out") == undisturbed[0]


def test_interrupted_after_patience_ran_out(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"learning_rate": 10.0, "warmup": 0, "patience": 2}
    options |= {"validate_every": 1, "checkpoint_every": 1}
    whole = train(student, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(dwq_module._Run, "report", lambda *_: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011
            train(student, tmp_path / "out", **options)
    report = train(student, tmp_path / "out", **options)
    assert report.as_dict() == whole.as_dict()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"learning_rate": 1e-3}, "learning_rate .was 0.0005, is 0.001"),
        ({"schedule": "linear"}, "schedule"),
        ({"loss": "js"}, "loss"),
        ({"zeros": "project"}, "zeros"),
        ({"validate_every": 3}, "validate_every"),
        ({"patience": 3}, "patience"),
        ({"accumulate": 2}, "accumulate .was 1, is 2"),
    ],
)
def test_checkpoints_of_other_settings(
    student: Path, tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    interrupt(student, tmp_path / "out", 4)
    before = (tmp_path / ".out.work/training.safetensors").read_bytes()
    with pytest.raises(bitwright.ResumeError, match=word) as raised:
        train(student, tmp_path / "out", **options)
    assert "an interrupted run had other" in str(raised.value)
    assert "--no-resume" in str(raised.value)
    assert (tmp_path / ".out.work/training.safetensors").read_bytes() == before
    steps, _ = steps_of(student, tmp_path / "out", resume=False, **options)
    assert steps == 8 // options.get("accumulate", 1)
    train(student, tmp_path / "new", **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "new")


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"k": 32},
        {"temperature": 2.0},
        {"tokens": 4 * LENGTH},
        {"data": IDS[::-1].copy()},
        {"validation": HELD},
        {"length": 8},
    ],
)
def test_starting_over_with_other_data(
    student: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    interrupt(student, tmp_path / "out", 4)
    with pytest.raises(bitwright.ResumeError, match="an interrupted run had other") as raised:
        train(student, tmp_path / "out", **options)
    assert "--no-resume" in str(raised.value)
    train(student, tmp_path / "out", resume=False, **options)
    train(student, tmp_path / "new", **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "new")


def test_other_k_than_that_of_the_interrupted_run(student: Path, tmp_path: Path) -> None:
    interrupt(student, tmp_path / "out", 4, k=32)
    with pytest.raises(bitwright.ResumeError, match="k .was 32, is 512"):
        train(student, tmp_path / "out")


def test_other_validation_data_is_noticed(student: Path, tmp_path: Path) -> None:
    """With targets of their own, nothing but the checkpoint tells."""
    targets = tmp_path / "targets"
    bitwright.compute_dwq_targets(DEMO, IDS, targets)
    interrupt(student, tmp_path / "out", 4, validation=HELD[:2], targets=targets)
    with pytest.raises(bitwright.ResumeError, match="inputs: validation"):
        train(student, tmp_path / "out", validation=HELD[2:], targets=targets)


def with_metadata(path: Path, **changes: str) -> None:
    arrays = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(arrays, path, metadata=metadata | changes)


def with_state(path: Path, **changes: Any) -> None:
    with safe_open(path, framework="numpy") as file:
        state = json.loads(file.metadata()["state"])
    with_metadata(path, state=json.dumps(state | changes))


def with_arrays(path: Path, change: Callable[[str, Any], Any]) -> None:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = {name: change(name, array) for name, array in load_file(path).items()}
    save_file({k: v for k, v in arrays.items() if v is not None}, path, metadata=metadata)


@pytest.fixture(scope="module")
def interrupted(students: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    interrupt(students(), folder / "out", 6)
    return folder / ".out.work"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:7]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.with_name("state.json").write_text("{"),
        lambda path: path.with_name("state.json").write_text('{"identity": [], "state": {}}'),
        lambda path: path.with_name("state.json").write_text('{"identity": {}, "state": null}'),
        lambda path: with_metadata(path, state="[1, 2]"),
        lambda path: with_metadata(path, state="[" * 100_000),
        lambda path: save_file(load_file(path), path),
        lambda path: with_state(path, step="4"),
        lambda path: with_state(path, step=-1),
        lambda path: with_state(path, step=1e400),
        lambda path: with_state(path, step=10**9),
        lambda path: with_state(path, best_step=3),
        lambda path: with_state(path, best_step=[]),
        lambda path: with_state(path, seconds="1"),
        lambda path: with_state(path, seconds=-1.0),
        lambda path: with_state(path, losses=[1.0]),
        lambda path: with_state(path, losses=["a"] * 4),
        lambda path: with_state(path, losses=None),
        lambda path: with_state(path, validations=[]),
        lambda path: with_state(path, validations=[[0]]),
        lambda path: with_state(path, validations=[[0, float("nan")]]),
        lambda path: with_state(path, validations=7),
        lambda path: with_state(path, more=1),
        lambda path: with_arrays(path, lambda name, array: array[:1].copy()),
        lambda path: with_arrays(path, lambda name, array: array.astype(np.float64)),
        lambda path: with_arrays(path, lambda name, array: array * np.float32(np.nan)),
        lambda path: with_arrays(path, lambda name, array: None if "q_proj" in name else array),
    ],
)
def test_damaged_checkpoints(
    student: Path,
    tmp_path: Path,
    interrupted: Path,
    undisturbed: tuple[str, bitwright.DwqReport],
    damage: Callable[[Path], Any],
) -> None:
    work = Path(shutil.copytree(interrupted, tmp_path / ".out.work"))
    damage(work / "training.safetensors")
    with pytest.raises(bitwright.ResumeError, match="is damaged.*--no-resume.*remove") as raised:
        train(student, tmp_path / "out")
    assert str(work) in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert (work / "training.safetensors").exists()


def test_starting_over_after_damage(
    student: Path,
    tmp_path: Path,
    interrupted: Path,
    undisturbed: tuple[str, bitwright.DwqReport],
) -> None:
    work = Path(shutil.copytree(interrupted, tmp_path / ".out.work"))
    (work / "training.safetensors").write_bytes(b"damaged")
    (work / "targets/targets-00001.safetensors").write_bytes(b"damaged")
    steps, _ = steps_of(student, tmp_path / "out", resume=False)
    assert steps == 8
    assert digest(tmp_path / "out") == undisturbed[0]
    shutil.copytree(interrupted, tmp_path / ".out2.work")
    (tmp_path / ".out2.work/targets/targets.json").write_text("[")
    steps, _ = steps_of(student, tmp_path / "out2", resume=False)
    assert digest(tmp_path / "out2") == undisturbed[0]


# The command.


def command(student: Path, out: Path, data: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "bitwright", "dwq", str(student)),
        *(
            "--reference",
            str(DEMO),
            "--out",
            str(out),
            "--calibration",
            str(data),
            "--length",
            "32",
        ),
        *("--batch-size", "2", "--checkpoint-every", "1", "--validate-every", "10"),
        *("--tokens", "1280", "--learning-rate", "5e-4", "--threads", "1"),
    ]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT.read_text()[:12000])
    return path


def wait_for(process: subprocess.Popen[str], path: Path, times: int = 1) -> None:
    """Return when a file has been replaced so many times."""
    seen: set[int] = set()
    while len(seen) < times:
        assert process.poll() is None, "ended before it was to be killed"
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_commands_go_on(student: Path, tmp_path: Path, text: Path) -> None:
    whole = tmp_path / "whole"
    subprocess.run(command(student, whole, text), check=True, capture_output=True)
    work, rng = tmp_path / ".out.work", np.random.default_rng()
    moments = [(work / "targets/targets.json", 1), (work / "training.safetensors", 1)]
    moments.append((work / "training.safetensors", int(rng.integers(2, 8))))
    for path, times in moments:
        process = subprocess.Popen(
            command(student, tmp_path / "out", text), stderr=subprocess.PIPE, text=True
        )
        wait_for(process, path, times)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        assert not (tmp_path / "out").exists()
    done = subprocess.run(
        command(student, tmp_path / "out", text), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "out") == digest(whole)
    assert (tmp_path / "out/dwq.json").read_text() == (whole / "dwq.json").read_text()
    assert not work.exists()


@pytest.mark.slow
def test_interrupted_command_says_how_to_go_on(student: Path, tmp_path: Path, text: Path) -> None:
    process = subprocess.Popen(
        command(student, tmp_path / "out", text), stderr=subprocess.PIPE, text=True
    )
    wait_for(process, tmp_path / ".out.work/training.safetensors", 2)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "interrupted; the same call resumes from what is done, in" in messages
    assert "Traceback" not in messages
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", ".out.work"}
    changed = [*command(student, tmp_path / "out", text), "--seed", "1"]
    done = subprocess.run(changed, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--no-resume" in done.stderr


# Files of sensitivities and recipes.


@pytest.fixture(scope="module")
def found() -> bitwright.Sensitivities:
    return bitwright.estimate_sensitivities(DEMO, IDS, samples=2, progress=False)


def test_sensitivities_round_trip(found: bitwright.Sensitivities, tmp_path: Path) -> None:
    found.save(tmp_path / "s.json")
    assert bitwright.Sensitivities.load(tmp_path / "s.json") == found
    recipe = bitwright.choose_precisions(DEMO, found, 4.5)
    recipe.save(tmp_path / "r.json")
    assert bitwright.Recipe.load(tmp_path / "r.json") == recipe


CONTENTS = [
    b"",
    b"{",
    b"[]",
    b"\xff",
    b"{}",
    b"[" * 100_000,
    b'{"version": 1}',
    b'{"version": 1, "layers": []}',
    b'{"version": 1, "layers": {}}',
    b'{"version": 1, "layers": {"a": 1}}',
    b'{"version": 2}',
]
LAYER: dict[str, dict[str, Any]] = {
    "sensitivities": {"sensitivity": 1.0, "alignment": 1.0, "parameters": 64},
    "recipe": {"bits": 4, "group_size": 64},
}


@pytest.mark.parametrize("content", CONTENTS)
def test_damaged_sensitivities_and_recipes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(bitwright.SensitivityError, match="file.json: .*bitwright sensitivities"):
        bitwright.Sensitivities.load(path)
    with pytest.raises(bitwright.RecipeError, match="file.json: .*bitwright dynamic"):
        bitwright.Recipe.load(path)
    with pytest.raises(bitwright.SensitivityError, match="file.json"):
        bitwright.dynamic_quantize(
            DEMO, tmp_path / "out", 4.5, method="rtn", sensitivities=path, progress=False
        )
    with pytest.raises(bitwright.RecipeError, match="file.json"):
        bitwright.quantize(DEMO, tmp_path / "out", "rtn", recipe=path, progress=False)
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": float("inf")},
        {"parameters": 0},
        {"alignment": float("nan")},
        {"alignment": 10**400},
        {"alignment": []},
        {"low": "7:64"},
        {"low": 3},
        {"high": None},
        {"low": "3:" + "9" * 5000},
        {"kl_divergence": 10**400},
        {"kl_divergence": float("nan")},
        {"version": "1"},
    ],
)
def test_garbage_in_sensitivities(
    found: bitwright.Sensitivities, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "file.json"
    found.save(path)
    content = json.loads(path.read_text())
    for key, value in change.items():
        place = content if key in content else content["layers"]["model.layers.0.mlp.up_proj"]
        place[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(bitwright.SensitivityError, match="file.json: does not hold") as raised:
        bitwright.Sensitivities.load(path)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 7},
        {"bits": 3.0},
        {"bits": []},
        {"bits": "4"},
        {"bits": None},
        {"group_size": 0},
        {"group_size": -2},
        {"group_size": True},
        {"group_size": 64.0},
        {"target_bpw": 10**400},
        {"target_bpw": None},
        {"bits_per_weight": "x"},
    ],
)
def test_garbage_in_recipes(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "file.json"
    bitwright.Recipe({"a": (4, 64)}, 4.5, 4.5).save(path)
    content = json.loads(path.read_text())
    for key, value in change.items():
        place = content if key in content else content["layers"]["a"]
        place[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(bitwright.RecipeError, match="file.json: is not a recipe"):
        bitwright.Recipe.load(path)


def test_sensitivities_and_recipes_of_another_model(
    found: bitwright.Sensitivities, tmp_path: Path
) -> None:
    with pytest.raises(bitwright.SensitivityError, match="are not those of .*llama-linear"):
        bitwright.choose_precisions(LLAMA, found, 4.5)
    recipe = bitwright.Recipe({"model.layers.9.mlp.up_proj": (4, 64)}, 4.5, 4.5)
    with pytest.raises(bitwright.RecipeError, match=r"model\.layers\.9\.mlp\.up_proj.*like model"):
        bitwright.quantize(DEMO, tmp_path / "out", "rtn", recipe=recipe, progress=False)
    found.save(tmp_path / "s.json")
    with pytest.raises(bitwright.SensitivityError, match="are not those of"):
        bitwright.dynamic_quantize(
            MOE, tmp_path / "out", 4.5, method="rtn", sensitivities=tmp_path / "s.json"
        )
    assert [each.name for each in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("name", ["absent.json", "folder"])
def test_files_that_there_are_not(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(bitwright.SensitivityError, match=name):
        bitwright.Sensitivities.load(tmp_path / name)
    with pytest.raises(bitwright.RecipeError, match=name):
        bitwright.Recipe.load(tmp_path / name)
    with pytest.raises(bitwright.OutputError, match="cannot be written"):
        bitwright.Recipe({"a": (4, 64)}, 4.5, 4.5).save(tmp_path / name / "absent" / "r.json")
