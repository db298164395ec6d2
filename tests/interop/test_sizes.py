"""Files are as large as those that the peers write at the same precision."""

from pathlib import Path
from typing import Any

import pytest
from clients import run_client
from made_models import k_model
from shared_data import SHARED, needs_shared

import bitwright

SMALL = SHARED / "models" / "small"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return k_model(tmp_path_factory.mktemp("wide") / "model")


def rounded(model: Path, out: Path, **options: Any) -> int:
    """Return the size of the weight file."""
    bitwright.quantize(model, out, "rtn", progress=False, **options)
    return size_of(out)


def size_of(folder: Path) -> int:
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf")]
    return sum(path.stat().st_size for path in files)


def check_mlx(model: Path, tmp_path: Path, bits: int) -> None:
    theirs = tmp_path / "theirs"
    run_client("mlx", "make_with_mlx.py", model, theirs, tmp_path / "w.npz", "--bits", str(bits))
    ours = rounded(model, tmp_path / "ours", bits=bits, group_size=64)
    assert ours == pytest.approx(size_of(theirs), rel=0.02)


@pytest.mark.slow
def test_untied_models_in_mlx(wide: Path, tmp_path: Path) -> None:
    check_mlx(wide, tmp_path, 4)


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("bits", [3, 4])
def test_small_in_mlx(tmp_path: Path, bits: int) -> None:
    check_mlx(SMALL, tmp_path, bits)


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("kind", ["Q4_K_S", "Q4_K_M"])
def test_small_in_gguf(tmp_path: Path, kind: str) -> None:
    """Of the same float file, with the same tokenizer."""
    bitwright.convert(SMALL, tmp_path / "float", "gguf", dtype="float32", progress=False)
    theirs = tmp_path / "theirs.gguf"
    source = tmp_path / "float" / "model.gguf"
    run_client("llamacpp", "quantize_with_llamacpp.py", source, kind, theirs)
    ours = rounded(SMALL, tmp_path / "ours", format="gguf", type=kind)
    assert ours == pytest.approx(theirs.stat().st_size, rel=0.02)
    if kind == "Q4_K_S":  # which is what 4 bits are, but for a few layers
        plain = rounded(SMALL, tmp_path / "plain", format="gguf", bits=4)
        assert plain == pytest.approx(theirs.stat().st_size, rel=0.02)
