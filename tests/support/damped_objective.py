"""A layer with correlated inputs, and what GPTQ and refinement make small on it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import bitwright


def layer(out: int, channels: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """A weight, and a gram of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((channels, channels)) * np.exp(rng.standard_normal(channels))
    inputs = rng.standard_normal((4 * channels, channels)) @ mixing
    weight = rng.standard_normal((out, channels))
    return weight.astype(np.float32), bitwright.gram(np.ascontiguousarray(inputs, np.float32))


def objective(weight: Any, tensor: bitwright.QuantizedTensor, gram: Any, damping: float) -> float:
    change = weight.astype(np.float64) - tensor.dequantize()
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += damping * gram.diagonal()[gram.diagonal() > 0].mean()
    return float(np.einsum("ij,jk,ik", change, damped, change))
