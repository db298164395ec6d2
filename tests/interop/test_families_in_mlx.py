"""mlx-lm computes from the files of the families with parts of their own what bitwright does."""

import json
from pathlib import Path

import numpy as np
import pytest
from clients import run_client

import bitwright

pytestmark = pytest.mark.slow
TINY = Path(__file__).parents[1] / "data" / "tiny"
# How close: mlx-lm adds 1 to some gains in their own 16 bits.
FAMILIES = {
    "gpt_oss": 5e-2,
    "qwen3_next": 1e-4,
    "qwen3_5": 1e-1,
    "qwen3_5_moe": 1e-1,
    "lfm2": 1e-4,
    "lfm2_moe": 1e-4,
    "cohere2": 1e-4,
    "exaone4": 1e-4,
    "hunyuan_v1_dense": 1e-4,
    "minimax_m2": 1e-4,
    "granitemoe": 1e-4,
    "mistral3-ministral3": 1e-4,
    "qwen2_5_vl": 1e-4,
    "qwen3_vl": 1e-4,
    "qwen3_vl_moe": 1e-4,
    "gemma4": 1e-4,
    "glm4_moe": 1e-4,
    "glm4_moe_lite": 2e-4,
    "solar_open": 1e-4,
    "phi": 1e-4,
}


def test_logits_are_those_of_mlx_lm(tmp_path: Path) -> None:
    for name in FAMILIES:
        source = TINY / name
        if name == "gpt_oss":  # mlx-lm has its own limit, that of the released models
            source = tmp_path / "gpt_oss-source"
            source.mkdir()
            for file in (TINY / name).iterdir():
                (source / file.name).write_bytes(file.read_bytes())
            config = json.loads((source / "config.json").read_text()) | {"swiglu_limit": 7.0}
            (source / "config.json").write_text(json.dumps(config))
        shapes = bitwright.load_model(source).linear_shapes()
        odd = [layer for layer, shape in shapes.items() if shape[1] % 32]
        bitwright.quantize(source, tmp_path / name, "rtn", 8, 32, exclude=odd, progress=False)
    printed = run_client(
        "mlx", "mlx_logits.py", "--float32", *(tmp_path / name for name in FAMILIES)
    )
    lines = [line for line in printed.splitlines() if line.startswith('{"logits"')]
    for (name, close), line in zip(FAMILIES.items(), lines, strict=True):
        found = np.array(json.loads(line)["logits"])
        expected = bitwright.load_model(tmp_path / name).logits([[5, 6, 7]])[0, -1]
        assert np.abs(found - expected).max() < close * max(1, np.abs(expected).max()), name
