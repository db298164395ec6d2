"""What GGUF files say in general is what llama.cpp's converter would make of the same folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile.files import read_gguf

import bitwright
from bitwright.checkpoint.gguf_file import BLOCKS, TensorInfo
from bitwright.checkpoint.gguf_general import general_metadata, size_label

DEMO = bitwright.demo_folder()
CARD = """---
license: {license}
license_name: some name
license_link: LICENSE
language:
- en
- de
tags: [one, two]
pipeline_tag: text-generation
base_model: {base}
datasets:
- some-org/a-data-set-v2
---
# Title
"""
GENERATION = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0,
    "repetition_penalty": 1.05,
    "do_sample": True,
    "eos_token_id": 0,
}


def of_converter(folder: Path, total: int) -> dict[str, Any]:
    """The values that the gguf package collects for a converter."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(None, "llama")
    gguf.Metadata.load(None, folder, None, total).set_gguf_meta_model(writer)
    return {key: value.value for shard in writer.kv_data for key, value in shard.items()}


@pytest.mark.parametrize(
    ("name", "license", "base"),
    [
        ("small-model", "apache-2.0", "Some-org/Base-model-v1.5"),
        ("Other", "[mit, other]", "[a/b, https://huggingface.co/c-d/e, https://example.org/x]"),
        ("model2", "mit", "only-a-name"),
    ],
)
def test_cards_and_defaults_are_those_of_the_converter(
    name: str, license: str, base: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "README.md").write_text(CARD.format(license=license, base=base))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    found = general_metadata(folder)
    expected = of_converter(folder, 10**6)
    # What the converter guesses from the parts of names is left out.
    guessed = ("basename", "finetune", "version", "size_label", "organization", "architecture")
    own = {f"general.{key}" for key in guessed}
    expected = {
        key: value
        for key, value in expected.items()
        if key not in own and not key.endswith(".version")
    }
    penalty = found.pop("general.sampling.penalty_repeat")  # which gguf 0.19 does not know of
    assert expected.pop("general.sampling.penalty_repeat", penalty) == penalty == 1.05
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (
            found[key] == pytest.approx(value) if isinstance(value, float) else found[key] == value
        )
    assert found["general.sampling.top_k"].dtype == np.int32


@pytest.mark.parametrize(
    ("shapes", "label"),
    [
        ({"a": (100, 10)}, "1.0K"),
        ({"a": (1 << 10, 1 << 10), "b": (1 << 20,)}, "2.1M"),
        ({"a": (1 << 15, 1 << 15), "b": (1 << 15, 6 << 15)}, "7.5B"),
        ({"a": (1000, 1000), "blk.0.ffn_up_exps.weight": (8, 1000, 1000)}, "8x2.0M"),
    ],
)
def test_sizes_are_told(shapes: dict[str, tuple[int, ...]], label: str) -> None:
    infos = [TensorInfo(name, np.dtype("<f4"), shape) for name, shape in shapes.items()]
    assert size_label(infos) == label
    utility = pytest.importorskip("gguf.utility")
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    experts = shapes.get("blk.0.ffn_up_exps.weight", (0, 0, 0))
    one = experts[1] * experts[2]
    assert label == utility.size_label(total, total - one * experts[0], one, experts[0])


def test_quantized_weights_are_counted() -> None:
    assert size_label([TensorInfo("a", BLOCKS["Q4_K"], (1000, 4))]) == "1.0M"


def test_files_say_it(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "tiny-stories")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "README.md").write_text(CARD.format(license="mit", base="a/b"))
    bitwright.quantize(folder, tmp_path / "out", "rtn", 8, format="gguf", progress=False)
    said, _ = read_gguf((tmp_path / "out" / "model.gguf").read_bytes())
    assert said["general.name"] == "Tiny Stories"
    assert said["general.size_label"].endswith("K")
    assert said["general.quantized_by"].startswith("bitwright ")
    assert said["general.license"] == "mit"
    assert said["general.base_model.0.repo_url"] == "https://huggingface.co/a/b"
    assert said["general.sampling.temp"] == 0.6
    bitwright.convert(folder, tmp_path / "float", "gguf", progress=False)
    said, _ = read_gguf((tmp_path / "float" / "model.gguf").read_bytes())
    assert "general.quantized_by" not in said
    bitwright.convert(tmp_path / "out", tmp_path / "again", "gguf", progress=False)  # is kept
    again, _ = read_gguf((tmp_path / "again" / "model.gguf").read_bytes())
    assert again["general.name"] == "Tiny Stories"
