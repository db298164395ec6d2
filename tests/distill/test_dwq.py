"""DWQ: losses, schedules, and what training takes away of the divergence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shared_data import SHARED, needs_shared

import bitwright
from bitwright.distill.losses import LOSSES, DistillationLoss, TopTokens, next_tokens
from bitwright.distill.training import SCHEDULES, _Settings

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"


def plain_kl(teacher: NDArray[Any], student: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """KL of log-probabilities that are all there, and its gradient with respect to the student's."""
    shares = np.exp(teacher)
    return (shares * (teacher - student)).sum(axis=1), -shares


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dwq") / "student"
    bitwright.quantize(DEMO, folder, "rtn", 3, float_embeddings=True, progress=False)
    return folder


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_function_as_loss(temperature: float) -> None:
    rng = np.random.default_rng(0)
    teacher, logits = (3 * rng.standard_normal((6, 20), dtype=np.float32) for _ in range(2))
    top = TopTokens.of(teacher, 20, temperature)
    results = []
    for loss in ("kl", plain_kl):
        gradient = np.empty_like(logits)
        measure = DistillationLoss(top.rows, np.full(6, -1, np.int32), loss, temperature, 0.5)
        results.append((measure(0, logits, gradient), gradient))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-6)


def test_a_function_must_return_losses_and_gradients() -> None:
    logits = np.zeros((4, 8), np.float32)
    top = TopTokens.of(logits, 3)
    measure = DistillationLoss(
        top.rows, np.full(4, -1, np.int32), lambda teacher, student: (student, student)
    )
    with pytest.raises(ValueError, match=r"loss: expected losses \[4\] and gradients \[4, 3\]"):
        measure(0, logits, None)


def test_next_tokens() -> None:
    ids = np.array([[5, 6, 7], [8, 9, 1]], np.int32)
    assert next_tokens(ids).tolist() == [6, 7, -1, 9, 1, -1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: Any) -> None:
    settings = _Settings(1e-3, schedule, 0.1, 1.0, 4, 1, "kl", "fixed", 100, 10, None)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert 0 < rates[0] <= 1.1e-4
    assert max(rates) <= 1e-3
    if schedule == "constant":
        assert set(rates[10:]) == {1e-3}
    else:
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*LOSSES, plain_kl])
def test_every_loss_trains(student: Path, tmp_path: Path, loss: Any) -> None:
    report = bitwright.dwq_quantize(
        DEMO, student, tmp_path / "out", TEXT, length=64, tokens=12_000, loss=loss, progress=False
    )
    assert report.best_step > 0
    assert report.kl_after < (0.97 if loss == "cross_entropy" else 0.9) * report.kl_before
    assert len(report.losses) == report.steps == 12_000 // 256
    assert report.validations[0] == (0, report.kl_before)
    assert report.stopped is None
    model, start = bitwright.load_model(tmp_path / "out"), bitwright.load_model(student)
    for name in model.linear_shapes():
        after, before = model.quantized(name), start.quantized(name)
        assert after is not None
        assert before is not None
        np.testing.assert_array_equal(after.codes, before.codes)
        assert after.scales.dtype == before.scales.dtype


def test_passes_of_a_step_add_up(student: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"length": 64, "tokens": 2048, "progress": False}
    whole, parts = (
        bitwright.dwq_quantize(
            DEMO,
            student,
            tmp_path / f"{size}",
            TEXT,
            batch_size=size,
            accumulate=4 // size,
            **options,
        )
        for size in (4, 1)
    )
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=2e-3)
    assert whole.kl_after == pytest.approx(parts.kl_after, rel=2e-3)


def test_patience(student: Path, tmp_path: Path) -> None:
    report = bitwright.dwq_quantize(
        DEMO,
        student,
        tmp_path / "out",
        TEXT,
        length=64,
        tokens=12_000,
        learning_rate=1.0,  # far too much
        validate_every=2,
        patience=3,
        progress=False,
    )
    assert report.steps <= report.best_step + 6
    assert report.stopped == f"no better validation KL since step {report.best_step}"


def test_plot(student: Path, tmp_path: Path) -> None:
    report = bitwright.dwq_quantize(
        DEMO, student, tmp_path / "out", TEXT, length=64, tokens=1024, progress=False
    )
    bitwright.plot_dwq(report, tmp_path / "curves.svg")
    assert "validation" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(bitwright.OutputError, match="absent"):
        bitwright.plot_dwq(report, tmp_path / "absent" / "curves.svg")


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(("method", "rate", "least"), [("rtn", 1e-3, 0.30), ("gptq", 3e-4, 0.12)])
def test_story_loses_divergence(tmp_path: Path, method: Any, rate: float, least: float) -> None:
    original = SHARED / "models" / "story"
    tokens = np.load(SHARED / "text" / "story_calibration.npy")
    text = np.load(SHARED / "text" / "story_eval.npy")[:32]
    calibration = None if method == "rtn" else tokens[:32]
    bitwright.quantize(
        original,
        tmp_path / "student",
        method,
        3,
        calibration=calibration,
        preset="fast",
        float_embeddings=True,
        progress=False,
    )
    bitwright.dwq_quantize(
        original,
        tmp_path / "student",
        tmp_path / "out",
        tokens,
        tokens=49_152,
        learning_rate=rate,
        progress=False,
    )
    before, after = (
        bitwright.evaluate(tmp_path / name, text, reference=original).kl_divergence
        for name in ("student", "out")
    )
    assert before is not None
    assert after is not None
    assert after < (1 - least) * before
