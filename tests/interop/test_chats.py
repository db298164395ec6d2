"""What tests/data/chats.json says of transformers is what it does."""

import json
from pathlib import Path

import pytest
from chat_samples import SAMPLES
from clients import run_client

pytestmark = pytest.mark.slow
KNOWN = Path(__file__).resolve().parents[1] / "data" / "chats.json"


def test_chats_in_transformers(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number, _ in enumerate(SAMPLES)]
    for folder, sample in zip(folders, SAMPLES.values(), strict=True):
        folder.mkdir()
        sample.write(folder)
    printed = run_client("gptqmodel", "render_chats.py", *folders).splitlines()
    assert dict(zip(SAMPLES, map(json.loads, printed), strict=True)) == json.loads(
        KNOWN.read_text(encoding="utf-8")
    )
