"""Calls of every kernel, with arguments of odd sizes, and the bits that come out of them."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.checkpoint.gguf_file import DECODED
from bitwright.grids.tensor import K_GRIDS

RNG = np.random.default_rng(0)
ROWS, WIDTH, OUT = 37, 128, 70  # rows end inside a tile; widths of 67 end inside a register
FLOATS = (np.float32, np.float64)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2", "sigmoid")


def normal(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return RNG.standard_normal(shape).astype(dtype)


def gram_of(size: int) -> NDArray[Any]:
    states = normal(3 * size, size)
    return (states.T @ states / len(states)).astype(np.float32)


def empty(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.full(shape, 7, dtype)


def linalg_cases() -> list[tuple[str, tuple[Any, ...]]]:
    gram = gram_of(WIDTH)
    factor = np.linalg.cholesky(gram).astype(np.float32)
    order = RNG.permutation(WIDTH).astype(np.int32)
    return [
        ("accumulate_gram", (normal(ROWS, 67), empty(67, 67))),
        *bfloat16_cases(),
        ("inner_product", (normal(ROWS, 67), normal(ROWS, 67))),
        ("inner_product", (normal(600, 67), normal(600, 67))),
        ("mirror_lower", (normal(67, 67),)),
        ("inverse_factor", (gram, order, 0.01)),
        ("cholesky_factor", (gram,)),
        ("cholesky_solve", (factor, normal(ROWS, WIDTH))),
        ("row_quadratic_forms", (normal(ROWS, WIDTH), gram)),
        ("row_quadratic_forms", (normal(ROWS, 67), gram_of(67))),
    ]


def bfloat16_cases() -> list[tuple[str, tuple[Any, ...]]]:
    wide, square = empty(ROWS, OUT), empty(67, 67)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("bfloat16_product", (normal(ROWS, 67), True, normal(OUT, 67), True, wide, True)),
        ("bfloat16_product", (normal(67, ROWS), False, normal(67, OUT), False, wide, False)),
        ("bfloat16_product", (square, False, square, False, square.copy(), True, True)),
    ]
    states, weight = normal(600, 530), normal(700, 530)  # more than one tile and block
    return [
        *cases,
        ("bfloat16_product", (states, True, weight, True, empty(600, 700), True)),
        ("bfloat16_product", (states, False, states, False, empty(530, 530), True, True)),
    ]


def quantizing_cases() -> list[tuple[str, tuple[Any, ...]]]:
    weight, gram = normal(ROWS, WIDTH), gram_of(WIDTH)
    metric = np.concatenate([gram_of(16), gram_of(16), gram_of(16)])[:ROWS].copy()
    importance = np.abs(normal(WIDTH))
    order = np.arange(WIDTH, dtype=np.int32)
    upper = _kernels.inverse_factor(gram, order, 0.01)
    shares = np.linspace(1, 0.5, 6, dtype=np.float32)
    cases: list[tuple[str, tuple[Any, ...]]] = []
    for grid in ("affine", "zero_point", "symmetric"):
        rule, searching = (
            _kernels.Grid(4, 32, grid, "float16", search) for search in (False, True)
        )
        found = _kernels.quantize_rtn(weight, importance, searching)
        cases += [
            ("quantize_rtn", (weight, importance, searching)),
            ("quantize_rtn", (weight.astype(np.float16), importance, rule)),
            ("quantize_gptq", (weight, upper, order, importance, searching, 32, True)),
            ("quantize_gptq", (weight, upper, order, importance, rule, 64, False)),
            ("quantize_clipped", (weight, gram, rule, 5, 0.5)),
            ("quantize_clipped_by", (weight[:, :32].copy(), rule, shares, squared_codes)),
            ("refine", (weight, gram, *found, rule, 2)),
            ("refine_two_sided", (weight, gram, metric, *found, rule, 3, 2)),
            ("encode", (weight, found[1], found[2], rule)),
            (
                "scaled_rounding_change",
                (weight, importance + 1, importance, searching, empty(ROWS, WIDTH)),
            ),
        ]
    codes = RNG.integers(0, 16, (ROWS, WIDTH)).astype(np.uint8)
    scales, offsets = normal(ROWS, 4), normal(ROWS, 4)
    groups = RNG.permutation(np.arange(WIDTH) % 4).astype(np.int32)
    return [
        *cases,
        *superblock_cases(),
        *vector_cases(),
        *block_cases(),
        *(
            ("decode_blocks", (RNG.integers(0, 24, (ROWS, 2 * size), np.uint8), name))
            for name, (_, _, size) in DECODED.items()
        ),
        ("dequantize", (codes, scales, None, offsets, None, empty(ROWS, WIDTH))),
        ("dequantize", (codes, scales, offsets, None, groups, empty(ROWS, WIDTH))),
        ("add_output_metric", (normal(ROWS, 67), np.abs(normal(ROWS)), empty(67, 32))),
        ("pack", (codes, 4)),
        ("unpack", (_kernels.pack(codes, 4), 4)),
    ]


def squared_codes(codes: NDArray[Any], *_: NDArray[Any]) -> NDArray[np.float64]:
    """A measure of error that prefers small codes."""
    return np.square(codes.astype(np.float64)).mean(axis=1)


def superblock_cases() -> list[tuple[str, tuple[Any, ...]]]:
    cases: list[tuple[str, tuple[Any, ...]]] = []
    weight, importance = normal(ROWS, 512), np.abs(normal(512))
    for bits, kind in K_GRIDS.items():
        scales, offsets = normal(ROWS, 512 // kind.group_size), -np.abs(normal(ROWS, 512))
        offsets = offsets[:, : scales.shape[1]].copy()
        codes = RNG.integers(0, 2**bits, (ROWS, 512)).astype(np.uint8)
        found = _kernels.fit_superblocks(np.abs(scales), offsets, importance, bits)
        assert found is not None
        cases += [
            ("fit_superblocks", (np.abs(scales), offsets, importance, bits)),
            ("closed_form", (weight, codes, importance, bits)),
            ("pack_superblocks", (codes, *found, bits)),
            ("unpack_superblocks", (_kernels.pack_superblocks(codes, *found, bits), bits)),
        ]
    return cases


def vector_cases() -> list[tuple[str, tuple[Any, ...]]]:
    cases: list[tuple[str, tuple[Any, ...]]] = []
    weight, gram, importance = normal(ROWS, 256), gram_of(256), np.abs(normal(256))
    upper = _kernels.inverse_factor(gram, np.arange(256, dtype=np.int32), 0.01)
    order = np.arange(256, dtype=np.int32).reshape(-1, 8)[::-1].reshape(-1).copy()
    for kind in ("IQ3_S", "IQ3_XXS", "IQ2_XS", "IQ1_M", "IQ1_S"):
        scales = _kernels.vector_scales(weight, importance, kind, True)
        codes = _kernels.encode_vectors(weight, scales, importance, kind)
        found = _kernels.fit_superblocks(scales, np.zeros_like(scales), importance, 4, kind)
        assert found is not None
        d, scale_codes = found[:2]
        packed = _kernels.pack_vectors(codes, d, scale_codes, kind)
        cases += [
            ("vector_scales", (weight, importance, kind, True)),
            ("encode_vectors", (weight, scales, importance, kind)),
            ("quantize_vectors", (weight, upper, order, codes, scales, kind, 64)),
            ("refine_vectors", (weight, gram, codes, d, scale_codes, kind, 2)),
            ("pack_vectors", (codes, d, scale_codes, kind)),
            ("unpack_vectors", (packed, kind)),
        ]
    return cases


def block_cases() -> list[tuple[str, tuple[Any, ...]]]:
    cases: list[tuple[str, tuple[Any, ...]]] = []
    for bits, affine in ((4, False), (4, True), (5, False), (5, True), (8, False)):
        codes = RNG.integers(0, 2**bits, (ROWS, WIDTH)).astype(np.uint8)
        d, m = normal(ROWS, WIDTH // 32, dtype=np.float16), normal(ROWS, 4, dtype=np.float16)
        packed = _kernels.pack_blocks(codes, d, m if affine else None, bits)
        cases += [
            ("pack_blocks", (codes, d, m if affine else None, bits)),
            ("unpack_blocks", (packed, bits, affine)),
        ]
    return cases


def forward_cases(dtype: Any) -> list[tuple[str, tuple[Any, ...]]]:
    def floats(*shape: int) -> NDArray[Any]:
        return normal(*shape, dtype=dtype)

    def out(*shape: int) -> NDArray[Any]:
        return empty(*shape, dtype=dtype)

    states, gain = floats(ROWS, 67), floats(67)
    angles = RNG.uniform(0, 9, (ROWS, 5))
    turns = (np.cos(angles).astype(dtype), np.sin(angles).astype(dtype))
    cases = [
        ("linear", (states, floats(OUT, 67), floats(OUT), out(ROWS, OUT), False)),
        ("linear", (states, floats(OUT, 67), None, out(ROWS, OUT), True)),
        ("linear", (states[:1], floats(3, 67), None, out(1, 3), False)),
        ("linear", (floats(3, 5), floats(7, 5), None, out(3, 7), False)),
        ("rms_norm", (states, gain, 1e-6, out(ROWS, 67))),
        ("layer_norm", (states, gain, floats(67), 1e-6, out(ROWS, 67))),
        ("rotate", (floats(ROWS, 66), *turns, 3, 1, True, False)),
        ("rotate", (floats(ROWS, 66), *turns, 3, 0, False, True)),
        ("cap_logits", (states, 1.3, 5.0)),
        ("cap_logits", (states, 1.3, 0.0)),
        (
            "top_tokens",
            (states, 1.1, empty(ROWS, 9, dtype=np.int32), out(ROWS, 9), out(ROWS)),
        ),
    ]
    for length, heads, key_heads, width in ((ROWS, 4, 2, 20), (ROWS, 1, 1, 3)):
        for window, softcap in ((0, 0.0), (9, 3.0)):
            shape = (length, heads, key_heads, 0.3)
            cases.append(
                (
                    "attention",
                    (
                        floats(ROWS, heads * width),
                        *(floats(ROWS, key_heads * width) for _ in range(2)),
                        *(*shape, out(ROWS, heads * width), window, softcap),
                    ),
                )
            )
    cases += [
        ("clamped_swiglu", (states, floats(ROWS, 67), 1.7, 1.5)),
        ("convolve", (states, floats(67, 4), gain, ROWS, out(ROWS, 67))),
        ("convolve", (states, floats(67, 3), None, 1, out(ROWS, 67))),
    ]
    for corrects in (True, False):
        parts, shape = recurrence_parts(dtype)
        cases.append(("recurrence", (*parts, *shape, corrects, np.empty_like(parts[2]))))
    for name in ACTIVATIONS:
        cases += [
            ("activate", (states, name)),
            ("activate_multiply", (states, floats(ROWS, 67), name)),
        ]
    if dtype is np.float32:
        targets = RNG.integers(0, 67, ROWS).astype(np.int32)
        cases += [
            ("cross_entropy", (states, targets)),
            ("kl_divergence", (states, floats(ROWS, 67))),
            ("draw_tokens", (states, RNG.random(ROWS))),
        ]
    return cases


def recurrence_parts(dtype: Any) -> tuple[list[NDArray[Any]], tuple[int, int, int]]:
    """Queries, keys, values, decays and strengths of samples that end inside a chunk."""
    length, heads, key_heads, width = 70, 4, 2, 13
    parts = [
        normal(2 * length, key_heads * width, dtype=dtype),
        normal(2 * length, key_heads * width, dtype=dtype) / 4,
        normal(2 * length, heads * 11, dtype=dtype),
        -np.abs(normal(2 * length, heads, dtype=dtype)),
        np.abs(normal(2 * length, heads, dtype=dtype)) / 3,
    ]
    return [part.astype(dtype) for part in parts], (length, heads, key_heads)


def backward_cases(dtype: Any) -> list[tuple[str, tuple[Any, ...]]]:
    def floats(*shape: int) -> NDArray[Any]:
        return normal(*shape, dtype=dtype)

    def out(*shape: int) -> NDArray[Any]:
        return empty(*shape, dtype=dtype)

    states, gain, above = floats(ROWS, 67), floats(67), floats(ROWS, 67)
    many = floats(600, 67)
    codes = RNG.integers(0, 16, (OUT, 66)).astype(np.uint8)
    groups = np.repeat(np.arange(3), 22).astype(np.int32)
    cases = [
        ("linear_backward_input", (floats(ROWS, OUT), floats(OUT, 67), out(ROWS, 67), True)),
        ("linear_backward_weight", (floats(ROWS, OUT), states, out(OUT, 67))),
        (
            "linear_backward_groups",
            (floats(ROWS, OUT), floats(ROWS, 66), codes, groups, out(OUT, 3), out(OUT, 3)),
        ),
        ("rms_norm_backward", (states, gain, 1e-6, above, out(ROWS, 67), out(67))),
        ("rms_norm_backward", (many, gain, 1e-6, floats(600, 67), out(600, 67), out(67))),
        ("layer_norm_backward", (states, gain, 1e-6, above, out(ROWS, 67), out(67))),
        ("layer_norm_backward", (many, gain, 1e-6, floats(600, 67), out(600, 67), None)),
        ("cap_logits_backward", (5 * np.tanh(states), 1.3, 5.0, above)),
        ("cap_logits_backward", (states, 1.3, 0.0, above)),
    ]
    for length, heads, key_heads, width in ((ROWS, 4, 2, 20), (ROWS, 1, 1, 3)):
        for window, softcap in ((0, 0.0), (9, 3.0)):
            wide, narrow = (ROWS, heads * width), (ROWS, key_heads * width)
            cases.append(
                (
                    "attention_backward",
                    (
                        *(floats(*wide), floats(*narrow), floats(*narrow)),
                        *(length, heads, key_heads, 0.3),
                        *(floats(*wide), out(*wide), out(*narrow), out(*narrow)),
                        *(window, softcap),
                    ),
                )
            )
    cases += [
        ("clamped_swiglu_backward", (states, floats(ROWS, 67), 1.7, 1.5, above, out(ROWS, 67))),
        ("convolve_backward", (states, floats(67, 4), ROWS, out(ROWS, 67))),
    ]
    for corrects in (True, False):
        parts, shape = recurrence_parts(dtype)
        outputs = [np.empty_like(part) for part in parts]
        gradient = floats(*parts[2].shape)
        cases.append(("recurrence_backward", (*parts, *shape, corrects, gradient, *outputs)))
    for name in ACTIVATIONS:
        cases += [
            ("activate_backward", (states, name, above)),
            ("activate_multiply_backward", (states, floats(ROWS, 67), name, above, out(ROWS, 67))),
        ]
    for loss in ("kl", "reverse_kl", "js", "cross_entropy", "logits_mse"):
        for count in (9, 67):
            ids, known = empty(ROWS, count, dtype=np.int32), out(ROWS, count)
            rest = out(ROWS)
            _kernels.top_tokens(floats(ROWS, 67), 1.0, ids, known, rest)
            following = RNG.integers(0, 67, ROWS).astype(np.int32)
            for gradient in (out(ROWS, 67), None):
                cases.append(
                    (
                        "distillation_loss",
                        (states, ids, known, rest, following, loss, 1.1, 0.7, gradient),
                    )
                )
    return cases


def tiled_cases() -> list[tuple[str, tuple[Any, ...]]]:
    """Products of more than one tile, with outputs of more rows than columns and the other way round."""
    cases: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in FLOATS:
        for rows, depth, columns in (
            (333, 288, 1001),
            (300, 1001, 130),
            (1, 300, 700),
            (640, 1, 5),
        ):
            states, weight = normal(rows, depth, dtype=dtype), normal(columns, depth, dtype=dtype)
            above = normal(rows, columns, dtype=dtype)
            cases += [
                ("linear", (states, weight, None, empty(rows, columns, dtype=dtype), False)),
                ("linear_backward_input", (above, weight, empty(rows, depth, dtype=dtype), True)),
                ("linear_backward_weight", (above, states, empty(columns, depth, dtype=dtype))),
            ]
    for size in (131, 540, 800):
        gram, order = gram_of(size), RNG.permutation(size).astype(np.int32)
        cases += [
            ("accumulate_gram", (normal(77, size), empty(size, size))),
            ("inverse_factor", (gram, order, 0.01)),
            ("cholesky_factor", (gram,)),
            ("cholesky_solve", (np.linalg.cholesky(gram).astype(np.float32), normal(150, size))),
            ("row_quadratic_forms", (normal(150, size), gram)),
        ]
    weight, gram, ones = normal(150, 640), gram_of(640), np.ones(640, np.float32)
    order = RNG.permutation(640).astype(np.int32)
    upper = _kernels.inverse_factor(gram, order, 0.01)
    rule, searching = (
        _kernels.Grid(3, 64, "affine", "bfloat16", search) for search in (False, True)
    )
    return [
        *cases,
        ("quantize_gptq", (weight, upper, order, ones, searching, 128, True)),
        ("refine", (weight, gram, *_kernels.quantize_rtn(weight, ones, searching), rule, 2)),
        ("quantize_clipped", (weight, gram, rule, 5, 0.5)),
    ]


def packed_cases() -> list[tuple[str, tuple[Any, ...]]]:
    cases: list[tuple[str, tuple[Any, ...]]] = []
    for bits in (3, 4):
        codes = RNG.integers(0, 1 << bits, (ROWS, 128)).astype(np.uint8)
        planes = _kernels.pack_planes(codes, bits)
        scales, biases = (normal(ROWS, 4).astype(np.float16) for _ in range(2))
        packed = _kernels.PackedMatrix(planes, 128, bits, scales, biases)
        cases += [
            ("pack_planes", (codes, bits)),
            ("decode_packed", (packed, empty(ROWS, 128))),
        ]
        for tokens in (1, 20):
            states, bias = normal(tokens, 128), normal(ROWS)
            cases.append(("packed_linear", (states, packed, bias, empty(tokens, ROWS), True)))
    for tokens in (1, 20):
        weight = normal(ROWS, 67).astype(np.float16)
        cases.append(
            ("stored_linear", (normal(tokens, 67), weight, None, empty(tokens, ROWS), False))
        )
    return cases


CASES = [
    *packed_cases(),
    *tiled_cases(),
    *linalg_cases(),
    *quantizing_cases(),
    *(case for dtype in FLOATS for case in (*forward_cases(dtype), *backward_cases(dtype))),
]
NAMES = [f"{i}-{name}" for i, (name, _) in enumerate(CASES)]


def bits(name: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Return the bits of all that a kernel returns, and of its arguments, which it may have written to."""
    returned = getattr(_kernels, name)(*arguments)
    found = [*arguments, *(returned if isinstance(returned, list | tuple) else [returned])]
    flat = [each for value in found for each in (value if isinstance(value, tuple) else [value])]
    return [value.tobytes() if isinstance(value, np.ndarray) else value for value in flat]


def kernels_of_arrays() -> set[str]:
    """Return the names of all kernels that take arrays."""

    def takes_arrays(function: Callable[..., Any]) -> bool:
        return "object" in str(inspect.getdoc(function)).partition("\n")[0]

    return {
        name
        for name, value in vars(_kernels).items()
        if callable(value) and takes_arrays(value) and not name.startswith("_")
    }
