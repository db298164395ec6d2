"""Types of the C++ module; shapes are in the headers below `cpp/`."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Float32: TypeAlias = NDArray[np.float32]
_Int32: TypeAlias = NDArray[np.int32]
_Codes: TypeAlias = NDArray[np.uint8]

instruction_set: str

def blas() -> str: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def accumulate_gram(activations: _Float32, out: _Float32) -> None: ...
def mirror_lower(matrix: _Float32) -> None: ...
def inverse_factor(gram: _Float32, order: _Int32, damping: float) -> _Float32 | None: ...
def row_quadratic_forms(change: _Float32, gram: _Float32) -> NDArray[np.float64]: ...
def scaled_rounding_change(
    weight: _Float32,
    scale: _Float32,
    importance: _Float32,
    bits: int,
    group_size: int,
    grid: str,
    scale_dtype: str,
    search: bool,
    out: _Float32,
) -> None: ...
def quantize_clipped(
    weight: _Float32,
    gram: _Float32,
    bits: int,
    group_size: int,
    grid: str,
    scale_dtype: str,
    steps: int,
    least: float,
) -> tuple[_Codes, _Float32, _Float32]: ...
def range_grids(
    low: _Float32, high: _Float32, bits: int, grid: str, scale_dtype: str
) -> list[tuple[_Float32, _Float32]]: ...
def encode(
    weight: _Float32, scales: _Float32, offsets: _Float32, bits: int, group_size: int, grid: str
) -> _Codes: ...
def quantize_rtn(
    weight: NDArray[Any],
    importance: _Float32,
    bits: int,
    group_size: int,
    grid: str,
    scale_dtype: str,
    search: bool,
) -> tuple[_Codes, _Float32, _Float32]: ...
def quantize_gptq(
    weight: NDArray[Any],
    upper: _Float32,
    order: _Int32,
    importance: _Float32,
    bits: int,
    group_size: int,
    grid: str,
    scale_dtype: str,
    search: bool,
    block_size: int,
    static_groups: bool,
) -> tuple[_Codes, _Float32, _Float32, NDArray[np.float64]]: ...
def dequantize(
    codes: _Codes,
    scales: _Float32,
    zeros: _Float32 | None,
    biases: _Float32 | None,
    groups: _Int32 | None,
    out: _Float32,
) -> None: ...
def pack(codes: _Codes, bits: int) -> NDArray[np.uint32]: ...
def unpack(words: NDArray[np.uint32], bits: int) -> _Codes: ...
def linear(
    input: _Float32, weight: _Float32, bias: _Float32 | None, out: _Float32, accumulate: bool
) -> None: ...
def rms_norm(input: _Float32, weight: _Float32, epsilon: float, out: _Float32) -> None: ...
def layer_norm(
    input: _Float32, weight: _Float32, bias: _Float32, epsilon: float, out: _Float32
) -> None: ...
def rotate(
    states: _Float32,
    cosines: _Float32,
    sines: _Float32,
    heads: int,
    first: int = 0,
    interleaved: bool = False,
) -> None: ...
def attention(
    query: _Float32,
    key: _Float32,
    value: _Float32,
    length: int,
    heads: int,
    key_heads: int,
    scale: float,
    out: _Float32,
    window: int = 0,
    softcap: float = 0.0,
) -> None: ...
def activate(states: _Float32, activation: str) -> None: ...
def activate_multiply(gate: _Float32, up: _Float32, activation: str) -> None: ...
def cross_entropy(logits: _Float32, targets: _Int32) -> NDArray[np.float64]: ...
def kl_divergence(reference: _Float32, logits: _Float32) -> NDArray[np.float64]: ...
