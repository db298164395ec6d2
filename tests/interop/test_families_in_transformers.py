"""transformers computes from the files of the families with parts of their own what bitwright does."""

from pathlib import Path

import numpy as np
import pytest
from clients import run_client

import bitwright

pytestmark = pytest.mark.slow
TINY = Path(__file__).parents[1] / "data" / "tiny"
FAMILIES = (
    "granitemoehybrid",
    "bamba",
    "lfm2",
    "cohere2",
    "arcee",
    "glm",
    "stablelm",
    "ministral",
    "phi",
    "gpt_neox",
    "falcon_h1",
    "falcon_h1-gated",
)


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    for name in FAMILIES:
        shapes = bitwright.load_model(TINY / name).linear_shapes()
        odd = [layer for layer, shape in shapes.items() if shape[1] % 32]
        bitwright.quantize(
            TINY / name,
            tmp_path / name,
            "rtn",
            group_size=32,
            format="compressed-tensors",
            exclude=odd,
            allow_unfused=True,
            progress=False,
        )
    ids = np.random.default_rng(0).integers(3, 58, (2, 30))
    np.save(tmp_path / "ids.npy", ids)
    folders = [tmp_path / name for name in FAMILIES]
    out = tmp_path / "logits.npz"
    run_client("gptqmodel", "transformers_logits.py", tmp_path / "ids.npy", out, *folders)
    for number, folder in enumerate(folders):
        found = np.load(out)[str(number)]
        assert np.abs(found - bitwright.load_model(folder).logits(ids)).max() < 1e-4, folder.name
