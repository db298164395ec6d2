"""Adapters are merged as PEFT merges them."""

from pathlib import Path

import numpy as np
import pytest
from clients import run_client

import bitwright
from bitwright.checkpoint import open_checkpoint
from bitwright.errors import UnsupportedModelError

pytestmark = pytest.mark.slow

DEMO = bitwright.demo_folder()
REFUSED = {"dora": "use_dora", "biased": "lora_bias", "pissa": "init_lora_weights 'pissa'"}
ULP = 2**-7  # of bfloat16: PEFT rounds the product, and then the sum


def test_as_peft_merges(tmp_path: Path) -> None:
    run_client("peft", "merge_with_peft.py", DEMO, tmp_path, "bfloat16")
    adapters = [path for path in sorted(tmp_path.iterdir()) if not path.name.endswith("merged")]
    assert len(adapters) == 10
    original = open_checkpoint(DEMO)
    for path in adapters:
        if path.name in REFUSED:
            with pytest.raises(UnsupportedModelError, match=REFUSED[path.name]):
                open_checkpoint(path)
            continue
        found, expected = open_checkpoint(path), open_checkpoint(Path(f"{path} merged"))
        assert found.names() == expected.names()
        changed = 0
        for name in found.names():
            ours, theirs = (each.read(name).astype(np.float32) for each in (found, expected))
            before = original.read(name).astype(np.float32)
            changed += not np.array_equal(theirs, before)
            allowed = ULP * (np.abs(theirs) + np.abs(before))
            assert (np.abs(ours - theirs) <= allowed).all(), (path.name, name)
        assert changed
