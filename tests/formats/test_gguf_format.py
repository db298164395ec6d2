"""The gguf format: the bits of each type as the gguf package reads them, and models in it."""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import k_model, write_gguf
from numpy.typing import NDArray
from squared_logits import SquaredLogits
from test_formats import LAYER

import bitwright
from bitwright import QuantizedTensor, _kernels
from bitwright.checkpoint.gguf import GgufCheckpoint
from bitwright.checkpoint.gguf_file import BLOCKS, TYPE_NAMES, weights_per_block
from bitwright.distill.student import PACE, Student, TrainedSuperBlocks
from bitwright.errors import CheckpointError
from bitwright.formats.gguf import TYPES, GgufFormat
from bitwright.grids.tables import TABLES, has_superblocks
from bitwright.grids.tensor import GRIDS, K_GRIDS, SUPERBLOCK, Grid, SuperBlocks
from bitwright.models.network import Network

Array = NDArray[Any]
DEMO = Path(str(bitwright.demo_folder()))
IDS = np.random.default_rng(0).integers(1, 512, (8, 24)).astype(np.int32)
by_type = pytest.mark.parametrize(("grid", "bits"), TYPES, ids=TYPES.values())
by_k_bits = pytest.mark.parametrize("bits", K_GRIDS)


# bits


def random_halves(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """All bits but those of NaN and infinity: subnormal numbers, both zeros, both signs."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] &= 0x83FF
    return bits.view(np.float16)


def random_tensor(grid: Grid, bits: int, out: int, blocks: int, seed: int) -> QuantizedTensor:
    """Codes and scales that no method would choose, each as likely as the others."""
    rng = np.random.default_rng(seed)
    kind = K_GRIDS[bits] if grid == "k" else None
    size, base = (kind.group_size, kind.grid) if kind else (32, grid)
    codes = kind.scale_codes if kind else TABLES[grid].scale_codes if grid in TABLES else None
    channels = blocks * (SUPERBLOCK if codes else 32)
    groups, super_groups = (out, channels // size), (out, channels // SUPERBLOCK)
    superblocks: SuperBlocks | None = None
    biases: Array | None = None
    if grid == "nvfp4":
        size, channels = 16, 64 * blocks
        groups = out, channels // size
    if grid in ("mxfp4", "nvfp4"):
        dtype = TABLES[grid].scale_dtype
        scales: Array = rng.integers(0, 255 if grid == "mxfp4" else 0x7F, groups, np.uint8).view(
            dtype
        )
    elif codes is None:
        scales = random_halves(rng, groups)
        biases = random_halves(rng, groups) if base == "affine" else None
    else:
        low, high = codes
        superblocks = SuperBlocks(
            random_halves(rng, super_groups), rng.integers(low, high + 1, groups).astype(np.int8)
        )
        if base == "affine":
            superblocks = replace(
                superblocks,
                dmin=random_halves(rng, super_groups),
                min_codes=rng.integers(0, high + 1, groups).astype(np.uint8),
            )
        scales, biases = superblocks.scales(), superblocks.biases()
    return QuantizedTensor(
        codes=rng.integers(0, 1 << bits, (out, channels)).astype(np.uint8),
        scales=scales,
        biases=biases,
        zeros=np.full(groups, 1 << (bits - 1), np.uint8) if base == "symmetric" else None,
        bits=bits,
        group_size=size,
        grid=base,
        superblocks=superblocks,
    )


class OneTensor:
    """What `GgufFormat.read` asks a checkpoint for."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __contains__(self, name: str) -> bool:
        return name == f"{LAYER}.weight"

    def dtype(self, name: str) -> Any:
        return self.array.dtype

    def read(self, name: str) -> Array:
        return self.array

    def file(self, name: str) -> str:
        return "model.gguf"


def unpacked(array: Array) -> QuantizedTensor:
    checkpoint: Any = OneTensor(array)
    found = GgufFormat().read(checkpoint, LAYER)
    assert found is not None
    return found


def packed(tensor: QuantizedTensor) -> Array:
    (parts,) = GgufFormat.pack(LAYER, tensor).items()
    assert parts[0] == f"{LAYER}.weight"
    return parts[1]


def assert_identical(found: QuantizedTensor | None, wanted: QuantizedTensor) -> None:
    """Bit by bit, signs of zeros as well."""
    assert found is not None
    for name in ("bits", "group_size", "grid", "group_index"):
        assert getattr(found, name) == getattr(wanted, name), name
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in ("codes", "zeros")}
    assert (found.superblocks is None) == (wanted.superblocks is None)
    if found.superblocks is None:
        pairs |= {name: (getattr(found, name), getattr(wanted, name)) for name in PARTS}
    else:
        for each in fields(SuperBlocks):
            one, two = (getattr(it.superblocks, each.name) for it in (found, wanted))
            pairs[each.name] = one, two
    for name, (one, two) in pairs.items():
        assert (one is None) == (two is None), name
        if one is not None:
            assert (one.dtype, one.shape) == (two.dtype, two.shape), name
            assert one.tobytes() == two.tobytes(), name
    assert found.dequantize().tobytes() == wanted.dequantize().tobytes()


PARTS = ("scales", "biases")
shapes = {"out": st.integers(1, 4), "blocks": st.integers(1, 3), "seed": st.integers(0, 1 << 30)}


@by_type
@settings(deadline=None, max_examples=20)
@given(out=st.integers(1, 20), blocks=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_blocks_have_the_bytes_of_numpy(
    grid: Grid, bits: int, out: int, blocks: int, seed: int
) -> None:
    tensor = random_tensor(grid, bits, out, blocks, seed)
    packed = GgufFormat.pack("layer", tensor)["layer.weight"]
    if tensor.superblocks is not None:
        kind = TYPES[grid, bits]
        wanted = reference.pack_superblocks(tensor.codes, tensor.superblocks, bits, kind)
        codes, superblocks = reference.unpack_superblocks(packed, bits)
        for field in fields(SuperBlocks):
            mine, theirs = (getattr(each, field.name) for each in (tensor.superblocks, superblocks))
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert mine.tobytes() == theirs.tobytes()
    else:
        parts = (tensor.codes, tensor.scales, tensor.biases)
        wanted = reference.pack_blocks(*parts, bits, TYPES[grid, bits])
        codes = reference.unpack_blocks(packed, bits)
    assert (packed.dtype, packed.shape) == (wanted.dtype, wanted.shape)
    assert packed.tobytes() == wanted.tobytes()
    np.testing.assert_array_equal(codes, tensor.codes)


@pytest.mark.parametrize("bits", [4, 6])
def test_kernels_of_blocks_check_their_arguments(bits: int) -> None:
    tensor = random_tensor("k", bits, 3, 2, 0)
    blocks = tensor.superblocks
    assert blocks is not None
    parts = (blocks.d, blocks.scale_codes, blocks.dmin, blocks.min_codes)
    with pytest.raises(ValueError, match="d: axis 1 must be 1"):
        _kernels.pack_superblocks(tensor.codes[:, :256].copy(), *parts, bits)
    wrong: Any = blocks.scale_codes.view(np.uint8)
    with pytest.raises(TypeError, match="scale_codes: expected dtype int8, got uint8"):
        _kernels.pack_superblocks(tensor.codes, blocks.d, wrong, *parts[2:], bits)
    with pytest.raises(ValueError, match="100 are no whole number of blocks of"):
        _kernels.unpack_superblocks(np.zeros((1, 100), np.uint8), bits)
    with pytest.raises(ValueError, match="bits: expected 2 to 6, got 8"):
        _kernels.unpack_superblocks(np.zeros((1, 100), np.uint8), 8)
    with pytest.raises(ValueError, match="bits: expected 4, 5 or 8, got 3"):
        _kernels.unpack_blocks(np.zeros((1, 18), np.uint8), 3, False)
    with pytest.raises(ValueError, match="10 are no whole number of blocks of 32"):
        _kernels.pack_blocks(np.zeros((1, 10), np.uint8), blocks.d, None, 4)


@by_type
@settings(deadline=None, max_examples=12)
@given(**shapes)
def test_every_bit_comes_back(grid: Grid, bits: int, out: int, blocks: int, seed: int) -> None:
    tensor = random_tensor(grid, bits, out, blocks, seed)
    array = packed(tensor)
    dtype = BLOCKS[TYPES[grid, bits]]
    assert array.dtype == dtype
    assert array.shape == (out, tensor.shape[1] // weights_per_block(dtype))
    assert_identical(unpacked(array), tensor)
    if has_superblocks(grid):
        assert array.nbytes == tensor.nbytes
    assert packed(unpacked(array)).tobytes() == array.tobytes()


@by_type
@settings(deadline=None, max_examples=8)
@given(**shapes)
def test_random_bytes_are_read_as_the_reference_reads_them(
    grid: Grid, bits: int, out: int, blocks: int, seed: int
) -> None:
    """The other way round: what llama.cpp may write, with bits that are not what `pack` would leave."""
    quants = pytest.importorskip("gguf.quants")
    kind = quants.GGMLQuantizationType[TYPES[grid, bits]]
    rng = np.random.default_rng(seed)
    dtype = BLOCKS[TYPES[grid, bits]]
    array = np.frombuffer(rng.bytes(out * blocks * dtype.itemsize), dtype).copy()
    array = array.reshape(out, blocks)
    for name in {"d", "dmin", "m"} & set(dtype.names or ()):
        array[name] = random_halves(rng, (out, blocks))
    if "e" in (dtype.names or ()):
        array["e"] %= 255 if grid == "mxfp4" else 0x7F  # the last is no number
    tensor = unpacked(array)
    with np.errstate(over="ignore"):  # powers of two up to 2^127
        wanted = quants.dequantize(array.view(np.uint8).reshape(out, -1), kind)
    assert wanted.dtype == np.float32
    np.testing.assert_array_equal(tensor.dequantize(), wanted)
    assert packed(tensor).tobytes() == array.tobytes()
    ours = random_tensor(grid, bits, out, blocks, seed)
    stored = packed(ours).view(np.uint8).reshape(out, -1)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(ours.dequantize(), quants.dequantize(stored, kind))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("grid", "bits"), [key for key in TYPES if key[0] in GRIDS])
def test_larger_groups_are_blocks_with_one_scale(grid: Grid, bits: int, size: int) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 256), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, bits, size, grid=grid, scale_dtype=np.float16)
    found = unpacked(packed(tensor))
    assert found.group_size == 32
    np.testing.assert_array_equal(found.codes, tensor.codes)
    np.testing.assert_array_equal(found.scales, np.repeat(tensor.scales, size // 32, axis=1))
    assert found.dequantize().tobytes() == tensor.dequantize().tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("grid", "bits"), [key for key in TYPES if key[0] in GRIDS])
def test_scales_of_other_dtypes_are_stored_if_float16_holds_them(
    grid: Grid, bits: int, dtype: Any
) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    tensor = bitwright.quantize_rtn(weight, bits, 32, grid=grid, scale_dtype=ml_dtypes.bfloat16)
    tensor = replace(
        tensor,
        scales=tensor.scales.astype(dtype),
        biases=None if tensor.biases is None else tensor.biases.astype(dtype),
    )
    found = unpacked(packed(tensor))
    assert found.scales.dtype == np.float16
    assert found.dequantize().tobytes() == tensor.dequantize().tobytes()
    for name in PARTS:
        values = getattr(tensor, name)
        for wrong in (1e-30, 1e30, -1e5, np.nan):
            if values is not None:
                changed = values.copy()
                changed[1, 1] = wrong
                with pytest.raises(ValueError, match=rf"^{LAYER}: .*float16"):
                    packed(replace(tensor, **{name: changed}))


@pytest.mark.parametrize(
    ("grid", "bits", "size", "channels"),
    [
        ("zero_point", 4, 32, 64),
        ("affine", 3, 32, 64),
        ("affine", 8, 32, 64),
        ("symmetric", 2, 32, 64),
        ("symmetric", 6, 32, 64),
        ("affine", 4, 16, 64),
        ("affine", 4, 8, 64),
        ("symmetric", 8, 48, 96),
        ("symmetric", 4, 80, 160),
    ],
)
def test_grids_that_no_type_has(grid: Grid, bits: int, size: int, channels: int) -> None:
    weight = np.random.default_rng(0).standard_normal((4, channels), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, bits, size, grid=grid, scale_dtype=np.float16)
    with pytest.raises(ValueError, match=rf"^{LAYER}: the gguf format stores"):
        GgufFormat.pack(LAYER, tensor)


def test_reordered_groups_are_refused() -> None:
    tensor = random_tensor("affine", 4, 2, 2, 0)
    index = np.arange(64, dtype=np.int32) % 2
    with pytest.raises(ValueError, match=rf"^{LAYER}: "):
        GgufFormat.pack(LAYER, replace(tensor, group_index=index))


@by_type
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_damage(grid: Grid, bits: int, wrong: float) -> None:
    array = packed(random_tensor(grid, bits, 2, 2, 0))
    for name in {"d", "dmin", "m"} & set(array.dtype.names or ()):
        damaged = array.copy()
        damaged[name][1, 0] = wrong
        with pytest.raises(CheckpointError, match=rf"^model.gguf: tensor {LAYER}.weight"):
            unpacked(damaged)


# models


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "default"])
@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("awq", 6), ("awq+gptq", 3), ("awq", 2)])
def test_awq_on_superblocks(method: str, bits: int, preset: Any, tmp_path: Path) -> None:
    """Scales are searched with the grid of each group, and then superblocks are fitted."""
    model = k_model(tmp_path / "model")
    ids = np.random.default_rng(1).integers(0, 512, (8, 64))
    run: dict[str, Any] = {"format": "gguf", "calibration": ids, "progress": False}
    bitwright.quantize(model, tmp_path / "rtn", "rtn", bits, format="gguf", progress=False)
    report = bitwright.quantize(model, tmp_path / "awq", method, bits, preset=preset, **run)
    assert len(report.blocks) == 2
    tensor = bitwright.load_model(tmp_path / "awq").quantized("model.layers.0.mlp.up_proj")
    assert tensor is not None
    assert tensor.superblocks is not None
    divergences = [
        bitwright.evaluate(tmp_path / name, ids, reference=model).kl_divergence
        for name in ("awq", "rtn")
    ]
    assert divergences[0] is not None
    assert divergences[1] is not None
    assert divergences[0] < 1.02 * divergences[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return k_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of the model in a precision, made once."""
    base = tmp_path_factory.mktemp("quantized")

    def folder(bits: int, **options: Any) -> Path:
        out = base / "-".join(map(str, [bits, *options.values()]))
        if not out.exists():
            options |= {"format": "gguf", "float_embeddings": True}
            bitwright.quantize(original, out, "rtn", bits, progress=False, **options)
        return out

    return folder


def layers(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    yield from model.linear_shapes().items()
    for name in (model.embedding_name, model.head_name):
        yield name, (model.config.vocab_size, model.config.hidden_size)


@pytest.mark.parametrize(
    ("bits", "grid", "options"),
    [
        *((bits, None, {}) for bits in (2, 3, 4, 5, 6, 8)),
        (3, "k", {"embedding_bits": 6, "head_bits": 2}),
        (4, None, {"embedding_bits": 5, "head_bits": 5, "grid_search": True}),
        (4, "affine", {"embedding_bits": 5}),
        (4, "symmetric", {"embedding_bits": 8, "head_bits": 5}),
        (5, "affine", {}),
        (5, "symmetric", {"grid_search": True}),
    ],
)
def test_a_model_is_what_was_rounded_however_it_is_opened(
    original: Path,
    quantized: Callable[..., Path],
    tmp_path: Path,
    bits: int,
    grid: Grid | None,
    options: dict[str, Any],
) -> None:
    out = quantized(bits, **options, **({"grid": grid} if grid else {}))
    assert sorted(file.name for file in out.glob("model*")) == ["model.gguf"]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.gguf").symlink_to(out / "model.gguf")
    moved = shutil.copytree(out, tmp_path / "moved")
    (moved / "config.json").rename(tmp_path / "config.json")
    source = bitwright.load_model(original)
    models = [bitwright.load_model(each) for each in (out, out / "model.gguf", moved, alone)]
    wanted_bits = {
        source.embedding_name: options.get("embedding_bits"),
        source.head_name: options.get("head_bits"),
    }
    for name, shape in layers(source):
        weight, here = source.weight(name, shape), wanted_bits.get(name, bits)
        if here is None:
            for model in models:
                assert model.quantized(name) is None
                np.testing.assert_array_equal(model.weight(name, shape), weight)
            continue
        kind: Grid = grid or ("k" if bits in K_GRIDS else "symmetric")
        wanted = bitwright.quantize_rtn(
            weight,
            here,
            None if kind == "k" else 32,
            grid=kind,
            scale_dtype=None if kind == "k" else np.float16,
            grid_search=options.get("grid_search", kind == "k"),
        )
        for model in models:
            assert_identical(model.quantized(name), wanted)
            np.testing.assert_array_equal(model.weight(name, shape), wanted.dequantize())
    # The weights are the same; the first and the last differ in what they have for a configuration.
    ends = models[0], models[-1]
    found = [bitwright.evaluate(model, IDS[:2], reference=source) for model in ends]
    assert math.isfinite(found[0].perplexity)
    assert found[0].kl_divergence is not None
    assert 0 < found[0].kl_divergence < 100 * 4.0**-bits
    assert len({(each.perplexity, each.kl_divergence) for each in found}) == 1


@pytest.mark.parametrize(
    ("bits", "options", "kinds"),
    [
        (4, {"overrides": {"*.down_proj": {"bits": 6}}, "embedding_bits": 6}, {"Q4_K", "Q6_K"}),
        (3, {"grid": "k", "embedding_bits": 8, "head_bits": 5}, {"Q3_K", "Q8_0", "Q5_K"}),
        (
            8,
            {"overrides": {"*.v_proj": {"bits": 2}}, "embedding_bits": 4},
            {"Q8_0", "Q2_K", "Q4_0"},
        ),
        (5, {"grid": "affine", "embedding_bits": 8}, {"Q5_1", "Q8_0", "Q6_K"}),
    ],
)
def test_other_bits_come_with_groups_and_grids_of_their_own(
    original: Path, tmp_path: Path, bits: int, options: dict[str, Any], kinds: set[str]
) -> None:
    out = tmp_path / "q"
    bitwright.quantize(original, out, "rtn", bits, format="gguf", progress=False, **options)
    model = bitwright.load_model(out)
    stored = {TYPE_NAMES[model.checkpoint.dtype(name)] for name in model.packed_tensors()}
    assert stored == kinds
    assert math.isfinite(bitwright.evaluate(model, IDS[:1]).perplexity)


@pytest.mark.parametrize("bits", [2, 6])
def test_gptq_is_nearer_than_rounding(
    original: Path, quantized: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    options: dict[str, Any] = {"format": "gguf", "calibration": IDS[2:], "progress": False}
    options["float_embeddings"] = True
    bitwright.quantize(original, tmp_path / "q", "gptq", bits, **options)
    model = bitwright.load_model(tmp_path / "q")
    for name in model.linear_shapes():
        tensor = model.quantized(name)
        assert tensor is not None
        assert tensor.superblocks is not None
    gptq, rtn = (
        bitwright.evaluate(each, IDS[2:], reference=original).kl_divergence
        for each in (tmp_path / "q", quantized(bits))
    )
    assert gptq is not None
    assert rtn is not None
    assert gptq < 0.8 * rtn


# training


def coarse(values: NDArray[np.float16]) -> NDArray[np.float16]:
    """Leave so few bits that float16 holds a product with a few more."""
    return (values.view(np.uint16) & 0xFFC0).view(np.float16)


@by_k_bits
def test_gradient_of_superblocks_is_that_of_the_weights(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((12, 512), dtype=np.float32)
    start = bitwright.quantize_rtn(weight, bits, None, grid="k", grid_search=True)
    assert start.superblocks is not None
    dmin = start.superblocks.dmin
    blocks = replace(
        start.superblocks,
        d=coarse(start.superblocks.d),
        dmin=None if dmin is None else coarse(dmin),
    )
    start = replace(start, scales=blocks.scales(), biases=blocks.biases(), superblocks=blocks)
    trained = TrainedSuperBlocks(start, blocks)
    assert_identical(trained.tensor(), start)
    rng = np.random.default_rng(1)
    slopes = rng.standard_normal((12, 512))  # of a loss that is linear in the weights
    trained.add_gradient(np.eye(512, dtype=np.float32), np.ascontiguousarray(slopes.T, np.float32))
    gradient = trained.gradient()
    assert gradient.shape == (1 if dmin is None else 2, 12, 2)
    assert not trained.sums.any()
    for place in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            trained.parameters[...] = 0
            # Exact in float16, and the weights are linear in it.
            trained.parameters[place] = np.float32(sign / 4) / PACE
            ends.append(float((slopes * trained.tensor().dequantize()).sum()))
        measured = float(PACE) * (ends[0] - ends[1]) * 2
        assert gradient[place] == pytest.approx(measured, rel=1e-4, abs=1e-2)
    moved = trained.tensor().superblocks
    assert moved is not None
    np.testing.assert_array_equal(moved.scale_codes, blocks.scale_codes)
    assert moved.d.dtype == np.float16


@pytest.mark.parametrize("bits", [3, 4])
def test_gradients_of_a_model_with_superblocks(quantized: Callable[..., Path], bits: int) -> None:
    """From the codes, they are what the dense gradients come to."""
    model = bitwright.load_model(quantized(bits, embedding_bits=bits, head_bits=bits))
    student = Student(model)
    network = Network(model, student.weight)
    dense: dict[str, Array] = {}

    def on_linear(name: str, inputs: Array, above: Array) -> None:
        student.add_gradient(name, inputs, above)
        dense[name] = dense.get(name, 0) + above.T.astype(np.float64) @ inputs

    def on_embedding(rows: NDArray[np.int32], above: Array) -> None:
        student.add_row_gradient(rows, above)
        known = dense.setdefault(model.embedding_name, np.zeros((512, 256)))
        np.add.at(known, rows, above)

    network.gradients(
        IDS[:2], SquaredLogits(), on_linear, on_embedding=on_embedding, on_head=on_linear
    )
    gradients = student.gradients()
    assert gradients.keys() == dense.keys()
    for name, found in gradients.items():
        trained = student.tensors[name]
        assert isinstance(trained, TrainedSuperBlocks)
        per = dense[name].reshape(*trained.blocks.d.shape, SUPERBLOCK)
        wanted = [per * trained.start.dequantize().reshape(per.shape)]
        if trained.start.biases is not None:
            biases = np.repeat(trained.start.biases, trained.start.group_size, axis=1)
            wanted.append(per * biases.reshape(per.shape) / 2)
        sums = float(PACE) * np.stack([each.sum(axis=2) for each in wanted])
        np.testing.assert_allclose(found, sums, rtol=0, atol=1e-3 * np.abs(sums).max())


def stored(path: Path) -> dict[str, Any]:
    """What a file says of the model, and its tensors."""
    with GgufCheckpoint(path) as checkpoint:
        said = {key: str(value) for key, value in checkpoint.metadata.items()}
        return said | {name: checkpoint.read(name).tobytes() for name in checkpoint.names()}


def train(original: Path, start: Path, out: Path, **options: Any) -> bitwright.DwqReport:
    changed = {"tokens": 6 * 4 * IDS.shape[1], "validation": IDS[:2], "progress": False, **options}
    return bitwright.dwq_quantize(original, start, out, IDS[2:], **changed)


@pytest.mark.parametrize(
    ("bits", "options"), [(2, {"embedding_bits": 3}), (3, {}), (4, {"grid": "symmetric"})]
)
def test_training_writes_the_student_that_was_measured(
    original: Path,
    quantized: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    options: dict[str, Any],
) -> None:
    # Without a search there is more to be learnt in a few steps.
    start, out = quantized(bits, grid_search=False, **options), tmp_path / "out"
    measured: dict[str, QuantizedTensor] = {}
    packed_by = Student.stored

    def watched(self: Student) -> dict[str, Array]:
        measured.update({name: each.tensor() for name, each in self.tensors.items()})
        return packed_by(self)

    monkeypatch.setattr(Student, "stored", watched)
    report = train(original, start, out, learning_rate=3e-4, validate_every=1)
    assert report.best_step > 0
    assert report.kl_after < report.kl_before
    assert sorted(file.name for file in out.glob("model*")) == ["model.gguf"]
    models = [bitwright.load_model(each) for each in (out, out / "model.gguf")]
    before, moved = bitwright.load_model(start), 0
    assert len(measured) == 14 + ("embedding_bits" in options)
    for name, wanted in measured.items():
        first = before.quantized(name)
        assert first is not None
        for model in models:
            found = model.quantized(name)
            assert_identical(found, wanted)
            assert found is not None
            np.testing.assert_array_equal(found.codes, first.codes)
        if wanted.superblocks is not None and first.superblocks is not None:
            for each in ("scale_codes", "min_codes"):
                one, two = (getattr(it.superblocks, each) for it in (wanted, first))
                assert (one is None) == (two is None)
                np.testing.assert_array_equal(one, two)
        moved += int((wanted.scales != first.scales).any())
    assert moved > 10
    one, two = (stored(folder / "model.gguf") for folder in (start, out))
    assert one.keys() == two.keys()
    changed = {name.removesuffix(".weight") for name in one if one[name] != two[name]}
    assert changed <= measured.keys()


@pytest.mark.parametrize("rate", [1e6, 1e38])
def test_absurd_learning_rates_keep_the_start(
    original: Path, quantized: Callable[..., Path], tmp_path: Path, rate: float
) -> None:
    start = quantized(2)
    report = train(original, start, tmp_path / "out", learning_rate=rate, validate_every=1)
    assert report.best_step == 0
    assert report.kl_after == report.kl_before
    assert stored(tmp_path / "out" / "model.gguf") == stored(start / "model.gguf")


# damage


@pytest.mark.parametrize("with_config", [True, False])
def test_a_file_cut_short_is_named(
    quantized: Callable[..., Path], tmp_path: Path, with_config: bool
) -> None:
    folder = shutil.copytree(quantized(2), tmp_path / "q")
    if not with_config:
        (folder / "config.json").unlink()
    path = folder / "model.gguf"
    content = path.read_bytes()
    for end in (0, 3, 40, 1000, len(content) // 2, len(content) - 33):
        path.write_bytes(content[:end])
        for place in (folder, path):
            with pytest.raises(CheckpointError, match=r"model\.gguf"):
                bitwright.load_model(place)


Change = Callable[[dict[str, Any], dict[str, Array]], None]


def fewer_rows(name: str) -> Change:
    return lambda _, tensors: tensors.update({name: tensors[name][:-32].copy()})


def without(name: str) -> Change:
    return lambda _, tensors: tensors.__delitem__(name)


def said(key: str, value: object) -> Change:
    return lambda metadata, _: metadata.update({key: value})


def nan_scale(metadata: dict[str, Any], tensors: dict[str, Array]) -> None:
    tensors["blk.1.ffn_down.weight"]["d"][3, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "with_config"),
    [
        *product(
            [
                fewer_rows("blk.0.attn_q.weight"),
                fewer_rows("blk.1.ffn_down.weight"),
                without("blk.1.ffn_up.weight"),
                without("blk.0.attn_norm.weight"),
                without("token_embd.weight"),
                nan_scale,
            ],
            [True, False],
        ),
        *product(
            [
                said("llama.block_count", 3),
                said("llama.embedding_length", 128),
                said("llama.attention.head_count", 5),
                said("llama.feed_forward_length", "many"),
            ],
            [False],
        ),
    ],
)
def test_contradictions_are_named(
    quantized: Callable[..., Path], tmp_path: Path, change: Change, with_config: bool
) -> None:
    folder = shutil.copytree(quantized(2), tmp_path / "q")
    path = folder / "model.gguf"
    with GgufCheckpoint(path) as checkpoint:
        (shard,) = checkpoint._shards.values()
        raw: Any = shard
        tensors = {
            info.name: raw.load(position, info.dtype, info.shape)
            for info, position in raw.tensors.values()
        }
        metadata = dict(checkpoint.metadata)
    change(metadata, tensors)
    write_gguf(path, metadata, tensors)
    if not with_config:
        (folder / "config.json").unlink()
    for place in (folder, path):
        with pytest.raises(CheckpointError, match=re.escape(str(folder))):
            bitwright.evaluate(place, IDS[:1])


@pytest.mark.parametrize(
    ("options", "file_type"),
    [
        ({"bits": 4, "grid": "affine"}, 3),  # the case: Q4_1 beside a larger float embedding
        ({"bits": 4, "grid": "symmetric"}, 2),
        ({"bits": 5, "grid": "affine", "embedding_bits": 8}, 9),
        ({"bits": 8, "grid": "symmetric", "exclude": ["*.0.*"]}, 7),
        # Most weights are in 4 bits, most bytes in 8.
        ({"bits": 4, "grid": "affine", "overrides": {"*.mlp.*_proj": {"bits": 8}}}, None),
        ({"bits": 4, "grid": "k"}, 15),
    ],
)
def test_file_type_is_that_of_most_quantized_weights(
    original: Path, tmp_path: Path, options: dict[str, Any], file_type: int | None
) -> None:
    model = original if options["grid"] == "k" else bitwright.demo_folder()
    bitwright.quantize(model, tmp_path / "q", "rtn", format="gguf", progress=False, **options)
    checkpoint = GgufCheckpoint(tmp_path / "q" / "model.gguf")
    counts: dict[str, int] = {}
    for name in checkpoint.names():
        kind = TYPE_NAMES[checkpoint.dtype(name)]
        if checkpoint.dtype(name).names:
            weights = math.prod(checkpoint.shape(name)) * weights_per_block(checkpoint.dtype(name))
            counts[kind] = counts.get(kind, 0) + weights
    most = max(counts, key=lambda kind: counts[kind])
    known = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 15}
    assert checkpoint.metadata["general.file_type"] == known[most]
    assert file_type in (None, known[most])


@pytest.mark.parametrize(("dtype", "file_type"), [("float32", 0), ("float16", 1), ("bfloat16", 32)])
def test_file_type_of_a_model_in_float(tmp_path: Path, dtype: Any, file_type: int) -> None:
    demo = bitwright.demo_folder()
    bitwright.convert(demo, tmp_path / "f", "float", dtype=dtype, progress=False)
    bitwright.convert(tmp_path / "f", tmp_path / "q", "gguf", progress=False)
    checkpoint = GgufCheckpoint(tmp_path / "q" / "model.gguf")
    assert checkpoint.metadata["general.file_type"] == file_type
