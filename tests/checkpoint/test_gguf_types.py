"""Types of GGUF beside those of blocks with points: codebooks, and those that are read as floats."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import k_model, write_gguf

import bitwright
from bitwright import _kernels
from bitwright.checkpoint.gguf import GgufCheckpoint
from bitwright.checkpoint.gguf_file import (
    BLOCKS,
    DECODED,
    TYPE_NAMES,
    decoded,
    weights_per_block,
)
from bitwright.errors import CheckpointError, CheckpointNotFoundError
from bitwright.grids.tables import TABLES
from bitwright.grids.tensor import SuperBlocks

# CRC-32 of what the gguf package 0.19.0 and llama.cpp (llama-cpp-python 0.3.36) both decode; of Q1_0 and
# Q2_0, which the package does not, only of llama.cpp's.
DECODED_SUMS = {
    "IQ2_XXS": 0xFFFADFE6,
    "IQ2_XS": 0x7A48AE3A,
    "IQ3_XXS": 0xE8EC831C,
    "IQ1_S": 0xAC656AF2,
    "IQ3_S": 0x0A45FF8B,
    "IQ2_S": 0xD2FEF35E,
    "IQ1_M": 0x1BB622A2,
    "TQ1_0": 0x0DCBE2C2,
    "TQ2_0": 0x05E3AB9D,
    "Q1_0": 0x81B35996,
    "Q2_0": 0x202CC0D8,
}
CODEBOOK_SUMS = {
    "IQ1_S": 0xB85E6CCF,
    "IQ2_XXS": 0x9924FF02,
    "IQ2_XS": 0xFA1E1BFD,
    "IQ2_S": 0x25AE5BF1,
    "IQ3_XXS": 0x07BA9ED0,
    "IQ3_S": 0xF576E4F3,
}
Array = np.ndarray[Any, Any]


def random_blocks(kind: str, rows: int = 64, columns: int = 8) -> Array:
    """Blocks of all bytes."""
    size = BLOCKS[kind].itemsize
    content = np.random.default_rng(1).bytes(rows * columns * size)
    return np.frombuffer(content, BLOCKS[kind]).reshape(rows, columns)


def weights_of(blocks: Array) -> Array:
    """What blocks stand for."""
    kind = TYPE_NAMES[blocks.dtype]
    if kind in DECODED:
        return decoded(blocks)
    codes, d, scale_codes = _kernels.unpack_vectors(
        np.ascontiguousarray(blocks).view(np.uint8), kind
    )
    scales = SuperBlocks(d, scale_codes).scales()
    weights = np.empty(codes.shape, np.float32)
    points = TABLES[kind.lower()].by_code
    _kernels.dequantize(codes, scales, None, None, None, weights, points)
    return weights


def sound_blocks(kind: str, rows: int, columns: int) -> Array:
    """Blocks whose scales are finite."""
    found = random_blocks(kind, rows, columns).view(np.uint8) % 24
    return found.view(BLOCKS[kind]).reshape(rows, columns)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("kind", DECODED_SUMS)
def test_blocks_are_decoded_as_by_llama_cpp(kind: str) -> None:
    weights = weights_of(random_blocks(kind))
    assert weights.shape == (64, 8 * weights_per_block(BLOCKS[kind]))
    finite = np.nan_to_num(weights)  # NaN has many spellings
    assert zlib.crc32(finite.view(np.uint8)) == DECODED_SUMS[kind]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("kind", [each for each in DECODED_SUMS if each not in ("Q1_0", "Q2_0")])
def test_blocks_are_decoded_as_by_the_gguf_package(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    number = pytest.importorskip("gguf").GGMLQuantizationType[kind]
    blocks = random_blocks(kind)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks.view(np.uint8).reshape(64, -1), number)
    np.testing.assert_array_equal(weights_of(blocks), expected)


@pytest.mark.parametrize("name", CODEBOOK_SUMS)
def test_codebooks_have_all_vectors(name: str) -> None:
    found = _kernels.codebook(name)
    assert len(np.unique(found, axis=0)) == len(found)
    assert zlib.crc32(found.view(np.uint8)) == CODEBOOK_SUMS[name]
    quants = pytest.importorskip("gguf.quants")
    kind = getattr(quants, name)
    kind.init_grid()
    np.testing.assert_array_equal(found, kind.grid.reshape(kind.grid_shape))


def test_names_and_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="no type of blocks is called IQ4_NL"):
        _kernels.decode_blocks(np.zeros((1, 18), np.uint8), "IQ4_NL")
    with pytest.raises(ValueError, match="no whole number of blocks of 18"):
        _kernels.decode_blocks(np.zeros((1, 19), np.uint8), "Q2_0")
    with pytest.raises(ValueError, match="no codebook is called IQ4_NL"):
        _kernels.codebook("IQ4_NL")


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    bitwright.convert(k_model(folder / "model"), folder / "gguf", "gguf", progress=False)
    return folder / "gguf" / "model.gguf"


def parts(file: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The metadata and tensors of a file, as they are stored."""
    from hostile.files import read_gguf

    return read_gguf(file.read_bytes())


def test_a_model_of_all_types_is_read(float_file: Path, tmp_path: Path) -> None:
    metadata, tensors = parts(float_file)
    matrices = [name for name, each in tensors.items() if each.ndim == 2]
    for name, kind in zip(matrices, DECODED_SUMS, strict=False):
        rows, width = tensors[name].shape
        tensors[name] = sound_blocks(kind, rows, width // weights_per_block(BLOCKS[kind]))
    path = write_gguf(tmp_path / "model.gguf", metadata, tensors)
    with GgufCheckpoint(path) as checkpoint:
        model = bitwright.load_model(path)
        for name in checkpoint.names():
            stored = tensors[model_name(checkpoint, name)]
            if TYPE_NAMES[stored.dtype] not in DECODED:
                continue
            whole = checkpoint.read(name)
            assert whole.dtype == checkpoint.dtype(name) == np.float32
            assert whole.shape == checkpoint.shape(name)
            if not name.endswith(("q_proj.weight", "k_proj.weight")):  # rows lie otherwise there
                np.testing.assert_array_equal(whole, decoded(stored))
                np.testing.assert_array_equal(checkpoint.read_rows(name, 3, 9), whole[3:9])
        assert checkpoint.stored_bytes() == sum(each.nbytes for each in tensors.values())
        assert checkpoint.decoded_type() in DECODED
    assert np.isfinite(model.logits(np.zeros((1, 4), np.int32))).all()
    with pytest.raises(ValueError, match="is quantized already"):
        bitwright.quantize(path, tmp_path / "out", "rtn", progress=False)
    with pytest.raises(ValueError, match="mlx"):
        bitwright.convert(path, tmp_path / "out", "mlx", progress=False)
    bitwright.convert(path, tmp_path / "out", "float", progress=False)
    again = bitwright.load_model(tmp_path / "out")
    for name, shape in model.linear_shapes().items():
        np.testing.assert_array_equal(again.weight(name, shape), model.weight(name, shape))


def model_name(checkpoint: GgufCheckpoint, name: str) -> str:
    from bitwright.checkpoint.gguf_names import GgufNames

    return GgufNames(checkpoint.config, checkpoint.path).gguf_name(name)


def test_scales_that_are_no_numbers_are_refused(float_file: Path, tmp_path: Path) -> None:
    metadata, tensors = parts(float_file)
    name = "blk.0.ffn_up.weight"
    blocks = sound_blocks(
        "IQ3_S",
        *(extent // each for extent, each in zip(tensors[name].shape, (1, 256), strict=True)),
    )
    blocks.view(np.uint8)[5, 1] = 0x7E  # of d
    path = write_gguf(tmp_path / "model.gguf", metadata, {**tensors, name: blocks})
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.mlp\.up_proj.* are NaN"):
        bitwright.evaluate(path, np.zeros((1, 4), np.int32))


def split_file(file: Path, folder: Path, count: int, **said: Any) -> list[Path]:
    """Write a model as several files."""
    metadata, tensors = parts(file)
    names, paths = list(tensors), []
    for number in range(count):
        keys = {} if number else dict(metadata)
        keys |= {"split.no": np.uint16(number), "split.count": np.uint16(count)}
        keys |= {"split.tensors.count": np.int32(len(names))} | said
        path = folder / f"small-{number + 1:05d}-of-{count:05d}.gguf"
        paths.append(write_gguf(path, keys, {n: tensors[n] for n in names[number::count]}))
    return paths


def test_several_files_are_one_model(float_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    paths = split_file(float_file, folder, 3)
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    expected = bitwright.evaluate(float_file, tokens)
    for place in (folder, *paths):  # as a whole, or by any of its files
        assert bitwright.evaluate(place, tokens).perplexity == expected.perplexity
    with GgufCheckpoint(paths[1]) as checkpoint, GgufCheckpoint(float_file) as whole:
        assert checkpoint.path == paths[0]
        assert checkpoint.weight_files() == paths
        assert checkpoint.nbytes() == checkpoint.stored_bytes() == whole.nbytes()
        assert checkpoint.file("model.norm.weight") in paths
    bitwright.convert(folder, tmp_path / "out", "gguf", progress=False)
    assert parts(tmp_path / "out" / "model.gguf")[1].keys() == parts(float_file)[1].keys()
    assert "split.count" not in parts(tmp_path / "out" / "model.gguf")[0]
    assert "small" in (tmp_path / "out" / "README.md").read_text()
    assert bitwright.inspect_model(folder).blocks == 2


def test_several_files_must_belong_together(float_file: Path, tmp_path: Path) -> None:
    paths = split_file(float_file, tmp_path, 2)
    first = paths[0].read_bytes()
    paths[1].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointNotFoundError, match=r"small-00002-of-00002\.gguf: is missing"):
        GgufCheckpoint(paths[0])
    with pytest.raises(CheckpointError, match="holds 2 GGUF files"):
        bitwright.load_model(tmp_path)
    paths[1].write_bytes(first)
    with pytest.raises(CheckpointError, match="part 1 of 2, but its name says 2 of 2"):
        GgufCheckpoint(paths[0])
    split_file(float_file, tmp_path, 2, **{"split.tensors.count": np.int32(7)})
    with pytest.raises(CheckpointError, match="should have 7 tensors, but have 21"):
        GgufCheckpoint(paths[0])
    tensors = parts(float_file)[1]
    count = np.int32(len(tensors) + (len(tensors) + 1) // 2)
    split_file(float_file, tmp_path, 2, **{"split.tensors.count": count})
    said = {"split.no": np.uint16(1), "split.count": np.uint16(2)}
    write_gguf(paths[1], {**said, "split.tensors.count": count}, tensors)
    with pytest.raises(CheckpointError, match="is in another part, too"):
        GgufCheckpoint(paths[0])
