"""Types of the C++ module; shapes are in the headers below `cpp/`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Float32: TypeAlias = NDArray[np.float32]
_Float: TypeAlias = NDArray[Any]  # float32 or float64, the same in all arguments
_Int32: TypeAlias = NDArray[np.int32]
_Int8: TypeAlias = NDArray[np.int8]
_Half: TypeAlias = NDArray[np.float16]
_Codes: TypeAlias = NDArray[np.uint8]
_Quantized: TypeAlias = tuple[_Codes, _Float32, _Float32]  # codes, scales, offsets
_Superblocks: TypeAlias = tuple[_Half, _Int8, _Half | None, _Codes | None]

instruction_set: str

class Grid:
    def __init__(
        self,
        bits: int,
        group_size: int,
        kind: str,
        scale_dtype: str = "float32",
        search: bool = False,
        points: _Float32 | None = None,
        bounds: _Float32 | None = None,
        either_sign: bool = False,
        divisor: float = 1.0,
    ) -> None: ...

def blas() -> str: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def accumulate_gram(activations: _Float32, out: _Float32) -> None: ...
def multiplies_bfloat16() -> bool: ...
def bfloat16_product(
    left: _Float32,
    left_rows: bool,
    right: NDArray[Any],
    right_rows: bool,
    out: _Float32,
    accumulate: bool,
    lower: bool = False,
    plain: bool = False,
) -> None: ...
def mirror_lower(matrix: _Float32) -> None: ...
def inverse_factor(gram: _Float32, order: _Int32, damping: float) -> _Float32 | None: ...
def cholesky_factor(matrix: _Float32) -> bool: ...
def cholesky_solve(factor: _Float32, rows: _Float32) -> None: ...
def row_quadratic_forms(change: _Float32, gram: _Float32) -> NDArray[np.float64]: ...
def scaled_rounding_change(
    weight: _Float32, scale: _Float32, importance: _Float32, grid: Grid, out: _Float32
) -> None: ...
def quantize_clipped(
    weight: _Float32, gram: _Float32, grid: Grid, steps: int, least: float
) -> _Quantized: ...
def quantize_clipped_by(
    weight: _Float32,
    grid: Grid,
    shares: _Float32,
    errors: Callable[[_Codes, _Float32, _Float32], NDArray[np.float64]],
) -> _Quantized: ...
def quantize_rtn(weight: NDArray[Any], importance: _Float32, grid: Grid) -> _Quantized: ...
def encode(weight: _Float32, scales: _Float32, offsets: _Float32, grid: Grid) -> _Codes: ...
def quantize_gptq(
    weight: NDArray[Any],
    upper: _Float32,
    order: _Int32,
    importance: _Float32,
    grid: Grid,
    block_size: int,
    static_groups: bool,
    scales: _Float32 | None = None,
    offsets: _Float32 | None = None,
) -> tuple[_Codes, _Float32, _Float32, NDArray[np.float64]]: ...
def refine(
    weight: _Float32,
    gram: _Float32,
    codes: _Codes,
    scales: _Float32,
    offsets: _Float32,
    grid: Grid,
    rounds: int,
    codes_only: bool = False,
) -> NDArray[np.float64]: ...
def refine_two_sided(
    weight: _Float32,
    gram: _Float32,
    outputs: _Float32,
    codes: _Codes,
    scales: _Float32,
    offsets: _Float32,
    grid: Grid,
    sweeps: int,
    fits: int,
) -> NDArray[np.float64]: ...
def add_output_metric(gradient: _Float32, weight: _Float32, sum: _Float32) -> None: ...
def fit_superblocks(
    scales: _Float32, offsets: _Float32, importance: _Float32, bits: int, table: str = ""
) -> _Superblocks | None: ...
def closed_form(
    weight: _Float32,
    codes: _Codes,
    importance: _Float32,
    bits: int,
    points: _Float32 | None = None,
    table: str = "",
) -> tuple[_Float32, _Float32]: ...
def pack_superblocks(
    codes: _Codes,
    d: _Half,
    scale_codes: _Int8,
    dmin: _Half | None,
    min_codes: _Codes | None,
    bits: int,
    table: str = "",
) -> _Codes: ...
def unpack_superblocks(
    blocks: _Codes, bits: int, table: str = ""
) -> tuple[_Codes, _Half, _Int8, _Half | None, _Codes | None]: ...
def pack_blocks(codes: _Codes, d: _Half, m: _Half | None, bits: int) -> _Codes: ...
def unpack_blocks(
    blocks: _Codes, bits: int, affine: bool
) -> tuple[_Codes, _Half, _Half | None]: ...
def decode_blocks(blocks: _Codes, name: str) -> _Float32: ...
def codebook(name: str) -> _Int8: ...
def pack_vectors(codes: _Codes, d: _Half, scale_codes: _Int8, type: str) -> _Codes | None: ...
def unpack_vectors(blocks: _Codes, type: str) -> tuple[_Codes, _Half, _Int8]: ...
def vector_scales(weight: _Float32, importance: _Float32, type: str, search: bool) -> _Float32: ...
def encode_vectors(
    weight: _Float32, scales: _Float32, importance: _Float32, type: str
) -> _Codes: ...
def quantize_vectors(
    weight: _Float32,
    upper: _Float32,
    order: _Int32,
    codes: _Codes,
    scales: _Float32,
    type: str,
    block_size: int,
) -> NDArray[np.float64]: ...
def refine_vectors(
    weight: _Float32,
    gram: _Float32,
    codes: _Codes,
    d: _Half,
    scale_codes: _Int8,
    type: str,
    rounds: int,
) -> NDArray[np.float64]: ...
def dequantize(
    codes: _Codes,
    scales: _Float32,
    zeros: _Float32 | None,
    biases: _Float32 | None,
    groups: _Int32 | None,
    out: _Float32,
    points: _Float32 | None = None,
) -> None: ...
def pack(codes: _Codes, bits: int) -> NDArray[np.uint32]: ...
def unpack(words: NDArray[np.uint32], bits: int) -> _Codes: ...
def inner_product(a: _Float, b: _Float) -> float: ...
def linear(
    input: _Float, weight: _Float, bias: _Float | None, out: _Float, accumulate: bool
) -> None: ...
def linear_backward_input(
    gradient: _Float, weight: _Float, out: _Float, accumulate: bool
) -> None: ...
def linear_backward_weight(gradient: _Float, input: _Float, out: _Float) -> None: ...
def linear_backward_groups(
    gradient: _Float,
    input: _Float,
    codes: _Codes,
    groups: _Int32,
    scale_gradients: _Float,
    bias_gradients: _Float,
    points: _Float32 | None = None,
) -> None: ...
def rms_norm(input: _Float, weight: _Float, epsilon: float, out: _Float) -> None: ...
def rms_norm_backward(
    input: _Float,
    weight: _Float,
    epsilon: float,
    gradient: _Float,
    out: _Float,
    weight_gradient: _Float | None = None,
) -> None: ...
def layer_norm(
    input: _Float, weight: _Float, bias: _Float, epsilon: float, out: _Float
) -> None: ...
def layer_norm_backward(
    input: _Float,
    weight: _Float,
    epsilon: float,
    gradient: _Float,
    out: _Float,
    weight_gradient: _Float | None = None,
) -> None: ...
def rotate(
    states: _Float,
    cosines: _Float,
    sines: _Float,
    heads: int,
    first: int = 0,
    interleaved: bool = False,
    backward: bool = False,
) -> None: ...
def attention(
    query: _Float,
    key: _Float,
    value: _Float,
    length: int,
    heads: int,
    key_heads: int,
    scale: float,
    out: _Float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: _Float | None = None,
    past: int = 0,
) -> None: ...
def attention_backward(
    query: _Float,
    key: _Float,
    value: _Float,
    length: int,
    heads: int,
    key_heads: int,
    scale: float,
    gradient: _Float,
    query_gradient: _Float,
    key_gradient: _Float,
    value_gradient: _Float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: _Float | None = None,
) -> None: ...
def activate(states: _Float, activation: str) -> None: ...
def activate_backward(states: _Float, activation: str, gradient: _Float) -> None: ...
def activate_multiply(gate: _Float, up: _Float, activation: str) -> None: ...
def activate_multiply_backward(
    gate: _Float, up: _Float, activation: str, gradient: _Float, up_gradient: _Float
) -> None: ...
def cross_entropy(logits: _Float32, targets: _Int32) -> NDArray[np.float64]: ...
def draw_tokens(logits: _Float32, uniform: NDArray[np.float64]) -> NDArray[np.int32]: ...
def kl_divergence(reference: _Float32, logits: _Float32) -> NDArray[np.float64]: ...
def cap_logits(logits: _Float, divisor: float, cap: float) -> None: ...
def cap_logits_backward(capped: _Float, divisor: float, cap: float, gradient: _Float) -> None: ...
def top_tokens(
    logits: _Float, temperature: float, ids: _Int32, log_probabilities: _Float, rest: _Float
) -> None: ...
def distillation_loss(
    logits: _Float,
    ids: _Int32,
    log_probabilities: _Float,
    rest: _Float,
    next: _Int32,
    loss: str,
    temperature: float,
    factor: float,
    gradient: _Float | None,
) -> NDArray[np.float64]: ...
def clamped_swiglu(gate: _Float, up: _Float, alpha: float, limit: float) -> None: ...
def clamped_swiglu_backward(
    gate: _Float, up: _Float, alpha: float, limit: float, gradient: _Float, up_gradient: _Float
) -> None: ...
def recurrence(
    query: _Float,
    key: _Float,
    value: _Float,
    decay: _Float,
    strength: _Float,
    length: int,
    heads: int,
    key_heads: int,
    corrects: bool,
    out: _Float,
    states: _Float | None = None,
) -> None: ...
def recurrence_backward(
    query: _Float,
    key: _Float,
    value: _Float,
    decay: _Float,
    strength: _Float,
    length: int,
    heads: int,
    key_heads: int,
    corrects: bool,
    gradient: _Float,
    query_gradient: _Float,
    key_gradient: _Float,
    value_gradient: _Float,
    decay_gradient: _Float,
    strength_gradient: _Float,
) -> None: ...
def convolve(
    states: _Float, weight: _Float, bias: _Float | None, length: int, out: _Float
) -> None: ...
def convolve_backward(gradient: _Float, weight: _Float, length: int, out: _Float) -> None: ...

class PackedMatrix:
    def __init__(
        self,
        planes: _Codes,
        channels: int,
        bits: int,
        scales: NDArray[Any],
        offsets: NDArray[Any] | None = None,
        superscales: _Half | None = None,
        supermins: _Half | None = None,
        points: _Float32 | None = None,
        zero: float = 0.0,
        divisor: float = 1.0,
    ) -> None: ...

def pack_planes(codes: _Codes, bits: int) -> _Codes: ...
def decode_packed(packed: PackedMatrix, out: _Float32) -> None: ...
def packed_linear(
    input: _Float32, packed: PackedMatrix, bias: _Float32 | None, out: _Float32, add: bool
) -> None: ...
def stored_linear(
    input: _Float32, weight: NDArray[Any], bias: _Float32 | None, out: _Float32, add: bool
) -> None: ...
