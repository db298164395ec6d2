"""Preset high: better than the default, resumable, and refused where it cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_runs import DEMO, TEXT, divergence, run
from made_models import k_model
from told import TOLD

import bitwright
from bitwright.blocks.output_metrics import OutputMetrics
from bitwright.quantization.layers import Layers
from bitwright.warned import BitwrightWarning

OPTIONS: dict[str, Any] = {"preset": "high", "bits": 2, "group_size": 32}
ENOUGH = {"samples": 48}  # for gradients that tell something


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TOLD}


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_predictions_change_less(tmp_path: Path, method: str) -> None:
    run(tmp_path / "default", method=method, **ENOUGH)
    run(tmp_path / "high", method=method, preset="high", **ENOUGH)
    assert divergence(tmp_path / "high") < 0.97 * divergence(tmp_path / "default")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default", "high"]


@pytest.mark.parametrize("place", ["gradients", "blocks"])
def test_interrupted_runs_resume_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run(tmp_path / "whole", **OPTIONS)
    where: tuple[Any, str] = {
        "gradients": (OutputMetrics, "_compute"),
        "blocks": (Layers, "equalized"),
    }[place]
    called, original = [], getattr(*where)

    def stop(*args: Any) -> Any:
        called.append(args)
        if len(called) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*where, stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "gguf"])
def test_every_format_is_refined(tmp_path: Path, format: str) -> None:
    options: dict[str, Any] = {"format": format, "bits": 4, "group_size": 32, **ENOUGH}
    run(tmp_path / "default", **options)
    run(tmp_path / "high", preset="high", **options)
    assert divergence(tmp_path / "high") < divergence(tmp_path / "default")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn"}, "preset: high refines .* rtn does not"),
        ({"method": "salient"}, "preset: high refines .* salient does not"),
        ({"refine": False}, "preset: high refines"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"calibration": TEXT, "bits": 4, "preset": "high", "progress": False}
    with pytest.raises(ValueError, match=message):
        bitwright.quantize(DEMO, tmp_path / "out", **{**given, **options})
    assert not list(tmp_path.iterdir())


def test_best_begins_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.presets.best.TRAINED_TOKENS", 4_000)
    given: dict[str, Any] = {"bits": 2, "group_size": 32, **ENOUGH}
    run(tmp_path / "best", preset="best", **given)
    options: dict[str, Any] = {"calibration": TEXT, "length": 64, "progress": False}
    options["float_embeddings"] = True
    bitwright.quantize_best(DEMO, tmp_path / "plain", preset="default", **given, **options)
    assert divergence(tmp_path / "best") < 0.97 * divergence(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "plain"]


def test_best_resumes_in_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.presets.best.TRAINED_TOKENS", 500)
    options = {**OPTIONS, "preset": "best"}
    run(tmp_path / "whole", **options)
    for place in ((OutputMetrics, "_compute"), (Layers, "equalized")):

        def stop(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(*place, stop)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "out", **options)
    run(tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_layers_that_gain_nothing_are_told(tmp_path: Path) -> None:
    model = k_model(tmp_path / "model")
    options: dict[str, Any] = {
        **{"format": "gguf", "grid": "iq2_xxs", "preset": "high", "progress": False},
        **{"bits": 2, "overrides": {"*.down_proj": "Q2_K"}},
        "calibration": np.arange(256, dtype=np.int32).reshape(4, 64) % 64,
    }
    with pytest.warns(BitwrightWarning, match="have codes of several weights"):
        bitwright.quantize(model, tmp_path / "q", "gptq", **options)
