"""Embeddings and heads in pieces of the vocabulary: none is ever whole in float32, and none has other
bytes for it."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sized_models import make_sized

import bitwright
from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.shard import DTYPES
from bitwright.grids.tensor import QuantizedTensor
from bitwright.models import matrix_rows
from bitwright.models.matrix_rows import SOLVED_ROWS
from bitwright.quantization.layers import MatrixPieces

DEMO = bitwright.demo_folder()
VOCABULARY, WIDTH = 700, 256
IDS = np.random.default_rng(0).integers(0, 512, (8, 64))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own, of three pieces of which the last is not full."""
    folder = tmp_path_factory.mktemp("model") / "model"
    changes = {
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "head_dim": 64,
    }
    made = make_sized(folder, "llama-linear", vocab_size=VOCABULARY, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, made / name)
    return made


def weights(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    assert files
    return {file.name: file.read_bytes() for file in files}


def errors(report: bitwright.QuantizationReport) -> list[float]:
    return [layer.error for layer in report.layers]


@pytest.mark.parametrize(
    ("method", "format", "bits", "options"),
    [
        ("rtn", "mlx", 4, {}),
        ("rtn", "gguf", 4, {}),
        ("gptq", "mlx", 4, {}),
        ("gptq", "gguf", 4, {}),
        ("awq", "mlx", 4, {}),
        ("awq", "gguf", 4, {"grid": "affine"}),
        ("awq+gptq", "mlx", 3, {}),
        ("salient", "mlx", 4, {"group_size": 64}),
    ],
)
def test_pieces_have_the_bytes_of_the_whole(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    format: str,
    bits: int,
    options: dict[str, Any],
) -> None:
    """And layers the errors that are reported of them."""
    run: dict[str, Any] = {"format": format, "head_bits": bits, "embedding_bits": bits} | options
    run |= {"progress": False} | ({} if method == "rtn" else {"calibration": IDS})
    whole = bitwright.quantize(model, tmp_path / "whole", method, bits, **run)
    seen: list[int] = []
    floats, dequantize = MatrixPieces.floats, QuantizedTensor.dequantize

    def read(pieces: MatrixPieces, rows: slice) -> Any:
        found = floats(pieces, rows)
        seen.append(len(found))
        return found

    def weighed(tensor: QuantizedTensor, first: int = 0, last: int | None = None) -> Any:
        found = dequantize(tensor, first, last)
        if tensor.shape[0] == VOCABULARY:
            seen.append(len(found))
        return found

    monkeypatch.setattr(matrix_rows, "PIECE_BYTES", 4 * WIDTH * SOLVED_ROWS)
    monkeypatch.setattr(MatrixPieces, "floats", read)
    monkeypatch.setattr(QuantizedTensor, "dequantize", weighed)
    pieces = bitwright.quantize(model, tmp_path / "pieces", method, bits, **run)
    assert weights(tmp_path / "pieces") == weights(tmp_path / "whole")
    assert errors(pieces) == errors(whole)
    # The weights that salient protects are chosen among those of all rows.
    assert max(seen) == (VOCABULARY if method == "salient" else SOLVED_ROWS)


@pytest.mark.filterwarnings("ignore:.*had weights too small for float16 scales")
@pytest.mark.parametrize("options", [{}, {"scale_dtype": "float16"}, {"fixed": True}])
def test_other_ways_to_quantize_a_head(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """With a norm before it that takes a power of two, in a fixed order of sums, and refined."""
    small = tmp_path / "model"
    shutil.copytree(model, small)
    if "scale_dtype" in options:
        tensors = load_file(small / "model.safetensors")
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = (head.astype(np.float32) * 2.0**-20).astype(head.dtype)
        save_file(tensors, small / "model.safetensors")
    run: dict[str, Any] = {"head_bits": 4, "embedding_bits": 4, "progress": False}
    run |= {"calibration": IDS} | {k: v for k, v in options.items() if k != "fixed"}
    for name in ("whole", "pieces"):
        with bitwright.spread_over(None, "fixed" in options):
            report = bitwright.quantize(small, tmp_path / name, "gptq", 4, **run)
            bitwright.refine_model(
                small, tmp_path / name, tmp_path / f"{name} refined", IDS, progress=False
            )
        monkeypatch.setattr(matrix_rows, "PIECE_BYTES", 4 * WIDTH * SOLVED_ROWS)
    for end in ("", " refined"):
        assert weights(tmp_path / f"pieces{end}") == weights(tmp_path / f"whole{end}")
    assert report.layers[-1].name == "lm_head"
    assert (report.layers[-1].power > 0) == ("scale_dtype" in options)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3"])
@pytest.mark.parametrize("rows", [(0, 16), (100, 101), (4000, 4096)])
def test_of_a_part_of_a_tensor_no_more_is_read(
    tmp_path: Path, dtype: str, rows: tuple[int, int]
) -> None:
    values = np.random.default_rng(0).standard_normal((4096, 512)).astype(DTYPES[dtype])
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    raw = values.view(np.uint8 if dtype.startswith("F8") else values.dtype)
    save_file({"a": raw}, folder / "model.safetensors")
    if dtype.startswith("F8"):
        content = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["a"]["dtype"] = dtype
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + content[8 + length :]
        )
    with Checkpoint(folder) as checkpoint:
        tracemalloc.start()
        found = checkpoint.read_rows("a", *rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.tobytes() == values[slice(*rows)].tobytes()
    assert peak < found.nbytes + 200_000
