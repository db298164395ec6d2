"""The "k" grids of GGUF: scales and mins of groups as codes with one scale for 256 weights."""

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.grids.tensor import SuperBlocks

Float32 = NDArray[np.float32]


def fit_superblocks(
    scales: Float32, offsets: Float32, importance: Float32, bits: int
) -> SuperBlocks:
    """Return the superblocks nearest to scales and biases of groups that were fitted one by one.

    Parameters
    ----------
    scales, offsets
        ``[out, groups]`` of the base grid of `K_GRIDS`; offsets are biases if it is affine.
    importance
        ``[in]`` what an error costs in each channel.
    bits
        Of the codes.

    Raises
    ------
    ValueError
        If a scale is too large for float16.
    """
    found = _kernels.fit_superblocks(scales, offsets, importance, bits)
    if found is None:
        raise ValueError(
            "weight: its scales are more than float16 can hold; use another grid than k"
        )
    return SuperBlocks(*found)


def closed_form(
    weight: Float32, codes: NDArray[np.uint8], importance: Float32, bits: int
) -> tuple[Float32, Float32]:
    """Return the scales and offsets of each group with the least ``Σ importance (weight - decoded)²``.

    Parameters
    ----------
    weight, codes
        ``[out, in]``.
    importance
        ``[in]``.
    bits
        Of the codes.

    Returns
    -------
    scales, offsets
        ``[out, groups]``; scales are NaN where all codes of a group are the same, which says nothing.
    """
    return _kernels.closed_form(weight, codes, importance, bits)


def expanded(blocks: SuperBlocks, bits: int) -> tuple[Float32, Float32]:
    """Return scales and offsets as kernels take them."""
    scales, biases = blocks.scales(), blocks.biases()
    if biases is None:
        biases = np.full_like(scales, 2 ** (bits - 1))
    return scales, biases
