"""The size of an output, before and after it is written."""

from pathlib import Path
from typing import Any

import pytest
from made_models import k_model
from shared_data import TESTS

import bitwright
from bitwright.methods.registry import METHODS
from bitwright.precision.options import PrecisionOptions
from bitwright.precision.size import file_bytes, weights_bytes

TINY = TESTS / "data" / "tiny"
DEMO = bitwright.demo_folder()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return k_model(tmp_path_factory.mktemp("wide") / "model")


def weight_files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*") if path.suffix != ".json")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (None, {"format": "mlx", "bits": 3}),
        (None, {"format": "mlx", "grid": "nvfp4"}),
        (None, {"format": "gptq", "bits": 4}),
        (None, {"format": "gptq", "grid": "zero_point", "group_size": 32}),
        (None, {"format": "awq"}),
        (None, {"format": "compressed-tensors", "group_size": 32}),
        (None, {"format": "compressed-tensors", "grid": "nvfp4"}),
        (None, {"format": "marlin"}),
        (None, {"format": "gguf", "bits": 4}),
        (None, {"format": "gguf", "bits": 2, "exclude": ["*.down_proj"]}),
        (None, {"format": "gguf", "bits": 8}),
        (None, {"format": "gguf", "grid": "iq4_xs", "float_embeddings": True}),
        (DEMO, {"format": "mlx", "include": ["*.down_proj"]}),
        (TINY / "qwen3_moe", {"format": "mlx", "group_size": 32}),
        (TINY / "qwen3_moe", {"format": "gptq", "group_size": 32, "exclude": ["*layers.0.*"]}),
        (TINY / "gemma2", {"format": "mlx", "group_size": 32}),
    ],
)
def test_the_size_is_known_before(
    wide: Path, tmp_path: Path, model: Path | None, options: dict[str, Any]
) -> None:
    """All tensors to a hundredth, and the files from above."""
    opened = bitwright.load_model(model or wide)
    method = METHODS["rtn"]
    asked = PrecisionOptions(**options).for_model(opened, method)
    target = asked.target(opened, method)
    known = weights_bytes(opened, target.format, target.plan, target.scale_dtype)
    report = bitwright.quantize(model or wide, tmp_path / "q", "rtn", progress=False, **options)
    assert known == pytest.approx(report.size_bytes, rel=0.01)
    written = weight_files(tmp_path / "q")
    assert written <= file_bytes(opened, target) < 1.1 * written


@pytest.mark.parametrize("format", ["mlx", "gguf"])
def test_inspection_tells_it(wide: Path, tmp_path: Path, format: str) -> None:
    found = bitwright.inspect_model(wide, format=format, bits=3)
    report = bitwright.quantize(wide, tmp_path / "q", "rtn", 3, format=format, progress=False)
    assert found.output_format == format
    assert found.output_bytes == pytest.approx(report.size_bytes, rel=0.01)


def test_inspection_tells_why_there_is_none() -> None:
    found = bitwright.inspect_model(DEMO, format="marlin")
    assert found.output_bytes is None
    assert found.output_problem is not None
    assert "128" in found.output_problem
