"""K grids: scales that are codes themselves, what methods do with them, and weights that are unusual."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import reference
from damped_objective import layer, objective
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import DTYPES

import bitwright
from bitwright import QuantizedTensor
from bitwright.grids.superblocks import closed_form, fit_superblocks
from bitwright.grids.tensor import K_GRIDS, SUPERBLOCK, SuperBlocks

pytestmark = pytest.mark.usefixtures("all_processors")

Array = NDArray[Any]
by_bits = pytest.mark.parametrize("bits", K_GRIDS)
LARGEST = float(np.finfo(np.float16).max)


def rounded(weight: Array, bits: int, **options: Any) -> QuantizedTensor:
    return bitwright.quantize_rtn(weight, bits, None, grid="k", **options)


def superblocks(tensor: QuantizedTensor) -> SuperBlocks:
    assert tensor.superblocks is not None
    return tensor.superblocks


def error(tensor: QuantizedTensor, weight: Array) -> float:
    """The squared error, relative to the weights."""
    wide = weight.astype(np.float64)
    return float(np.square(tensor.dequantize() - wide).sum() / np.square(wide).sum())


def is_array(values: Array | None, dtype: str, shape: tuple[int, int]) -> bool:
    return values is not None and values.dtype.name == dtype and values.shape == shape


def check(tensor: QuantizedTensor, bits: int, shape: tuple[int, int]) -> None:
    """Everything about a tensor that its file takes for granted, and its weights in plain NumPy."""
    kind, blocks = K_GRIDS[bits], superblocks(tensor)
    assert (tensor.bits, tensor.group_size, tensor.grid) == (bits, kind.group_size, kind.grid)
    assert is_array(tensor.codes, "uint8", shape)
    assert tensor.codes.max() < 2**bits
    super_shape = (shape[0], shape[1] // SUPERBLOCK)
    groups = (shape[0], shape[1] // kind.group_size)
    low, high = kind.scale_codes
    assert is_array(blocks.d, "float16", super_shape)
    assert np.isfinite(blocks.d).all()
    assert is_array(blocks.scale_codes, "int8", groups)
    assert low <= blocks.scale_codes.min() <= blocks.scale_codes.max() <= high
    per = SUPERBLOCK // kind.group_size
    scales = np.repeat(blocks.d.astype(np.float32), per, axis=1) * blocks.scale_codes
    assert tensor.scales.dtype == np.float32
    np.testing.assert_array_equal(tensor.scales, scales)
    assert (scales != 0).all()  # which codes are found by dividing by
    if kind.grid == "symmetric":
        for absent in (blocks.dmin, blocks.min_codes, tensor.biases):
            assert absent is None
        assert (tensor.zeros == 2 ** (bits - 1)).all()
        offsets: Array = np.full(groups, 2 ** (bits - 1), np.uint8)
    else:
        assert blocks.dmin is not None
        assert blocks.min_codes is not None
        assert is_array(blocks.dmin, "float16", super_shape)
        assert np.isfinite(blocks.dmin).all()
        assert is_array(blocks.min_codes, "uint8", groups)
        assert blocks.min_codes.max() <= high
        offsets = -np.repeat(blocks.dmin.astype(np.float32), per, axis=1) * blocks.min_codes
        np.testing.assert_array_equal(tensor.biases, offsets)
    wanted = reference.dequantize(tensor.codes, scales, offsets, kind.grid)
    np.testing.assert_array_equal(tensor.dequantize(), wanted)


def check_codes_are_nearest(tensor: QuantizedTensor, weight: Array) -> None:
    scales, offsets = (np.repeat(each, tensor.group_size, axis=1) for each in tensor.grids())
    codes = np.arange(2**tensor.bits, dtype=np.float64)[:, None, None]
    points = scales * codes + offsets if tensor.grid == "affine" else scales * (codes - offsets)
    wide = weight.astype(np.float64)
    least = np.abs(points - wide).min(axis=0)
    excess = np.abs(tensor.dequantize() - wide) - least
    assert (excess <= 1e-5 * np.abs(scales) + 1e-6 * np.abs(wide)).all()


# weights of many kinds


@by_bits
@settings(deadline=None, max_examples=10)
@given(
    out=st.integers(1, 9),
    blocks=st.integers(1, 3),
    spread=st.floats(0, 3),
    size=st.sampled_from([1e-3, 0.05, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 0.0, 3.0, -3.0]),
    sparse=st.sampled_from([0.0, 0.0, 0.9]),
    dtype=st.sampled_from([*DTYPES]),
    search=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_scales_are_products_and_codes_the_nearest(
    bits: int,
    out: int,
    blocks: int,
    spread: float,
    size: float,
    shift: float,
    sparse: float,
    dtype: str,
    search: bool,
    weighted: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.standard_normal((out, 16 * blocks, 16)) + shift
    groups *= size * np.exp(spread * rng.standard_normal((out, 16 * blocks, 1)))
    groups *= rng.random(groups.shape) >= sparse
    weight = np.clip(groups, -6e4, 6e4).reshape(out, -1).astype(DTYPES[dtype])
    importance = rng.exponential(size=weight.shape[1]) ** 3 if weighted else None
    tensor = rounded(weight, bits, grid_search=search, importance=importance)
    check(tensor, bits, (out, 256 * blocks))
    check_codes_are_nearest(tensor, weight)


@by_bits
@pytest.mark.parametrize("search", [False, True])
def test_a_code_more_halves_the_steps(bits: int, search: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 512), dtype=np.float32)
    found = error(rounded(weight, bits, grid_search=search), weight)
    assert found < (0.12 if bits == 2 else 2.8 * 4.0**-bits)
    if search:
        assert found < error(rounded(weight, bits), weight)


@by_bits
@pytest.mark.parametrize("search", [False, True])
def test_zeros_stay_zeros_and_cost_their_neighbours_nothing(bits: int, search: bool) -> None:
    rng = np.random.default_rng(0)
    weight = (0.02 * rng.standard_normal((6, 512))).astype(np.float32)
    plain = error(rounded(weight, bits, grid_search=search), weight)
    weight[0] = 0  # a row
    weight[1, :256] = 0  # a superblock
    weight[2:, 32:64] = 0  # a group, or two
    tensor = rounded(weight, bits, grid_search=search)
    check(tensor, bits, (6, 512))
    groups = weight.reshape(6, -1, tensor.group_size)
    empty = np.repeat(~groups.any(axis=2), tensor.group_size, axis=1)
    assert not tensor.dequantize()[empty].any()
    assert error(tensor, weight) < 1.3 * plain
    gram = layer(1, 512, 0)[1]
    refined, _ = bitwright.refine(
        bitwright.quantize_gptq(weight, gram, bits, None, grid="k"), weight, gram
    )
    check(refined, bits, (6, 512))
    assert not refined.dequantize()[0].any()


@by_bits
def test_channels_that_are_never_active_cost_the_others_nothing(bits: int) -> None:
    rng = np.random.default_rng(1)
    weight = (0.02 * rng.standard_normal((8, 512))).astype(np.float32)
    importance = np.ones(512)
    importance[32:64] = importance[256:] = 0
    live = importance > 0
    tensor = rounded(weight, bits, grid_search=True, importance=importance)
    check(tensor, bits, (8, 512))
    change = np.square(tensor.dequantize() - weight)[:, live].sum()
    everywhere = rounded(weight, bits, grid_search=True).dequantize()
    assert change < 1.1 * np.square(everywhere - weight)[:, live].sum()


@by_bits
@pytest.mark.parametrize("value", [0.37, -0.37, 5e-3, -1e3])
def test_constant_groups(bits: int, value: float) -> None:
    weight = np.full((2, 512), value, np.float32)
    weight[1, ::2] = 0
    for search in (False, True):
        tensor = rounded(weight, bits, grid_search=search)
        check(tensor, bits, (2, 512))
        # The symmetric grid of rounding cuts half a step off the largest weight.
        assert error(tensor, weight) < (1e-3 if search else 0.03)


@by_bits
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_of_one_sign(bits: int, sign: int) -> None:
    rng = np.random.default_rng(0)
    weight = (sign * rng.uniform(0.5, 1.5, (4, 256))).astype(np.float32)
    for search in (False, True):
        tensor = rounded(weight, bits, grid_search=search)
        check(tensor, bits, (4, 256))
        assert error(tensor, weight) < 0.06 * 4.0 ** (2 - bits) * (1 if search else 1.5)


@by_bits
def test_scales_of_huge_ratios_in_one_superblock(bits: int) -> None:
    rng = np.random.default_rng(0)
    ratios = np.repeat(10.0 ** np.linspace(-6, 3, 8), 32)
    weight = (rng.standard_normal((4, 256)) * ratios).astype(np.float32)
    for search in (False, True):
        tensor = rounded(weight, bits, grid_search=search)
        check(tensor, bits, (4, 256))
        check_codes_are_nearest(tensor, weight)
        assert error(tensor, weight) < 0.15


@by_bits
@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-40])
def test_tiny_weights(bits: int, size: float) -> None:
    """The least scale above zero is 2⁻²⁴: weights near it are coarse, smaller ones about zero."""
    weight = (size * np.random.default_rng(0).standard_normal((4, 512))).astype(np.float32)
    tensor = rounded(weight, bits, grid_search=True)
    check(tensor, bits, (4, 512))
    assert np.abs(tensor.dequantize() - weight).max() <= max(2.0**-24, 4 * size)
    if size == 1e-6:
        assert error(tensor, weight) < 0.1


# float16 ends at 65504


@by_bits
@pytest.mark.parametrize("share", [0.99, 0.85, 1e3])
def test_scales_up_to_the_largest_of_float16(bits: int, share: float) -> None:
    kind = K_GRIDS[bits]
    largest = max(map(abs, kind.scale_codes)) * LARGEST * share
    if kind.grid == "symmetric":
        largest *= (2**bits - 1) / 2
    weight = np.full((2, 256), largest, np.float32)
    weight[:, ::2] *= -1
    if share > 1:
        with pytest.raises(ValueError, match=r"^weight: its scales are more than float16 can hold"):
            rounded(weight, bits)
        with pytest.raises(ValueError, match=r"^weight: its scales are more than float16 can hold"):
            bitwright.quantize_gptq(weight, np.eye(256, dtype=np.float32), bits, None, grid="k")
        return
    tensor = rounded(weight, bits, grid_search=True)
    check(tensor, bits, (2, 256))
    assert error(tensor, weight) < 0.03


@by_bits
@pytest.mark.parametrize("cost", [1e-38, 1e38])
def test_importance_of_any_size(bits: int, cost: float) -> None:
    rng = np.random.default_rng(0)
    scales = rng.uniform(1, 30, (3, 512 // K_GRIDS[bits].group_size)).astype(np.float32)
    offsets = -scales * np.float32(2 ** (bits - 1))
    one, other = (
        fit_superblocks(scales, offsets, np.full(512, each, np.float32), bits)
        for each in (cost, 1.0)
    )
    for field in fields(SuperBlocks):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


# the same bits as in NumPy


def drawn_groups(bits: int, seed: int, spread: float, size: float) -> tuple[Array, Array, Array]:
    """Scales and offsets of groups of all sizes, some of them empty, and what channels cost."""
    rng = np.random.default_rng(seed)
    channels = 256 * int(rng.integers(1, 4))
    shape = (int(rng.integers(1, 8)), channels // K_GRIDS[bits].group_size)
    scales = size * np.exp(spread * rng.standard_normal(shape)) * rng.choice([0, 1, 1, 1], shape)
    offsets = size * 2**bits * rng.standard_normal(shape) * rng.choice([0, 1, 1], shape)
    importance = rng.exponential(size=channels) ** 3 * rng.choice([0, 1, 1], channels)
    if K_GRIDS[bits].grid == "symmetric":
        scales *= rng.choice([-1, 1], shape)
        offsets[:] = 2 ** (bits - 1)
    importance *= rng.choice([1e-30, 1, 1e30])
    scales, offsets, importance = (
        each.astype(np.float32) for each in (scales, offsets, importance)
    )
    return scales, offsets, importance


sizes = st.sampled_from([1e-12, 2e-7, 1e-6, 1e-4, 0.05, 1.0, 900.0, 2e4, 1e30])


@by_bits
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), spread=st.floats(0, 4), size=sizes)
def test_superblocks_have_the_bits_of_numpy(
    bits: int, seed: int, spread: float, size: float
) -> None:
    scales, offsets, importance = drawn_groups(bits, seed, spread, size)
    with np.errstate(all="ignore"):
        try:
            wanted = reference.fit_superblocks(scales, offsets, importance, bits)
        except ValueError as error:
            with pytest.raises(ValueError, match=f"^{error}$"):
                fit_superblocks(scales, offsets, importance, bits)
            return
    found = fit_superblocks(scales, offsets, importance, bits)
    for field in fields(SuperBlocks):
        mine, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if theirs is None:
            assert mine is None
        else:
            assert (mine.dtype, mine.tobytes()) == (theirs.dtype, theirs.tobytes()), field.name


@by_bits
# The same examples each time: of products that vanish the sign may be another than NumPy's.
@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-38, 1e-6, 0.05, 1.0, 1e15]),
    cost=st.sampled_from([0.0, 1e-38, 1.0, 1e38]),
    few=st.booleans(),
)
def test_closed_forms_have_the_bits_of_numpy(
    bits: int, seed: int, size: float, cost: float, few: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = (size * rng.standard_normal((5, 512))).astype(np.float32)
    codes = rng.integers(0, 2 if few else 2**bits, (5, 512)).astype(np.uint8)
    codes[0, :64] = 1  # which says nothing
    importance = (cost * np.minimum(rng.exponential(size=512), 3)).astype(np.float32)
    importance[rng.random(512) < 0.2] = 0
    with np.errstate(all="ignore"):
        wanted = reference.closed_form(weight, codes, importance, bits)
    for mine, theirs in zip(closed_form(weight, codes, importance, bits), wanted, strict=True):
        assert mine.dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs))
        known = ~np.isnan(mine)
        assert mine[known].tobytes() == theirs[known].tobytes()


# GPTQ and refinement


@by_bits
@settings(deadline=None, max_examples=4)
@given(
    out=st.integers(1, 12),
    blocks=st.integers(1, 2),
    method=st.sampled_from(["rtn", "gptq"]),
    act_order=st.booleans(),
    search=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_objective_never_rises(
    bits: int, out: int, blocks: int, method: str, act_order: bool, search: bool, seed: int
) -> None:
    weight, gram = layer(out, 256 * blocks, seed)
    start = rounded(weight, bits, grid_search=search)
    if method == "gptq":
        start = bitwright.quantize_gptq(
            weight,
            gram,
            bits,
            None,
            grid="k",
            act_order=act_order,
            static_groups=True,
            grid_search=search,
        )
        assert isinstance(start, bitwright.GptqTensor)
        assert start.column_losses is not None
        wanted = objective(weight, start, gram, start.damping)
        assert start.column_losses.sum() == pytest.approx(wanted, rel=1e-2)
    check(start, bits, weight.shape)
    refined, errors = bitwright.refine(start, weight, gram, rounds=3)
    check(refined, bits, weight.shape)
    assert isinstance(refined, type(start))
    assert (np.diff(errors) <= 0).all()
    assert errors[-1] < errors[0]
    for tensor, found in ((start, errors[0]), (refined, errors[-1])):
        assert found == pytest.approx(objective(weight, tensor, gram, 0.01), rel=5e-3)


@by_bits
def test_every_step_is_worth_something(bits: int) -> None:
    """On scales that are quantized as well, GPTQ beats rounding and refinement beats both."""
    weight, gram = layer(48, 512, 7)
    importance = gram.diagonal()
    plain = objective(weight, rounded(weight, bits), gram, 0.01)
    searched = rounded(weight, bits, grid_search=True, importance=importance)
    gptq = bitwright.quantize_gptq(weight, gram, bits, None, grid="k")
    refined, errors = bitwright.refine(gptq, weight, gram)
    found = [objective(weight, each, gram, 0.01) for each in (searched, gptq, refined)]
    assert found[1] < 0.7 * min(plain, found[0])
    assert found[2] < found[1]
    assert errors[-1] == pytest.approx(found[2], rel=5e-3)
    # Superblocks are fitted again where that helps.
    assert (superblocks(refined).d != superblocks(gptq).d).any()


@by_bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_gptq_reads_weights_of_any_dtype(bits: int, dtype: str) -> None:
    weight, gram = layer(5, 256, 1)
    stored = weight.astype(DTYPES[dtype])
    tensor = bitwright.quantize_gptq(stored, gram, bits, None, grid="k", scale_dtype=np.float16)
    check(tensor, bits, (5, 256))
    wide = bitwright.quantize_gptq(stored.astype(np.float32), gram, bits, None, grid="k")
    np.testing.assert_array_equal(tensor.codes, wide.codes)


def test_refining_keeps_the_better_rows_of_both() -> None:
    weight, _ = layer(24, 256, 2)
    tensor = rounded(weight, 3, grid_search=True)
    blocks = superblocks(tensor)
    chosen = np.arange(24) % 3 == 0
    other = superblocks(rounded(weight * np.float32(2), 3))
    mixed = blocks.replaced(chosen, other)
    for field in fields(SuperBlocks):
        one, two, both = (getattr(each, field.name) for each in (blocks, other, mixed))
        if one is None:
            assert both is None
            continue
        np.testing.assert_array_equal(both, np.where(chosen[:, None], two, one))
        assert both.dtype == one.dtype
    part = tensor.rows(3, 7)
    check(part, 3, (4, 256))
    np.testing.assert_array_equal(part.dequantize(), tensor.dequantize()[3:7])


# wrong arguments


@pytest.mark.parametrize(
    ("channels", "bits", "size", "message"),
    [
        (256, 4, 64, "group_size: k grids of 4 bits have 32, not 64"),
        (256, 2, 32, "group_size: k grids of 2 bits have 16, not 32"),
        (256, 6, -1, "group_size: k grids of 6 bits"),
        (256, 8, None, "grid: k has 2, 3, 4, 5, 6 bits"),
        (200, 4, None, "multiples of 256 weights, not 4 bits and 200"),
        (128, 4, 32, "multiples of 256"),
    ],
)
def test_what_k_grids_are_not(channels: int, bits: int, size: int | None, message: str) -> None:
    weight, gram = np.ones((2, channels), np.float32), np.eye(channels, dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        bitwright.quantize_rtn(weight, bits, size, grid="k")
    with pytest.raises(ValueError, match=message):
        bitwright.quantize_gptq(weight, gram, bits, size, grid="k")


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_needs_static_groups(act_order: bool) -> None:
    weight, gram = np.ones((2, 256), np.float32), np.eye(256, dtype=np.float32)
    options: dict[str, Any] = {"grid": "k", "act_order": act_order}
    with pytest.raises(ValueError, match="static_groups"):
        bitwright.quantize_gptq(weight, gram, 4, None, static_groups=False, **options)
    if not act_order:  # where they are not what is taken by default
        with pytest.raises(ValueError, match="static_groups: k grids need them"):
            bitwright.quantize_gptq(weight, gram, 4, None, **options)


@by_bits
def test_scales_must_be_the_products(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((2, 256), dtype=np.float32)
    tensor = rounded(weight, bits)
    given: dict[str, Any] = {each.name: getattr(tensor, each.name) for each in fields(tensor)}
    wrong = tensor.scales.copy()
    wrong[1, 3] *= 2
    with pytest.raises(ValueError, match="superblocks: .* not their products"):
        QuantizedTensor(**{**given, "scales": wrong})
    if tensor.biases is not None:
        with pytest.raises(ValueError, match="superblocks: .* not their products"):
            QuantizedTensor(**{**given, "biases": tensor.biases + 1})


# symmetric grids with scales of both signs


@settings(deadline=None, max_examples=25)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([16, 32, 64]),
    tails=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_search_never_raises_the_error_of_a_symmetric_grid(
    bits: int, size: int, tails: bool, weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((6, 192)).astype(np.float32)
    if tails:
        weight **= 3
    importance = rng.exponential(size=192).astype(np.float32) if weighted else np.ones(192)

    def errors(weight: Array, search: bool) -> Array:
        tensor = bitwright.quantize_rtn(
            weight, bits, size, grid="symmetric", grid_search=search, importance=importance
        )
        change = importance * np.square(tensor.dequantize().astype(np.float64) - weight)
        sums: Array = change.reshape(6, -1, size).sum(axis=2)
        return sums

    searched = errors(weight, True)
    assert (searched <= (1 + 1e-4) * errors(weight, False)).all()
    # There is a code more on one side; which side that is follows from the weights.
    np.testing.assert_allclose(searched, errors(-weight, True), rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_code_more_is_on_the_side_of_the_largest_weight(bits: int, sign: int) -> None:
    weight = np.random.default_rng(0).uniform(-0.6, 0.6, (8, 32)).astype(np.float32)
    weight[:, 5] = sign
    found = bitwright.quantize_rtn(weight, bits, 32, grid="symmetric", grid_search=True)
    plain = bitwright.quantize_rtn(weight, bits, 32, grid="symmetric")
    assert (np.sign(found.scales) == -sign).all()
    assert (plain.scales > 0).all()
    assert error(found, weight) < error(plain, weight)
    assert (found.codes[:, 5] == 0).all()
    assert np.isfinite(found.scales).all()
    np.testing.assert_array_equal(
        found.dequantize(),
        reference.dequantize(found.codes, found.scales, np.asarray(found.zeros), "symmetric"),
    )
