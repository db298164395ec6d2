"""Output metrics against gradients that are summed up at once."""

from pathlib import Path

import numpy as np
import pytest
from demo_runs import DEMO
from numpy.typing import NDArray

import bitwright
from bitwright import _kernels
from bitwright.blocks import output_metrics
from bitwright.blocks.output_metrics import DRAWS, GradientPlan, OutputMetrics, plan_gradients
from bitwright.checkpoint.work_folder import GRADIENTS, WorkFolder
from bitwright.errors import MemoryBudgetError, ResumeError
from bitwright.loading.model import load_model
from bitwright.methods.two_sided import METRIC_ROWS, normalized_metric
from bitwright.models.network import Network
from bitwright.models.operations import Float, Float32

MODEL = load_model(DEMO)
TOKENS = np.random.default_rng(0).integers(0, 200, (10, 24)).astype(np.int32)
SEED = 3


def drawn(logits: NDArray[np.float32], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares = shares.cumsum(axis=1) / shares.sum(axis=1, keepdims=True)
    return np.minimum((shares <= uniform[:, None]).sum(axis=1), logits.shape[1] - 1)


def test_tokens_are_drawn_from_the_distribution() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 67)).astype(np.float32) * 3
    uniform = rng.random(len(logits))
    uniform[:2] = 0, np.nextafter(1, 0)
    found = _kernels.draw_tokens(logits, uniform)
    wanted = drawn(logits, uniform)
    assert (found != wanted).mean() < 1e-3  # exp() differs in the last bits
    again = _kernels.draw_tokens(np.repeat(logits[:1], 4000, axis=0), rng.random(4000))
    counts = np.bincount(again, minlength=67) / 4000
    shares = np.exp(logits[0] - logits[0].max())
    assert abs(counts - shares / shares.sum()).max() < 0.04


def gathered(
    folder: Path, samples: int = 2, seed: int = SEED, tokens: NDArray[np.int32] = TOKENS
) -> dict[str, Float32]:
    with WorkFolder(folder / "out", GRADIENTS) as work:
        plan = GradientPlan(samples, 0, 0)
        metrics = OutputMetrics(MODEL, tokens, seed, work, plan)
        metrics.gather(resume=True, progress=False)
        found = {name: metrics.of(name) for name in MODEL.linear_shapes()}
        work.keep = False
    return {name: metric for name, metric in found.items() if metric is not None}


def summed_at_once() -> dict[str, Float32]:
    sums: dict[str, NDArray[np.float64]] = {}
    shapes = MODEL.linear_shapes()
    for draw in range(DRAWS):
        uniform = np.concatenate(
            [
                np.random.default_rng([SEED, sample, draw]).random(TOKENS.shape[1])
                for sample in range(len(TOKENS))
            ]
        )

        def loss(
            first: int,
            logits: Float32,
            gradient: Float32 | None,
            uniform: NDArray[np.float64] = uniform,
        ) -> NDArray[np.float64]:
            rows = np.arange(len(logits))
            exact = logits.astype(np.float64)
            shares = np.exp(exact - exact.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            shares[rows, drawn(logits, uniform[first : first + len(logits)])] -= 1
            assert gradient is not None
            gradient[...] = shares
            return np.zeros(len(logits))

        def add(name: str, inputs: Float, above: Float) -> None:
            if name in shapes:
                g, x = above.astype(np.float64), inputs.astype(np.float64)
                sums.setdefault(name, np.zeros((g.shape[1],) * 2))
                sums[name] += (g * np.square(x).sum(axis=1, keepdims=True)).T @ g

        Network(MODEL).gradients(TOKENS, loss, add)
    found = {}
    for name, total in sums.items():
        blocks = np.zeros((len(total), min(METRIC_ROWS, len(total))), np.float32)
        for first in range(0, len(total), METRIC_ROWS):
            rows = slice(first, min(first + METRIC_ROWS, len(total)))
            blocks[rows, : rows.stop - first] = total[rows, rows]
        metric = normalized_metric(blocks)
        assert metric is not None
        found[name] = metric
    return found


def test_metrics_are_second_moments_of_gradients(tmp_path: Path) -> None:
    found, wanted = gathered(tmp_path), summed_at_once()
    assert found.keys() == wanted.keys() == MODEL.linear_shapes().keys()
    for name, metric in found.items():
        np.testing.assert_allclose(metric, wanted[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_batches_do_not_change_bits_and_draws_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_metrics, "PARTS", 1)
    tokens = np.random.default_rng(1).integers(0, 200, (32, 64)).astype(np.int32)
    plan = plan_gradients(MODEL, tokens, None)
    step = plan_gradients(MODEL, tokens, plan.least_bytes / 1e9 + 0.001).samples
    first, larger, other = (
        gathered(tmp_path, *arguments, tokens)
        for arguments in ((step, 0), (2 * step, 0), (step, 1))
    )
    for name, metric in first.items():
        np.testing.assert_array_equal(metric, larger[name])
        assert (metric != other[name]).any()


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """Gather until so many parts are complete; return the work folder that is left."""
    compute, done = OutputMetrics._compute, list[int]()

    def stop(self: OutputMetrics, part: int) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        compute(self, part)
        done.append(part)

    with monkeypatch.context() as patch:
        patch.setattr(OutputMetrics, "_compute", stop)
        with pytest.raises(KeyboardInterrupt):
            gathered(folder)
    return folder / f".out.{GRADIENTS}.work"


def test_what_was_interrupted_resumes_after_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gathered(tmp_path)
    work = interrupted(tmp_path, monkeypatch, 3)
    assert len(list(work.glob("part-*.json"))) == 3
    damaged = work / "part-1" / "2.npy"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\1\2\3\4")
    computed, compute = list[int](), OutputMetrics._compute

    def count(self: OutputMetrics, part: int) -> None:
        computed.append(part)
        compute(self, part)

    monkeypatch.setattr(OutputMetrics, "_compute", count)
    resumed = gathered(tmp_path)
    assert computed == [1, 3, 4, 5, 6, 7]  # the damaged one, and those that were not there
    for name, metric in whole.items():
        np.testing.assert_array_equal(metric, resumed[name])
    assert not work.exists()


def test_other_draws_are_refused_when_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch, 1)
    with pytest.raises(ResumeError, match="seed of the draws"):
        gathered(tmp_path, seed=SEED + 1)


def test_gradients_keep_within_their_budget() -> None:
    tokens = np.zeros((64, 256), np.int32)
    plan = plan_gradients(MODEL, tokens, None)
    assert plan.samples == 8
    assert plan.least_bytes < plan.memory_bytes
    small = plan_gradients(MODEL, tokens, plan.least_bytes / 1e9 + 0.001)
    assert small.samples < plan.samples
    assert small.memory_bytes < plan.memory_bytes
    with pytest.raises(MemoryBudgetError, match="or take preset default"):
        plan_gradients(MODEL, tokens, plan.least_bytes / 1e9 - 0.01)


def test_a_layer_without_gradients_has_no_metric(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", GRADIENTS) as work:
        metrics = OutputMetrics(MODEL, TOKENS, 0, work, GradientPlan(4, 0, 0))
        metrics.gather(resume=True, progress=False)
        assert metrics.of("lm_head") is None
    assert output_metrics.PARTS >= bitwright.ranks.LEAVES
