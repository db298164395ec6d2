"""Round-to-nearest, against MLX's own output and a reference in NumPy."""

import functools
from itertools import product

import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import DTYPES, Array
from shared_data import SHARED, needs_shared

import bitwright
from bitwright import QuantizedTensor, _kernels
from bitwright.grids.tensor import BITS, GRIDS, Grid

pytestmark = pytest.mark.usefixtures("all_processors")

SHAPES = [(1, 32), (3, 128), (16, 256), (17, 96), (35, 384)]


def gaussian(shape: tuple[int, int], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def hard(shape: tuple[int, int], seed: int, dtype: str) -> Array:
    """Weights with outliers and whole rows that are zero, of one sign, or constant."""
    rng = np.random.default_rng(seed)
    weight: Array = gaussian(shape, seed) * rng.choice([0.1, 1, 100], (shape[0], 1))
    weight[rng.random(shape) < 0.01] *= 30
    for row, kind in enumerate(rng.integers(0, 12, shape[0])):
        match kind:
            case 0:
                weight[row] = 0
            case 1:
                weight[row] = np.abs(weight[row])
            case 2:
                weight[row] = -np.abs(weight[row])
            case 3:
                weight[row] = weight[row].max()
    return weight.astype(DTYPES[dtype])


def offsets(tensor: QuantizedTensor) -> Array:
    chosen = tensor.biases if tensor.grid == "affine" else tensor.zeros
    assert chosen is not None
    return chosen


def by_group(tensor: QuantizedTensor, array: Array) -> Array:
    return array.astype(np.float64).reshape(*tensor.scales.shape, tensor.group_size)


def weighted_error(tensor: QuantizedTensor, weight: Array, importance: Array) -> Array:
    """Return each group's importance-weighted squared error."""
    change = weight.astype(np.float64) - tensor.dequantize()
    errors: Array = by_group(tensor, importance * change**2).sum(axis=2)
    return errors


@functools.cache
def golden() -> dict[str, Array]:
    with np.load(SHARED / "golden" / "mlx_quantize.npz") as file:
        return dict(file)


@needs_shared
@pytest.mark.parametrize(("bits", "group_size"), [*product(BITS, (32, 64, 128))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_grids_are_those_of_mlx(dtype: str, bits: int, group_size: int) -> None:
    case = f"{dtype.replace('loat', '')}_b{bits}_g{group_size}"
    weight = golden()["weight"]
    tensor = bitwright.quantize_rtn(weight.astype(DTYPES[dtype]), bits, group_size)
    for name, found in (("scales", tensor.scales), ("biases", tensor.biases)):
        assert found is not None
        wanted = golden()[f"{case}_{name}"]
        np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))
    if dtype == "float32":
        np.testing.assert_array_equal(bitwright.pack(tensor.codes, bits), golden()[f"{case}_codes"])


# Grids of two or three of the smallest steps of float16.
TINY = {"bits": 2, "group_size": 32, "grid": "affine", "scale_dtype": "float16"}


@settings(deadline=None, max_examples=250)
@example(shape=(3, 128), **TINY, weight_dtype="float16", power=-28, seed=115)
@example(shape=(35, 384), **TINY, weight_dtype="float32", power=-20, seed=0)
@given(
    shape=st.sampled_from(SHAPES),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([32, 64, 128, None]),
    grid=st.sampled_from(GRIDS),
    scale_dtype=st.sampled_from(list(DTYPES)),
    weight_dtype=st.sampled_from(list(DTYPES)),
    power=st.sampled_from([0, 0, -10, -14, -17, -20, -24, -28, -126, -140]),
    seed=st.integers(0, 1000),
)
def test_codes_and_grids_are_the_reference_s(
    shape: tuple[int, int],
    bits: int,
    group_size: int | None,
    grid: Grid,
    scale_dtype: str,
    weight_dtype: str,
    power: int,
    seed: int,
) -> None:
    channels = shape[1]
    size = channels if group_size is None or channels % group_size else group_size
    weight = np.ldexp(hard(shape, seed, weight_dtype).astype(np.float32), power)
    weight = weight.astype(DTYPES[weight_dtype])
    tensor = bitwright.quantize_rtn(weight, bits, size, grid=grid, scale_dtype=DTYPES[scale_dtype])
    codes, fit, clear = reference.rtn(weight, bits, size, grid, scale_dtype)
    wanted = fit.bias if grid == "affine" else fit.zero
    assert (tensor.bits, tensor.group_size, tensor.grid) == (bits, size, grid)
    assert tensor.scales.dtype == DTYPES[scale_dtype]
    for found, known in (
        (tensor.scales.astype(np.float32), fit.scale[..., 0]),
        (offsets(tensor).astype(np.float32), wanted[..., 0]),
        (by_group(tensor, tensor.codes), by_group(tensor, codes)),
    ):
        np.testing.assert_array_equal(found[clear], known[clear])
    np.testing.assert_array_equal(
        tensor.dequantize(),
        reference.dequantize(tensor.codes, tensor.scales, offsets(tensor), grid),
    )


@pytest.mark.parametrize(("grid", "scale_dtype", "bits"), [*product(GRIDS, DTYPES, BITS)])
def test_weights_inside_the_range_move_by_half_a_step(
    grid: Grid, scale_dtype: str, bits: int
) -> None:
    weight = hard((40, 128), bits, "float32")
    tensor = bitwright.quantize_rtn(weight, bits, 64, grid=grid, scale_dtype=DTYPES[scale_dtype])
    scale = tensor.scales.astype(np.float64)[..., None]
    offset = offsets(tensor).astype(np.float64)[..., None]
    top = 2**bits - 1
    ends = (
        [offset, scale * top + offset]
        if grid == "affine"
        else [-scale * offset, scale * (top - offset)]
    )
    groups = by_group(tensor, weight)
    inside = (groups >= np.minimum(*ends)) & (groups <= np.maximum(*ends))
    assert inside.mean() > 0.6
    moved = np.abs(groups - by_group(tensor, tensor.dequantize()))
    slack = 1e-6 * np.abs(groups)
    assert (moved <= np.abs(scale) / 2 + slack)[inside].all()


# grid search


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", ["zero_point", "symmetric"])
def test_no_group_is_worse_for_the_search(grid: Grid, bits: int) -> None:
    # The smallest-to-largest range is the first candidate; on the integer grids it clips nothing, so
    # whatever else the search holds against clipping, it keeps no range with a larger error.
    weight = np.random.default_rng(bits).standard_t(4, (48, 128)).astype(np.float32)
    importance = np.random.default_rng(1).exponential(size=128).astype(np.float32)
    plain, searched = (
        weighted_error(
            bitwright.quantize_rtn(
                weight, bits, 64, grid=grid, grid_search=search, importance=importance
            ),
            weight,
            importance,
        )
        for search in (False, True)
    )
    assert (searched <= plain * (1 + 1e-4)).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_search_pays_off_on_coarse_grids(grid: Grid) -> None:
    weight = np.random.default_rng(0).standard_t(4, (48, 128)).astype(np.float32)
    plain, searched = (
        weighted_error(
            bitwright.quantize_rtn(weight, 3, 64, grid=grid, grid_search=search),
            weight,
            np.ones(128),
        ).sum()
        for search in (False, True)
    )
    assert searched < 0.97 * plain


def test_search_favours_the_important_channels() -> None:
    weight = np.random.default_rng(0).standard_t(4, (48, 64)).astype(np.float32)
    important = np.abs(weight).max(axis=0) < np.median(np.abs(weight).max(axis=0))

    def error(importance: Array) -> float:
        tensor = bitwright.quantize_rtn(weight, 3, 64, grid_search=True, importance=importance)
        return float(weighted_error(tensor, weight, important.astype(np.float64)).sum())

    assert error(np.where(important, 1, 0.01)) < 0.9 * error(np.ones(64))


def test_channels_without_importance_do_not_widen_the_range() -> None:
    weight = gaussian((4, 64))
    weight[:, 5] = 1000
    importance = np.ones(64)
    importance[5] = 0
    tensor = bitwright.quantize_rtn(weight, 4, 64, importance=importance)
    assert (np.abs(tensor.scales) < 1).all()


# hard input


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((2, 64)),
        np.full((2, 64), -3.0),
        gaussian((2, 64)) * 1e-40,
        gaussian((2, 64)) * 1e-7,
        gaussian((2, 64)) * 1e4,
        np.where(np.arange(64) == 9, 6e4, gaussian((2, 64))),
        np.where(np.arange(64) == 9, -1.0, np.zeros((2, 64))),
    ],
    ids=["zeros", "constant", "subnormal", "tiny", "large", "outlier", "spike"],
)
def test_degenerate_weights_stay_finite(
    weight: Array, search: bool, grid: Grid, scale_dtype: str
) -> None:
    weight = weight.astype(np.float32)
    tensor = bitwright.quantize_rtn(
        weight, 4, 64, grid=grid, scale_dtype=DTYPES[scale_dtype], grid_search=search
    )
    restored = tensor.dequantize()
    assert np.isfinite(restored).all()
    largest = np.abs(weight).max()
    assert (np.abs(restored - weight) <= largest).all()
    if largest == 0:
        assert not restored.any()


@pytest.mark.parametrize("grid", GRIDS)
def test_huge_weights_stay_finite(grid: Grid) -> None:
    weight = gaussian((3, 64)) * np.float32(1e37)
    for scale_dtype in ("float32", "bfloat16"):
        tensor = bitwright.quantize_rtn(weight, 8, 64, grid=grid, scale_dtype=DTYPES[scale_dtype])
        np.testing.assert_allclose(tensor.dequantize(), weight, rtol=0, atol=5e35)


@pytest.mark.parametrize("grid", GRIDS)
def test_scales_that_the_dtype_cannot_hold_are_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="scale_dtype: .*float16"):
        bitwright.quantize_rtn(gaussian((3, 64)) * 1e8, grid=grid, scale_dtype=np.float16)


def test_biases_that_the_dtype_cannot_hold_are_refused() -> None:
    # The scale, about 7000, would fit.
    weight = np.linspace(-1e4, 1e5, 64, dtype=np.float32)[None]
    with pytest.raises(ValueError, match="scale_dtype: .*float16"):
        bitwright.quantize_rtn(weight, scale_dtype=np.float16)


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-5, 1e-7, 1e-40])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_codes_are_chosen_on_the_grid_that_is_stored(
    scale_dtype: str, grid: Grid, magnitude: float
) -> None:
    weight = (gaussian((4, 64)) * magnitude).astype(np.float32)
    importance = np.ones(64, np.float32)
    for search in (False, True):
        _, *numbers = _kernels.quantize_rtn(
            weight, importance, _kernels.Grid(4, 64, grid, scale_dtype, search)
        )
        for array in numbers:
            stored = array.astype(DTYPES[scale_dtype]).astype(np.float32)
            np.testing.assert_array_equal(stored, array)


def test_what_is_on_the_grid_already_does_not_move() -> None:
    tensor = bitwright.quantize_rtn(gaussian((16, 128)), 4, 64)
    codes = tensor.codes.copy()
    # Both ends of every range are used: only then does the smallest-to-largest range give it back.
    codes[:, ::64], codes[:, 1::64] = 0, 15
    weight = reference.dequantize(codes, tensor.scales, offsets(tensor), "affine")
    again = bitwright.quantize_rtn(weight, 4, 64)
    np.testing.assert_allclose(again.dequantize(), weight, rtol=0, atol=1e-6)


# wrong arguments


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    weight = gaussian((20, 64))
    weight[17, 40] = value
    with pytest.raises(bitwright.NonFiniteError, match=r"weight: .*\[17, 40\]"):
        bitwright.quantize_rtn(weight)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"group_size": 48}, ValueError, "group_size: 48 .*128"),
        ({"group_size": 256}, ValueError, "group_size: 256"),
        ({"group_size": 0}, ValueError, "group_size: 0"),
        ({"group_size": -2}, ValueError, "group_size: -2"),
        ({"bits": 1}, ValueError, "bits: .*1"),
        ({"bits": 7}, ValueError, "bits: .*7"),
        ({"bits": 16}, ValueError, "bits: .*16"),
        ({"grid": "log"}, ValueError, "grid: .*log"),
        ({"scale_dtype": np.float64}, ValueError, "scale_dtype: .*float64"),
        ({"scale_dtype": np.int8}, ValueError, "scale_dtype: .*int8"),
        ({"weight": np.zeros((4, 128), np.int32)}, TypeError, "weight: .*int32"),
        ({"weight": [[0.0] * 128]}, TypeError, "weight: .*list"),
        ({"weight": np.zeros(128, np.float32)}, ValueError, "weight: .*128"),
        ({"weight": np.zeros((0, 128), np.float32)}, ValueError, "weight: .*0, 128"),
        ({"importance": np.ones(64)}, ValueError, "importance: .*64"),
        ({"importance": -np.ones(128)}, ValueError, "importance: .*negative"),
        ({"importance": np.full(128, np.nan)}, ValueError, "importance: .*finite"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, object], kind: type[Exception], message: str
) -> None:
    right: dict[str, object] = {"weight": gaussian((4, 128)), "group_size": 64}
    with pytest.raises(kind, match=f"^{message}"):
        bitwright.quantize_rtn(**(right | arguments))  # type: ignore[arg-type]


def test_whole_rows_have_two_names() -> None:
    weight = gaussian((5, 96))
    for name in (None, -1, 96):
        tensor = bitwright.quantize_rtn(weight, 4, name)
        assert tensor.group_size == 96
        assert tensor.scales.shape == (5, 1)
