"""What `bitwright inspect` says of a model, and whether its estimates are of the right size."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from shared_data import TESTS

import bitwright

DEMO = bitwright.demo_folder()
MOE = TESTS / "data" / "tiny" / "qwen3_moe"


def test_layers_and_counts() -> None:
    found = bitwright.inspect_model(MOE)
    assert (found.model_type, found.blocks, found.experts) == ("qwen3_moe", 2, 4)
    assert (found.format, found.dtype, found.tied) == (None, "bfloat16", False)
    layers = {layer.name: layer for layer in found.layers}
    assert layers["mlp.experts.*.up_proj"].count == 4
    assert layers["mlp.experts.*.up_proj"].shape == (32, 64)
    assert layers["mlp.up_proj"].count == 1
    assert layers["self_attn.q_proj"].count == 2
    assert {name for name, layer in layers.items() if not layer.quantized} == {"mlp.gate"}


@pytest.mark.parametrize(
    "folder", [DEMO, *sorted((TESTS / "data" / "tiny").iterdir())], ids=lambda folder: folder.name
)
def test_every_parameter_is_counted(folder: Path) -> None:
    """A float checkpoint holds as many numbers as it has parameters."""
    found = bitwright.inspect_model(folder)
    checkpoint = bitwright.Checkpoint(folder)
    stored = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    assert found.parameters == stored
    assert found.bits_per_weight == 8 * checkpoint.nbytes() / stored


def test_quantized_models_are_named(tmp_path: Path) -> None:
    bitwright.quantize(DEMO, tmp_path / "q", method="rtn", progress=False)
    found = bitwright.inspect_model(tmp_path / "q")
    assert found.format == "mlx"
    assert found.parameters == bitwright.inspect_model(DEMO).parameters


def test_estimates_grow_with_the_work() -> None:
    rounding = bitwright.inspect_model(DEMO, method="rtn")
    assert rounding.tokens == 0
    few, many = (bitwright.inspect_model(DEMO, samples=n, length=512) for n in (8, 8000))
    assert rounding.memory_bytes <= few.memory_bytes < many.memory_bytes
    assert few.seconds < many.seconds


@pytest.mark.slow
def test_memory_is_estimated_within_a_factor_of_two(tmp_path: Path) -> None:
    script = f"""
import bitwright, numpy as np
tokens = np.random.default_rng(0).integers(0, 512, (400, 512))
found = bitwright.inspect_model({str(DEMO)!r}, samples=400, length=512)
report = bitwright.quantize({str(DEMO)!r}, {str(tmp_path / "q")!r}, calibration=tokens,
                            samples=400, progress=False)
print(found.memory_bytes, report.peak_memory_bytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    estimated, measured = map(int, done.stdout.split())
    assert measured / 2 < estimated < 2 * measured


def test_wrong_method_is_named() -> None:
    with pytest.raises(ValueError, match="method: expected one of .*'gptqq'"):
        bitwright.inspect_model(DEMO, method="gptqq")


@pytest.mark.parametrize("as_json", [False, True])
def test_command(as_json: bool) -> None:
    command = [sys.executable, "-m", "bitwright", "inspect", str(MOE), *(["--json"] * as_json)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if as_json:
        assert json.loads(shown)["layers"][0]["name"] == "self_attn.q_proj"
    else:
        assert "mlp.experts.*.up_proj" in shown
        assert "calibration tokens" in shown
