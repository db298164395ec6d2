"""What a run's products are taken in, and where it says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from demo_runs import divergence, run

import bitwright
from bitwright import _kernels, products
from bitwright.cli.main import cli
from bitwright.errors import ResumeError
from bitwright.methods.moments import LayerStatistics
from bitwright.models.operations import BlockWeights, Operations
from bitwright.products import add_cross_gram, products_for, products_in
from bitwright.ranks import Ranks
from bitwright.runs.journal import Journal

RNG = np.random.default_rng(0)
needs_bfloat16 = pytest.mark.skipif(
    not _kernels.multiplies_bfloat16(), reason="this processor has no AVX512-BF16"
)


@pytest.fixture
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor multiplies bfloat16, as far as the package knows."""
    monkeypatch.setattr(products._kernels, "multiplies_bfloat16", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("able", [True, False], indirect=True)
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_auto_takes_bfloat16_where_processor_and_weights_have_it(able: bool, stored: str) -> None:
    wanted = "bfloat16" if able and stored == "bfloat16" else "float32"
    assert products_for("auto", stored) == wanted
    assert products_for("float32", stored) == "float32"


@pytest.mark.parametrize("able", [False], indirect=True)
def test_bfloat16_by_name_is_refused_where_there_is_none(able: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision: this processor has no products in bfloat16"):
        run(tmp_path / "out", precision="bfloat16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("able", [True], indirect=True)
@pytest.mark.parametrize("others", [[True, True], [True, False], [False, True]])
def test_ranks_take_what_all_of_them_have(
    able: bool, others: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OfTwo(Ranks):
        size = 2

        def all(self, value: bool) -> bool:
            return value and all(others)

    monkeypatch.setattr(products, "current", OfTwo)
    wanted = "bfloat16" if all(others) else "float32"
    assert products_for("auto", "bfloat16") == wanted
    if not all(others):
        with pytest.raises(ValueError, match="precision: the processors of some ranks have no"):
            products_for("bfloat16", "bfloat16")


def test_other_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision: expected .*bfloat16.*, got 'half'"):
        run(tmp_path / "out", precision="half")


def rounded(*shape: int) -> Any:
    """Return numbers that bfloat16 has: their products are exact, and only the sums round."""
    return RNG.integers(-128, 128, shape).astype(np.float32) / 16


def in_operations(states: Any, weight: Any, bias: Any) -> Any:
    vectors = {} if bias is None else {"up.bias": bias}
    weights = BlockWeights(lambda name: None, {"up.weight": weight, **vectors})
    operations = Operations(weights, vectors, "rms_norm", 1e-6)
    hidden = np.ones((len(states), len(weight)), np.float32)
    operations.add_linear("up", states, hidden)
    return [operations.linear("up", states), hidden]


def in_statistics(states: Any, weight: Any, bias: Any) -> Any:
    statistics = LayerStatistics(states.shape[1])
    statistics.add(states)
    cross = np.ones((states.shape[1],) * 2, np.float32)
    add_cross_gram(states[::-1].copy(), states, cross)
    return [statistics.gather().gram, cross]


@pytest.mark.parametrize("compute", [in_operations, in_statistics])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_products_are_those_of_rounded_factors(
    compute: Callable[..., Any], has_bias: bool, tokens: int
) -> None:
    weight, bias = rounded(40, 70), rounded(40) if has_bias else None
    states = rounded(tokens, 70)
    wanted = compute(states, weight, bias)
    odd = states + np.float32(2**-14) * (states != 0)  # far from a tie: rounds to what it was
    with products_in("bfloat16"):
        found = compute(odd, weight, bias)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert products.taken_products() == "float32"


def test_gradients_in_double_precision_stay_so() -> None:
    states, weight = RNG.standard_normal((3, 9)), RNG.standard_normal((5, 9))
    out = np.empty((3, 5))
    with products_in("bfloat16"):
        products.linear(states, weight, None, out, False)
    np.testing.assert_allclose(out, states @ weight.T, rtol=1e-12)


@needs_bfloat16
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_a_run_in_bfloat16_is_as_good_and_says_so(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        report = run(out, preset=preset, precision=precision, progress=True)
        assert report.products == precision
        assert type(report).from_dict(report.as_dict()).products == precision
        said = precision == "bfloat16"
        assert ("products in bfloat16" in capsys.readouterr().err) is said
        assert ("| products | bfloat16 |" in (out / "README.md").read_text()) is said
        found[precision] = divergence(out)
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in found}
    assert weights["float32"] != weights["bfloat16"]


@needs_bfloat16
@pytest.mark.usefixtures("all_processors", "restored_threads")
def test_threads_change_no_byte_in_bfloat16(tmp_path: Path) -> None:
    found = set()
    for threads in (1, 2, 3):
        _kernels.set_num_threads(threads)
        run(tmp_path / str(threads), precision="bfloat16", samples=6)
        found.add((tmp_path / str(threads) / "model.safetensors").read_bytes())
    assert len(found) == 1


@needs_bfloat16
def test_a_run_resumes_in_its_own_precision_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", precision="bfloat16")
    with monkeypatch.context() as patch:
        commit = Journal.commit

        def interrupted(*arguments: Any) -> None:
            commit(*arguments)
            raise KeyboardInterrupt

        patch.setattr(Journal, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", precision="bfloat16")
    with pytest.raises(ResumeError, match="products"):
        run(tmp_path / "out", precision="float32")
    run(tmp_path / "out", precision="bfloat16")
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert both[0] == both[1]


def test_info_tells_of_it() -> None:
    said = CliRunner().invoke(cli, ["info"]).output
    assert f"bfloat16: {_kernels.multiplies_bfloat16()}" in said
    assert bitwright.build_info().bfloat16 is _kernels.multiplies_bfloat16()
