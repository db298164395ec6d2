"""Salient-weight AWQ with the array interface of Metal Marlin, for single layers and whole models.

Examples
--------
>>> import numpy as np
>>> from bitwright.compat import awq_dequantize, awq_quantize
>>> weights = np.linspace(-1, 1, 64 * 8, dtype=np.float32).reshape(64, 8)
>>> found = awq_quantize(weights, np.ones((1, 4, 64), np.float32), group_size=32)
>>> restored = awq_dequantize(found.Q, found.scales, found.zeros, found.q_scale, found.meta)
>>> restored.shape
(64, 8)
"""

from bitwright.compat.arrays import (
    AWQResult,
    awq_dequantize,
    awq_quantize,
    compute_salient_scaling,
    pack_awq_weights,
    unpack_awq_weights,
)
from bitwright.compat.model import awq_quantize_model
from bitwright.methods.salient import compute_activation_stats, find_salient_weights

__all__ = [
    "AWQResult",
    "awq_dequantize",
    "awq_quantize",
    "awq_quantize_model",
    "compute_activation_stats",
    "compute_salient_scaling",
    "find_salient_weights",
    "pack_awq_weights",
    "unpack_awq_weights",
]
