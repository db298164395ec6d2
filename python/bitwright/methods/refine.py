"""Refinement: codes and grids of a quantized layer improved together in the metric of the gram."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.methods.gptq import GptqTensor
from bitwright.methods.grid import FLOAT_DTYPES
from bitwright.statistics import require_finite
from bitwright.tensor import QuantizedTensor

ROUNDS = 2


def refine(
    tensor: QuantizedTensor,
    weight: NDArray[np.float32],
    gram: NDArray[np.float32],
    *,
    rounds: int = ROUNDS,
    damping: float = 0.01,
) -> tuple[QuantizedTensor, NDArray[np.float64]]:
    """Lower the error of a layer's output, from wherever any method has left it.

    In each round scales and biases get their closed form, which is least squares in the metric of the gram,
    and then each code its best value given all others, column by column. Scales and biases are rounded to
    their stored dtype inside the loop, and integer zeros stay: no step raises the error of what is stored.

    Parameters
    ----------
    tensor
        ``[out, in]``, with groups of consecutive channels.
    weight
        ``[out, in]`` float32, what it stands for.
    gram
        ``[in, in]`` float32 second moments of the layer's inputs.
    rounds
        How often.
    damping
        Added to the gram's diagonal, relative to its mean, so that what calibration has not seen counts.

    Returns
    -------
    QuantizedTensor
        With the same grid, bits and dtypes.
    NDArray
        ``[rounds + 1]`` float64, ``tr((W - Ŵ)(G + D)(W - Ŵ)ᵀ)`` before and after every round; it never
        rises.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; the message names it.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> rng = np.random.default_rng(0)
    >>> inputs = rng.standard_normal((512, 64), dtype=np.float32) @ rng.random((64, 64), np.float32)
    >>> weight = rng.standard_normal((16, 64), dtype=np.float32)
    >>> gram = bitwright.gram(inputs)
    >>> _, errors = bitwright.refine(bitwright.quantize_rtn(weight, bits=3), weight, gram)
    >>> bool(errors[-1] < 0.5 * errors[0])
    True
    """
    if tensor.group_index is not None:
        raise ValueError("tensor: only groups of consecutive channels can be refined")
    if weight.shape != tensor.shape:
        raise ValueError(f"weight: expected shape {tensor.shape}, got {weight.shape}")
    if not (damping >= 0 and np.isfinite(damping)):
        raise ValueError(f"damping: expected a finite value from 0 on, got {damping}")
    if tensor.scales.dtype not in FLOAT_DTYPES:
        raise TypeError(f"tensor: scales are {tensor.scales.dtype}")
    require_finite(weight, "weight")
    diagonal = gram.diagonal()
    live = diagonal[diagonal > 0]
    damped = gram.copy()
    damped[np.diag_indices_from(damped)] += np.float32(damping * (live.mean() if live.size else 1))
    codes, scales = tensor.codes.copy(), tensor.scales.astype(np.float32)
    stored = tensor.zeros if tensor.biases is None else tensor.biases
    offsets = np.asarray(stored).astype(np.float32)
    objectives = _kernels.refine(
        weight,
        damped,
        codes,
        scales,
        offsets,
        tensor.bits,
        tensor.group_size,
        tensor.grid,
        tensor.scales.dtype.name,
        rounds,
    )
    changed: dict[str, Any] = {"codes": codes, "scales": scales.astype(tensor.scales.dtype)}
    if tensor.biases is not None:
        changed["biases"] = offsets.astype(tensor.biases.dtype)
    if isinstance(tensor, GptqTensor):
        changed["column_losses"] = None  # they were those of other codes
    return replace(tensor, **changed), objectives
