"""AWQ: scales, folding, clipping, metrics, and what the pipeline makes of them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from demo_runs import DEMO, copy_of_demo, divergence, run
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Array
from shared_data import SHARED, TESTS, needs_shared

import bitwright
from bitwright import _kernels
from bitwright.grids.tensor import Grid
from bitwright.methods.awq import scaled_rounding
from bitwright.methods.metrics import METRICS, channel_errors, total_error
from bitwright.models.fold import FOLD_KINDS, FoldKind

TINY = sorted((TESTS / "data" / "tiny").glob("llama-*"))


def layer(
    out: int = 24, channels: int = 64, tokens: int = 200, outliers: int = 3, seed: int = 0
) -> tuple[Array, Array]:
    """Return a weight and inputs with a few loud channels."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, channels), dtype=np.float32)
    inputs[:, rng.choice(channels, outliers, replace=False)] *= 30
    return rng.standard_normal((out, channels), dtype=np.float32), inputs


# --- the output error through the gram


@given(
    rows=st.integers(1, 40),
    channels=st.sampled_from([1, 3, 64, 255, 256, 257, 600]),
    tokens=st.integers(1, 50),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_quadratic_forms_are_the_outputs_energies(
    rows: int, channels: int, tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, channels), dtype=np.float32)
    change = rng.standard_normal((rows, channels), dtype=np.float32)
    energies = np.square(inputs.astype(np.float64) @ change.T).mean(axis=0)
    forms = _kernels.row_quadratic_forms(change, bitwright.gram(inputs))
    # An energy is small next to its terms where they cancel.
    terms = np.square(inputs).sum(axis=1).mean() * np.square(change).sum(axis=1).max()
    np.testing.assert_allclose(forms, energies, rtol=1e-4, atol=1e-6 * terms)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64]),
    grid=st.sampled_from(["affine", "zero_point", "symmetric"]),
    search=st.booleans(),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_gram_and_token_objectives_agree(
    bits: int,
    group_size: int,
    grid: bitwright.grids.tensor.Grid,
    search: bool,
    ratio: float,
    seed: int,
) -> None:
    weight, inputs = layer(seed=seed)
    others = layer(out=7, seed=seed + 1)[0]
    weights = [weight, others]
    choices = [
        bitwright.GridChoice.check(each, bits, group_size, grid, None, search) for each in weights
    ]
    scale = bitwright.awq_scale(np.abs(inputs).mean(axis=0), ratio)
    through_gram = bitwright.gram_loss(weights, choices, bitwright.gram(inputs))(scale)
    through_tokens = bitwright.token_loss(weights, choices, inputs)(scale)
    # Their last bits differ, and with them a search may take another of two grids as good.
    assert through_gram == pytest.approx(through_tokens, rel=1e-3)


def test_scaled_rounding_is_rounding_of_the_scaled_weight() -> None:
    weight, inputs = layer(out=21)
    scale = bitwright.awq_scale(np.abs(inputs).mean(axis=0), 0.5)
    choice = bitwright.GridChoice.check(weight, 3, 32)
    change = scaled_rounding(weight, scale, choice)
    direct = bitwright.quantize_rtn(weight * scale, 3, 32).dequantize() / scale - weight
    np.testing.assert_allclose(change, direct, atol=1e-5)


# --- scales


def test_scales_are_those_of_the_paper() -> None:
    magnitudes = np.array([0.5, 2, 8, 0], np.float32)
    scale = bitwright.awq_scale(magnitudes, 0.5)
    expected = magnitudes[:3] ** 0.5
    expected /= np.sqrt(expected.max() * expected.min())
    np.testing.assert_allclose(scale[:3], expected, rtol=1e-6)
    assert scale[3] == 1  # never active
    assert (bitwright.awq_scale(magnitudes, 0) == 1).all()
    assert (bitwright.awq_scale(np.zeros(4), 0.7) == 1).all()


@pytest.mark.parametrize("coarse_to_fine", [True, False])
def test_search_finds_the_least_loss(coarse_to_fine: bool) -> None:
    tried: list[Array] = []

    def loss(scale: Array) -> float:
        tried.append(scale)
        return float((np.log(scale[1] / scale[0]) / np.log(9) - 0.65) ** 2)

    search = bitwright.search_scale([1, 9], loss, coarse_to_fine=coarse_to_fine)
    assert search.ratio == 0.65
    assert len(tried) == len(search.losses) == (9 if coarse_to_fine else 20)
    assert search.losses[0.65] == min(search.losses.values())
    assert (search.scale == bitwright.awq_scale([1, 9], 0.65)).all()


def test_scaling_lowers_the_error_where_inputs_have_outliers() -> None:
    weight, inputs = layer()
    choice = bitwright.GridChoice.check(weight, 3, 64)
    loss = bitwright.gram_loss([weight], [choice], bitwright.gram(inputs))
    search = bitwright.search_scale(np.abs(inputs).mean(axis=0), loss)
    assert search.losses[search.ratio] < 0.5 * search.losses[0.0]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: bitwright.awq_scale([-1, 1], 0.5), "mean_abs"),
        (lambda: bitwright.awq_scale([np.nan, 1], 0.5), "mean_abs"),
        (lambda: bitwright.awq_scale([1, 1], 1.5), "ratio"),
        (lambda: bitwright.search_scale([1, 1], lambda _: 0.0, n_grid=0), "n_grid"),
        (lambda: bitwright.quantize_clipped(layer()[0]), "activations"),
        (
            lambda: bitwright.quantize_clipped(layer()[0], np.eye(64, dtype=np.float32), n_grid=0),
            "n_grid",
        ),
        (lambda: bitwright.quantize_clipped(layer()[0], np.eye(32, dtype=np.float32)), "gram"),
        (
            lambda: bitwright.quantize_clipped(layer()[0] * np.inf, np.eye(64, dtype=np.float32)),
            "weight",
        ),
    ],
)
def test_wrong_arguments_are_named(call: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()


# --- folding


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", FOLD_KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_what_follows_a_fold_computes_the_same(kind: FoldKind, biased: bool, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 32))
    following = rng.standard_normal((8, 32))
    scale = np.exp(rng.standard_normal(32)).astype(np.float32)
    weight = rng.standard_normal((32, 32) if kind == "linear" else 32).astype(np.float32)
    weight = weight.astype(dtype).astype(np.float32)
    if kind != "linear":
        weight[3] = 0 if kind != "offset_rms_norm" else -1  # a channel that is switched off
    bias = rng.standard_normal(32).astype(np.float32) if biased else None

    def previous(weight: Array, bias: Array | None) -> Array:
        if kind == "linear":
            outputs = x @ weight.T
        elif kind == "layer_norm":
            outputs = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) * weight
        else:
            gain = weight + (kind == "offset_rms_norm")
            outputs = x / np.sqrt(np.square(x).mean(1, keepdims=True)) * gain
        return outputs if bias is None else outputs + bias

    folded, folded_bias, exact = bitwright.fold_scale(kind, scale, weight, bias, dtype)
    assert (folded.astype(dtype).astype(np.float32) == folded).all()
    before = previous(weight, bias) @ following.T
    after = previous(folded, folded_bias) @ (following * exact).T
    rounds = dtype is not np.float32 and (biased or kind == "linear")
    assert np.abs(after - before).max() < (0.3 if rounds else 1e-4)


@pytest.mark.parametrize(
    ("kind", "scale", "weight", "name"),
    [
        ("softmax", np.ones(4), np.ones(4), "kind"),
        ("rms_norm", np.ones(3), np.ones(4), "scale"),
        ("rms_norm", np.zeros(4), np.ones(4), "scale"),
        ("linear", np.ones(4), np.ones(4), "scale"),
    ],
)
def test_wrong_folds_are_refused(kind: Any, scale: Array, weight: Array, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        bitwright.fold_scale(kind, scale.astype(np.float32), weight.astype(np.float32))


# --- clipping


def clipped_by_hand(weight: Array, gram: Array, bits: int, size: int) -> Array:
    """The error of each row's best grid for one group, over all ranges that the kernel may reach."""
    top = 2**bits - 1
    best = np.full(len(weight), np.inf)
    low, high = weight.min(1), weight.max(1)
    widest = np.maximum(high, -low)

    def try_range(bottom: Array, above: Array) -> None:
        nonlocal best_low, best_high
        scale = np.maximum((above - bottom) / np.float32(top), np.float32(2.0**-126))
        for bias in (np.rint(bottom / scale) * scale, bottom):
            codes = np.clip(np.rint((weight - bias[:, None]) / scale[:, None]), 0, top)
            change = (codes * scale[:, None] + bias[:, None] - weight).astype(np.float64)
            error = np.einsum("ri,ij,rj->r", change, gram, change)
            better = error < best
            best[better] = error[better]
            best_low = np.where(better, bottom, best_low)
            best_high = np.where(better, above, best_high)

    best_low, best_high = low, high
    shares = [np.float32(1 - step / 20) for step in range(10)]
    for share in shares:
        try_range(np.maximum(low, -share * widest), np.minimum(high, share * widest))
    above = best_high
    for share in shares[::2]:
        try_range(share * low, above)
    bottom = best_low
    for share in shares[::2]:
        try_range(bottom, share * high)
    return best


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([8, 32, 60]),
    grid=st.sampled_from(["affine", "zero_point", "symmetric"]),
    out=st.integers(1, 40),
    shift=st.sampled_from([0.0, 2.0, -2.0]),
    steps=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_clipping_by_any_measure_is_the_search_in_numpy(
    bits: int, size: int, grid: Grid, out: int, shift: float, steps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((out, size)) ** 3 + shift).astype(np.float32)
    rows[0] = 0
    costs = rng.exponential(size=size)
    choice = bitwright.GridChoice.check(rows, bits, size, grid, np.float32)

    def errors(codes: Array, scales: Array, offsets: Array) -> Array:
        change = reference.dequantize(codes, scales, offsets, grid).astype(np.float64) - rows
        sums: Array = (costs * np.abs(change)).sum(axis=1)
        return sums

    shares = np.linspace(1, 0.5, steps, dtype=np.float32)
    found = _kernels.quantize_clipped_by(rows, choice.kernel_grid, shares, errors)
    wanted = reference.clip_group(rows, choice, shares, errors)
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_a_measure_raises_arrives() -> None:
    rows = np.ones((3, 8), np.float32)
    grid = bitwright.GridChoice.check(rows, 4, 8).kernel_grid
    shares = np.ones(1, np.float32)

    def fails(*_: Array) -> Array:
        raise OverflowError("too much")

    with pytest.raises(OverflowError, match="too much"):
        _kernels.quantize_clipped_by(rows, grid, shares, fails)
    with pytest.raises(TypeError, match="errors: expected dtype float64"):
        _kernels.quantize_clipped_by(rows, grid, shares, lambda *_: np.ones(3, np.float32))
    with pytest.raises(ValueError, match="errors: axis 0 must be 3"):
        _kernels.quantize_clipped_by(rows, grid, shares, lambda *_: np.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 32, "affine"), "bits: expected 2 to 8, got 1"),
        ((4, 0, "affine"), "group_size: expected at least 1, got 0"),
        ((4, 32, "k"), "kind: expected affine, zero_point, symmetric or table, got k"),
        ((4, 32, "affine", "float64"), "scale_dtype: .*, got float64"),
    ],
)
def test_what_grids_of_kernels_are_not(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _kernels.Grid(*arguments)


def test_kernels_check_that_groups_fill_the_rows() -> None:
    weight = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match="group_size: 48 does not divide the 64 input channels"):
        _kernels.quantize_rtn(weight, np.ones(64, np.float32), _kernels.Grid(4, 48, "affine"))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [30, 32, 64])
def test_clipping_minimizes_each_groups_output_error(bits: int, size: int) -> None:
    weight, inputs = layer(out=37, channels=size)
    gram = bitwright.gram(inputs)
    tensor = bitwright.quantize_clipped(weight, gram, bits, size)
    change = (tensor.dequantize() - weight).astype(np.float64)
    found = np.einsum("ri,ij,rj->r", change, gram.astype(np.float64), change)
    np.testing.assert_allclose(found, clipped_by_hand(weight, gram, bits, size), rtol=1e-3)


@pytest.mark.parametrize("grid", ["affine", "zero_point", "symmetric"])
def test_token_metric_mse_is_the_gram(grid: bitwright.grids.tensor.Grid) -> None:
    """Two independent ways to one search: block by block of the gram, and outputs on the tokens."""
    weight, inputs = layer(channels=128)
    found = [
        bitwright.quantize_clipped(weight, gram, 3, 32, grid=grid, activations=tokens)
        for gram, tokens in ((bitwright.gram(inputs), None), (None, inputs))
    ]
    errors = [
        np.square(inputs[:, :32] @ (tensor.dequantize() - weight)[:, :32].T).mean(0)
        for tensor in found
    ]
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-3)
    assert (found[0].codes == found[1].codes).mean() > 0.95


# --- metrics


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_zero_for_equal_outputs_and_grow(name: str) -> None:
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((40, 5), dtype=np.float32)
    noise = rng.standard_normal((40, 5), dtype=np.float32)
    errors = [
        channel_errors(METRICS[name], outputs, outputs + np.float32(size) * noise)
        for size in (0, 0.05, 0.5, 5)
    ]
    assert np.abs(errors[0]).max() < 1e-6
    assert all((larger > smaller).all() for smaller, larger in pairwise(errors))


def test_metrics_are_what_they_are_called() -> None:
    reference = np.array([[1, 10], [2, 20]], np.float32)
    candidate = np.array([[2, 11], [2, 20]], np.float32)
    expected = {
        "mse": [0.5, 0.5],
        "mae": [0.5, 0.5],
        "relative": [0.5 / 2.5, 0.5 / 250],
        "cosine": [1 - 6 / np.sqrt(5 * 8), 1 - 510 / np.sqrt(500 * 521)],
    }
    for name, values in expected.items():
        errors = METRICS[name](reference, candidate)
        np.testing.assert_allclose(errors, values, atol=1e-6)
    threshold = 0.1 * np.sqrt(2.5)
    assert METRICS["huber"](reference, candidate)[0] == pytest.approx(
        threshold * (2 - threshold) / 2, rel=1e-5
    )


def test_metrics_of_the_users_own() -> None:
    reference = np.ones((3, 2), np.float32)
    candidate = reference + np.array([1, 2], np.float32)

    def worst(a: Array, b: Array) -> float:
        return float(np.abs(a - b).max())

    assert channel_errors(worst, reference, candidate).tolist() == [1, 2]
    assert total_error(worst, reference, candidate) == 2
    for broken in (lambda a, b: np.ones(7), lambda a, b: np.nan):
        with pytest.raises(ValueError, match="metric"):
            total_error(broken, reference, candidate)


# --- the pipeline


def test_awq_beats_rounding_at_equal_size(tmp_path: Path) -> None:
    reports = {
        name: run(tmp_path / name.replace("+", ""), method=name, preset="fast")
        for name in ("rtn", "awq", "gptq", "awq+gptq")
    }
    divergences = {name: divergence(tmp_path / name.replace("+", "")) for name in reports}
    assert len({report.size_bytes for report in reports.values()}) == 1
    assert divergences["awq"] < 0.85 * divergences["rtn"]
    assert divergences["awq+gptq"] < 0.95 * divergences["awq"]
    assert reports["rtn"].blocks == reports["gptq"].blocks == ()
    for block in reports["awq"].blocks:
        assert block.scaled
        assert block.loss_after < block.loss_before
        assert list(block.searches) == ["q_proj", "o_proj", "gate_proj", "down_proj"]


@pytest.mark.slow
def test_each_option_does_something(tmp_path: Path) -> None:
    """Every option of AWQ changes the result, and by itself."""
    changed: dict[str, dict[str, Any]] = {
        "plain": {},
        "no clip": {"clip": "none"},
        "clip all": {"clip": "all"},
        "n_grid": {"n_grid": 5},
        "all ratios": {"coarse_to_fine": False},
        "mae": {"metric": "mae"},
        "cosine": {"metric": "cosine"},
        "block": {"objective": "block"},
        "original": {"propagate": "original"},
        "own metric": {"metric": lambda a, b: np.abs(a - b).max(axis=0)},
    }
    weights, searched = {}, {}
    for name, options in changed.items():
        report = run(tmp_path / "out", method="awq", overwrite=True, samples=4, **options)
        weights[name] = (tmp_path / "out" / "model.safetensors").read_bytes()
        searched[name] = sum(len(s.losses) for b in report.blocks for s in b.searches.values())
    assert searched["all ratios"] == 3 * 4 * 20 > searched["plain"]
    different = {name for name, data in weights.items() if data != weights["plain"]}
    assert different >= set(changed) - {"plain", "all ratios"}


def test_blocks_fall_back_where_the_loss_is_not_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that make things worse are dropped: what is written is what rounding alone gives."""
    from bitwright.blocks import scaling

    def worst(mean_abs: Any, loss: Any, **_: Any) -> bitwright.ScaleSearch:
        rng = np.random.default_rng(0)
        scale = np.exp(3 * rng.standard_normal(len(mean_abs))).astype(np.float32)
        return bitwright.ScaleSearch(scale, 1.0, {1.0: 0.0})

    monkeypatch.setattr(scaling, "search_scale", worst)
    report = run(tmp_path / "awq", method="awq", clip="none", preset="fast")
    assert not any(block.scaled for block in report.blocks)
    assert all(block.reduction > 1 for block in report.blocks)
    run(tmp_path / "rtn", method="rtn")
    files = [tmp_path / name / "model.safetensors" for name in ("awq", "rtn")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_excluded_layers_follow_the_scales(tmp_path: Path) -> None:
    """Layers in float beside quantized ones are scaled too, so that the model stays the same."""
    run(tmp_path / "awq", method="awq", bits=8, exclude=["*.v_proj", "*.gate_proj", "*.down_proj"])
    assert divergence(tmp_path / "awq") < 1e-3


def test_constant_channels_and_dead_ones_do_no_harm(tmp_path: Path) -> None:
    model = bitwright.load_model(DEMO)
    name = "model.layers.1.post_attention_layernorm.weight"
    gain = model.checkpoint.read(name).copy()
    gain[:5] = 0
    folder = copy_of_demo(tmp_path / "model", **{name: gain})
    report = run(tmp_path / "out", model=folder, method="awq")
    assert all(np.isfinite(layer.error) for layer in report.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq", "metric": "psnr"}, "metric"),
        ({"method": "awq", "objective": "model"}, "objective"),
        ({"method": "awq", "n_grid": 0}, "n_grid"),
        ({"method": "awq", "clip": "some"}, "clip"),
        ({"method": "awq", "metric": lambda a, b: np.nan}, "metric"),
        (
            {
                "method": "awq",
                "format": "awq",
                "bits": 4,
                "overrides": {"*.up_proj": {"group_size": 32}},
            },
            "one precision",
        ),
        ({"method": "awq", "format": "awq", "bits": 3}, "4 bits"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("model", "method", "limit"),
    [
        # From shared/QUALITY.md: scale and clip, then GPTQ on top, of the prototype.
        ("story", "awq", 0.2149),
        ("story", "awq+gptq", 0.1737),
        ("small-outliers", "awq", 0.0384),
    ],
)
def test_quality_reaches_the_prototype(
    tmp_path: Path, model: str, method: str, limit: float
) -> None:
    text, samples = ("story", 32) if model == "story" else ("small", 64)
    original = SHARED / "models" / model
    bitwright.quantize(
        original,
        tmp_path / "out",
        method=method,  # type: ignore[arg-type]
        bits=3,
        calibration=np.load(SHARED / "text" / f"{text}_calibration.npy")[:samples],
        preset="fast",
        float_embeddings=True,
        progress=False,
    )
    evaluation = SHARED / "text" / f"{text}_eval.npy"
    result = bitwright.evaluate(tmp_path / "out", evaluation, reference=original)
    assert result.kl_divergence is not None
    assert result.kl_divergence < limit
