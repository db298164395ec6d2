"""Grids whose codes are vectors of a codebook: what every method does with them, next to plain NumPy."""

from typing import Any

import numpy as np
import pytest
from damped_objective import layer, objective
from numpy.typing import NDArray

import bitwright
from bitwright import QuantizedTensor, _kernels
from bitwright.formats.gguf import VECTOR_GRIDS, GgufFormat
from bitwright.grids.tables import TABLES, vectors_of
from bitwright.grids.tensor import SuperBlocks

pytestmark = pytest.mark.usefixtures("all_processors")

Array = NDArray[Any]
by_grid = pytest.mark.parametrize("grid", VECTOR_GRIDS)


def all_units(grid: str) -> Array:
    """Every choice of eight weights that a type without signs beside its vectors has, or every vector of
    four with every sign, in units of the scale."""
    kind = vectors_of(grid)
    assert kind is not None
    book = "IQ1_S" if kind.type == "IQ1_M" else kind.type
    vectors = _kernels.codebook(book).astype(np.float64)
    if kind.bits == 1:
        return np.concatenate([vectors + move for move in (-0.125, 0.125)])
    width = vectors.shape[1]
    signs = 1 - 2.0 * (np.arange(2**width)[:, None] >> np.arange(width) & 1)
    if kind.type in ("IQ2_XS", "IQ2_XXS"):
        signs = signs[np.prod(signs, axis=1) > 0]
    vectors *= np.max(TABLES[grid].points) / vectors.max()
    return (vectors[:, None] * signs).reshape(-1, width)


def rounded(grid: str, weight: Array, **options: Any) -> QuantizedTensor:
    return bitwright.quantize_rtn(
        weight, TABLES[grid].bits, None, grid=grid, grid_search=True, **options
    )


def is_stored(grid: str, tensor: QuantizedTensor) -> bool:
    """Whether what a file holds is the tensor, bit by bit, by the gguf package where there is one."""
    blocks = GgufFormat.pack("layer", tensor)["layer.weight"]
    packed = np.ascontiguousarray(blocks).view(np.uint8)
    codes, d, scale_codes = _kernels.unpack_vectors(packed, grid.upper())
    same = np.array_equal(codes, tensor.codes)
    same = same and np.array_equal(SuperBlocks(d, scale_codes).scales(), tensor.scales)
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        return same
    theirs = quants.dequantize(packed, GGMLQuantizationType[grid.upper()])
    return same and np.array_equal(theirs, tensor.dequantize())


@by_grid
def test_every_method_ends_in_what_files_hold(grid: Any) -> None:
    weight, gram = layer(9, 512, seed=1)
    weight[3, 256:] = 0
    weight[5, :32] = 0
    weight[7] = 0
    bits = TABLES[grid].bits
    plain = rounded(grid, weight)
    solved = bitwright.quantize_gptq(weight, gram, bits, None, grid=grid)
    in_order = bitwright.quantize_gptq(
        weight, gram, bits, None, grid=grid, act_order=False, static_groups=True
    )
    refined, errors = bitwright.refine(solved, weight, gram)
    for tensor in (plain, solved, in_order, refined):
        assert is_stored(grid, tensor)
        found = tensor.dequantize()
        assert not found[7].any()
        assert not found[3, 256:].any()
        assert tensor.nbytes == GgufFormat.pack("layer", tensor)["layer.weight"].nbytes
    assert solved.column_losses is not None
    expected = objective(weight, solved, gram, 0.01)
    np.testing.assert_allclose(solved.column_losses.sum(), expected, rtol=1e-3)
    np.testing.assert_allclose(errors[0], expected, rtol=1e-3)
    assert (np.diff(errors) <= 0).all()
    np.testing.assert_allclose(errors[-1], objective(weight, refined, gram, 0.01), rtol=1e-3)
    assert errors[-1] < 0.9 * errors[0] < 0.9 * objective(weight, plain, gram, 0.01)
    _, more = bitwright.refine(refined, weight, gram, rounds=4)
    assert (np.diff(more) <= 0).all()
    np.testing.assert_allclose(more[0], errors[-1], rtol=1e-3)


@by_grid
def test_vectors_are_the_nearest_ones(grid: Any) -> None:
    """Candidates are not all vectors; hardly ever another is nearer, and then not by much."""
    rng = np.random.default_rng(0)
    table = TABLES[grid]
    units = all_units(grid)
    width = units.shape[1]
    weight = (rng.standard_normal((6, 256)) * np.std(units)).astype(np.float32)
    importance = np.exp(0.5 * rng.standard_normal(256)).astype(np.float32)
    scales = np.ones((6, 256 // (table.group_size or 0)), np.float32)
    codes = _kernels.encode_vectors(weight, scales, importance, grid.upper())
    change = table.by_code[codes] - weight
    costs = (importance * change.astype(np.float64) ** 2).reshape(6, -1, width).sum(axis=2)
    distances = weight.reshape(-1, 1, width).astype(np.float64) - units
    weights = np.tile(importance, 6).reshape(-1, 1, width)
    least = (weights * distances**2).sum(axis=2).min(axis=1)
    if grid in ("iq3_xxs", "iq1_s"):  # two vectors share signs, and four a direction
        assert costs.sum() < 1.35 * least.sum()
        return
    assert (costs.reshape(-1) >= least * (1 - 1e-5)).all()
    assert (costs.reshape(-1) <= least * (1 + 1e-5)).mean() > 0.85
    assert costs.sum() < 1.02 * least.sum()


@pytest.mark.parametrize("grid", ["iq3_s", "iq2_xs", "iq1_m"])
def test_vectors_are_chosen_in_the_metric_of_the_factor(grid: Any) -> None:
    """The first unit of GPTQ has the least cost that remains once later columns have made up for it."""
    weight, gram = layer(40, 256, seed=2)
    table, units = TABLES[grid], all_units(grid)
    width = units.shape[1]
    factor = bitwright.factor_gram(gram, act_order=False)
    plain = rounded(grid, weight)
    codes = plain.codes.copy()
    _kernels.quantize_vectors(
        weight, factor.upper, factor.order, codes, plain.scales, grid.upper(), 128
    )
    inverse = np.linalg.inv(factor.upper[:width, :width].astype(np.float64))
    metric = inverse @ inverse.T

    def cost(points: Array, scale: Array) -> Array:
        errors = weight[:, None, :width] - scale * points
        found: Array = np.einsum("rui,ij,ruj->ru", errors, metric, errors)
        return found

    scale = plain.scales[:, :1, None].astype(np.float64)
    least = cost(units[None], scale).min(axis=1)
    chosen = cost(table.by_code[codes[:, None, :width]], scale)[:, 0]
    nearest = cost(table.by_code[plain.codes[:, None, :width]], scale)[:, 0]
    assert (chosen >= least * (1 - 1e-4)).all()
    assert chosen.sum() < 1.15 * least.sum()
    assert chosen.sum() < 0.9 * nearest.sum()


@by_grid
def test_importance_decides(grid: Any) -> None:
    weight, _ = layer(16, 256, seed=3)
    importance = np.where(np.arange(256) % 7 < 3, 1, 30).astype(np.float32)
    plain, weighed = rounded(grid, weight), rounded(grid, weight, importance=importance)

    def error(tensor: QuantizedTensor) -> float:
        return float((importance * (tensor.dequantize() - weight) ** 2).sum())

    assert error(weighed) < error(plain)
    assert is_stored(grid, weighed)


def test_what_is_refused() -> None:
    weight, gram = layer(4, 256, seed=4)
    with pytest.raises(ValueError, match="iq3_s has rows of multiples of 256 weights, not 192"):
        rounded("iq3_s", weight[:, :192].copy())
    with pytest.raises(ValueError, match="group_size: iq2_xs has 16, not 64; leave it out"):
        bitwright.quantize_rtn(weight, 2, 64, grid="iq2_xs")
    with pytest.raises(ValueError, match="bits: iq1_m has 1, not 4"):
        bitwright.quantize_rtn(weight, 4, None, grid="iq1_m")
    tensor = rounded("iq3_xxs", weight)
    with pytest.raises(ValueError, match="codes of iq3_xxs are chosen eight together"):
        bitwright.refine_two_sided(tensor, weight, gram, np.eye(4, dtype=np.float32))
    tensor.codes[2, 9] ^= 1
    with pytest.raises(ValueError, match="layer: has codes that are no vectors of IQ3_XXS"):
        GgufFormat.pack("layer", tensor)
    order = np.arange(256, dtype=np.int32)[::-1].copy()
    factor = bitwright.factor_gram(gram, act_order=False)
    with pytest.raises(ValueError, match="order: expected a permutation of runs of 8"):
        _kernels.quantize_vectors(
            weight, factor.upper, order, tensor.codes, tensor.scales, "IQ3_XXS", 128
        )
    with pytest.raises(ValueError, match="none with a codebook is called Q4_K"):
        _kernels.unpack_vectors(np.zeros((1, 144), np.uint8), "Q4_K")
    with pytest.raises(ValueError, match="unit: 8 does not divide the 20 channels of gram"):
        bitwright.factor_gram(np.eye(20, dtype=np.float32), unit=8)
