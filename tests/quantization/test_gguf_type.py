"""Runs by the name of a mixture of types: what each tensor becomes, how files are called and split."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hostile.files import read_gguf
from made_models import k_model
from shared_data import ARCH

import bitwright
from bitwright.checkpoint.gguf_file import TYPE_NAMES
from bitwright.cli.main import cli
from bitwright.errors import UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("always::bitwright.BitwrightWarning")
MIXTRAL = next(each for each in ARCH if each.name == "mixtral")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return k_model(tmp_path_factory.mktemp("models") / "small.one")


def made(
    model: Path, out: Path, kind: str, **options: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Round a model; return what the file says of itself, and the type of each tensor."""
    bitwright.quantize(model, out, "rtn", format="gguf", type=kind, progress=False, **options)
    (file,) = out.glob("*.gguf")
    assert file.name == f"{model.name}-{kind.upper()}.gguf"
    assert file.name in (out / "README.md").read_text()
    metadata, tensors = read_gguf(file.read_bytes())
    return metadata, {name: TYPE_NAMES[each.dtype] for name, each in tensors.items()}


def test_every_tensor_gets_its_type(model: Path, tmp_path: Path) -> None:
    metadata, types = made(model, tmp_path / "out", "Q4_K_M")
    assert metadata["general.file_type"] == 15
    expected = {"attn_v": "Q4_K", "ffn_down": "Q4_K", "attn_norm": "F32", "token_embd": "Q4_K"}
    expected |= {"output.": "Q6_K", "attn_output": "Q4_K"}
    for part, kind in expected.items():
        assert {each for name, each in types.items() if part in name} & {kind}, part
    assert types["blk.1.ffn_down.weight"] == "Q6_K"  # of the last eighth
    found = bitwright.load_model(tmp_path / "out")
    assert np.isfinite(found.logits(np.zeros((1, 4), np.int32))).all()


def test_types_of_single_tensors(model: Path, tmp_path: Path) -> None:
    _, types = made(
        model,
        tmp_path / "out",
        "q2_k",
        pure=True,
        tensor_types={r"blk\.0\.ffn_": "Q5_0"},
        token_embedding_type="F16",
        output_tensor_type="Q8_0",
        overrides={"model.layers.1.self_attn.q_proj": {"bits": 6}},
        exclude=["*.k_proj"],
    )
    assert types["token_embd.weight"] == "BF16"  # float as the model has it
    assert types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == types["blk.0.ffn_down.weight"] == "Q5_0"
    assert types["blk.1.ffn_down.weight"] == types["blk.1.attn_v.weight"] == "Q2_K"
    assert types["blk.1.attn_q.weight"] == "Q6_K"
    assert types["blk.1.attn_k.weight"] == "BF16"


@pytest.mark.parametrize(
    ("name", "number", "others"),
    [
        ("IQ3_M", 27, {"attn_v": "Q4_K", "ffn_up": "IQ3_S"}),
        ("IQ2_XS", 20, {"attn_v": "Q2_K", "ffn_up": "IQ2_XS", "token_embd": "Q2_K"}),
        ("IQ1_M", 31, {"attn_output": "IQ2_XXS", "ffn_up": "IQ1_M", "output.": "Q5_K"}),
    ],
)
def test_mixes_with_codebooks_are_written(
    model: Path, tmp_path: Path, name: str, number: int, others: dict[str, str]
) -> None:
    metadata, types = made(model, tmp_path / "out", name)
    assert metadata["general.file_type"] == number
    for part, kind in others.items():
        assert kind in {each for tensor, each in types.items() if part in tensor}, part
    found = bitwright.load_model(tmp_path / "out")
    assert np.isfinite(found.logits(np.zeros((1, 4), np.int32))).all()


def test_types_that_rows_cannot_take_are_told(tmp_path: Path) -> None:
    demo = shutil.copytree(bitwright.demo_folder(), tmp_path / "demo")
    _, types = made(demo, tmp_path / "out", "Q4_K_M")
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["token_embd.weight"] == "Q8_0"  # which is the head, too
    report = bitwright.quantize(
        demo, tmp_path / "again", "rtn", format="gguf", type="Q4_K_M", progress=False
    )
    said = [each for each in report.warnings if "no whole blocks of Q4_K" in each]
    assert any("rows of 64 weights" in each and "become Q5_0: " in each for each in said)
    assert any("blk.*.attn_q.weight" in each for each in said)


def test_experts_are_typed_as_stacks(tmp_path: Path) -> None:
    source = tmp_path / "mixtral"
    shutil.copytree(MIXTRAL, source)
    demo = bitwright.demo_folder()
    content = json.loads((demo / "tokenizer.json").read_text())
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    vocab = content["model"]["vocab"]
    content["model"] |= {
        "vocab": {key: vocab[key] for key in vocab if vocab[key] < size},
        "merges": [],
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    _, types = made(source, tmp_path / "out", "Q4_K_M")
    stacks = {kind for name, kind in types.items() if "_exps" in name}
    assert stacks == {"Q5_0", "Q4_K", "Q6_K"}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"type": "Q4_K_X"}, "near are .*Q4_K_M"),
        (
            {"type": "TQ1_0"},
            "TQ1_0 has most tensors of the type TQ1_0, which is read but not written",
        ),
        ({"type": "F16"}, "F16 quantizes nothing; bitwright convert --format gguf --dtype float16"),
        ({"type": "Q4_0", "format": "mlx"}, "is a mixture of types of the gguf format"),
        ({"type": "Q4_0", "grid": "affine"}, "grid: the type Q4_0 says that already"),
        ({"type": "Q4_0", "group_size": 32}, "group_size: every type has its own"),
        ({"type": "Q4_0", "embedding_bits": 8}, "embedding_bits: the type Q4_0 says"),
        ({"type": "Q4_0", "tensor_types": {"attn_z": "Q8_0"}}, "'attn_z' is in no tensor's name"),
        ({"type": "Q4_0", "output_tensor_type": "TQ2_0"}, r"output\.weight of the type TQ2_0"),
        ({"pure": True}, "pure: changes a mixture of types; name it"),
        ({"split_max_size": 0}, "split_max_size: must be a number of bytes"),
        ({"split_max_size": 9, "format": "mlx"}, "split_max_size: is for the gguf format"),
        ({"type": "Q4_0", "preset": "best", "calibration": ["a"]}, "preset: best chooses"),
    ],
)
def test_what_contradicts_is_refused(
    options: dict[str, Any], match: str, model: Path, tmp_path: Path
) -> None:
    given = {"method": "rtn", "format": "gguf", "progress": False, **options}
    with pytest.raises((ValueError, UnsupportedModelError), match=match):
        bitwright.quantize(model, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_names_for_bits(model: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        shared = ["quantize", str(model), "--format", "gguf", "--method", "rtn", "--out"]
        found = CliRunner().invoke(cli, [*shared, *arguments])
        return found.exit_code, found.output

    code, said = run(str(tmp_path / "a"), "-b", "q5_k_s", "--tensor-type", "ffn_down=Q8_0")
    assert code == 0, said
    (file,) = (tmp_path / "a").glob("*.gguf")
    assert file.name == "small.one-Q5_K_S.gguf"
    assert TYPE_NAMES[read_gguf(file.read_bytes())[1]["blk.0.ffn_down.weight"].dtype] == "Q8_0"
    for arguments in (("-b", "4", "--type", "Q4_0"), ("-b", "Q4_0", "--type", "Q4_0")):
        code, said = run(str(tmp_path / "b"), *arguments)
        assert code == 2
        assert "--type Q4_0 says the bits of every layer; omit --bits" in said
    assert run(str(tmp_path / "b"), "-b", "q9")[0] == 2
    assert run(str(tmp_path / "b"), "--type", "Q4_0", "--split-max-size", "2x")[0] == 2
    assert run(str(tmp_path / "b"), "--type", "Q4_0", "--tensor-type", "ffn")[0] == 2


def test_files_are_split(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "gguf", "progress": False}
    for name, kind in (("model", {"bits": 6}), ("small.one-Q6_K", {"type": "Q6_K", "pure": True})):
        whole, split = tmp_path / f"{name}-whole", tmp_path / f"{name}-split"
        bitwright.quantize(model, whole, "rtn", **kind, **options)
        bitwright.quantize(model, split, "rtn", **kind, **options, split_max_size=400_000)
        files = sorted(split.glob("*.gguf"))
        count = len(files)
        assert count > 2
        assert [each.name for each in files] == [
            f"{name}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)
        ]
        assert not (split / "model.safetensors.index.json").exists()
        read = [read_gguf(each.read_bytes()) for each in files]
        tensors = [name for _, each in read for name in each]
        (file,) = whole.glob("*.gguf")
        metadata, expected = read_gguf(file.read_bytes())
        assert sorted(tensors) == sorted(expected)
        first = read[0][0]
        said = {key for key in first if not key.startswith("split.")}
        assert said == metadata.keys() - {"general.size_label"}  # known when the last is written
        assert first["general.file_type"] == metadata["general.file_type"] == 18
        for number, (part, _) in enumerate(read):
            assert part["split.no"] == number
            assert part["split.count"] == count
            assert part["split.tensors.count"] == len(expected)
            assert "tokenizer.ggml.tokens" not in part or number == 0
        tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
        assert (
            bitwright.evaluate(split, tokens).perplexity
            == bitwright.evaluate(whole, tokens).perplexity
        )
        card = (split / "README.md").read_text()
        assert re.search(rf"llama-cli -m .*{re.escape(name)}-00001-of-\*\.gguf", card)
