"""Grids of GGUF whose scales and mins of groups are codes with one scale for 256 weights."""

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.grids.tables import TABLES, vectors_of
from bitwright.grids.tensor import Grid, SuperBlocks

Float32 = NDArray[np.float32]


def fit_superblocks(
    scales: Float32, offsets: Float32, importance: Float32, bits: int, grid: Grid = "k"
) -> SuperBlocks:
    """Return the superblocks nearest to scales and biases of groups that were fitted one by one.

    Parameters
    ----------
    scales, offsets
        ``[out, groups]`` of the base grid of `K_GRIDS`; offsets are biases if it is affine.
    importance
        ``[in]`` what an error costs in each channel.
    bits, grid
        Of the codes; "k", or a table with superblocks.

    Raises
    ------
    ValueError
        If a scale is too large for float16.
    """
    found = _kernels.fit_superblocks(scales, offsets, importance, bits, kernel_table(grid))
    if found is None:
        raise ValueError(
            f"weight: its scales are more than float16 can hold; use another grid than {grid}"
        )
    blocks = SuperBlocks(*found)
    if vectors_of(grid) is not None:  # whose scales have no code for zero
        blocks.d[~scales.reshape(*blocks.d.shape, -1).any(axis=2)] = 0
    elif grid in TABLES:  # of which no point need be zero
        blocks.scale_codes[scales == 0] = 0
    return blocks


def kernel_table(grid: Grid) -> str:
    """Return what kernels call a table with superblocks, nothing for "k"."""
    vectors = vectors_of(grid)
    return "" if grid not in TABLES else grid if vectors is None else vectors.type


def closed_form(
    weight: Float32, codes: NDArray[np.uint8], importance: Float32, bits: int, grid: Grid = "k"
) -> tuple[Float32, Float32]:
    """Return the scales and offsets of each group with the least ``Σ importance (weight - decoded)²``.

    Parameters
    ----------
    weight, codes
        ``[out, in]``.
    importance
        ``[in]``.
    bits, grid
        Of the codes; "k", or a table with superblocks.

    Returns
    -------
    scales, offsets
        ``[out, groups]``; scales are NaN where all codes of a group are the same, which says nothing.
    """
    points = TABLES[grid].by_code if grid in TABLES else None
    return _kernels.closed_form(weight, codes, importance, bits, points, kernel_table(grid))


def expanded(blocks: SuperBlocks, bits: int, grid: Grid = "k") -> tuple[Float32, Float32]:
    """Return scales and offsets as kernels take them."""
    scales, biases = blocks.scales(), blocks.biases()
    if biases is None:
        biases = np.full_like(scales, 0 if grid in TABLES else 2 ** (bits - 1))
    return scales, biases
