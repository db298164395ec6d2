"""Importance matrices: exported from statistics, read from llama.cpp's files, and rounded by."""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hostile.files import read_gguf
from made_models import k_model, write_gguf
from shared_data import ARCH

import bitwright
from bitwright.checkpoint.gguf_file import TYPE_NAMES
from bitwright.cli.main import cli
from bitwright.errors import StatisticsError
from bitwright.statistics.imatrix import Importance, ImportanceMatrix

pytestmark = pytest.mark.filterwarnings("always::bitwright.BitwrightWarning")
DEMO = bitwright.demo_folder()
MIXTRAL = next(each for each in ARCH if each.name == "mixtral")
IDS = np.arange(96, dtype=np.int32).reshape(4, 24) % 90


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return k_model(tmp_path_factory.mktemp("models") / "k")


@pytest.fixture(scope="module")
def known(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bitwright.Statistics:
    out = tmp_path_factory.mktemp("statistics") / "s"
    return bitwright.collect_statistics(model, out, IDS, progress=False)


@pytest.mark.parametrize("name", ["a.gguf", "a.dat"])
def test_statistics_are_exported(name: str, known: bitwright.Statistics, tmp_path: Path) -> None:
    bitwright.export_imatrix(known.folder, tmp_path / name)
    found = ImportanceMatrix.load(tmp_path / name)
    assert found.chunks == 1
    assert found.datasets == ("s",)
    stages = {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.q_proj",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.gate_proj",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj",
        "output.weight": "lm_head",
    }
    assert len(found.entries) == 2 * 7 + 1
    for tensor, stage in stages.items():
        moments = known.read(stage)
        assert moments is not None
        expected = moments.gram.diagonal()
        np.testing.assert_allclose(found.entries[tensor].means(0), expected, 1e-6)


def test_experts_are_one_tensor(tmp_path: Path) -> None:
    known = bitwright.collect_statistics(MIXTRAL, tmp_path / "s", IDS % 64, progress=False)
    found = bitwright.export_imatrix(known.folder, tmp_path / "a.gguf")
    read = ImportanceMatrix.load(tmp_path / "a.gguf")
    entry = read.entries["blk.1.ffn_up_exps.weight"]
    count = bitwright.load_model(MIXTRAL).config.experts.count  # type: ignore[union-attr]
    assert entry.sums.shape[0] == len(entry.counts) == count
    assert entry.counts.sum() == 2 * IDS.size  # two experts for each token
    np.testing.assert_array_equal(entry.sums, found.entries["blk.1.ffn_up_exps.weight"].sums)
    assert (
        Importance(np.zeros((1, 3), np.float32), np.zeros(1, np.float32)).means(0).tolist()
        == [1] * 3
    )


def test_statistics_of_older_versions_need_the_model(
    model: Path, known: bitwright.Statistics, tmp_path: Path
) -> None:
    folder = shutil.copytree(known.folder, tmp_path / "s")
    text = (folder / "statistics.json").read_text()
    (folder / "statistics.json").write_text(text[: text.index(',\n  "tensors"')] + "\n}\n")
    with pytest.raises(StatisticsError, match="name the model"):
        bitwright.export_imatrix(folder, tmp_path / "a.gguf")
    bitwright.export_imatrix(folder, tmp_path / "a.gguf", model=model)
    bitwright.export_imatrix(known.folder, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(StatisticsError, match="another model"):
        bitwright.export_imatrix(folder, tmp_path / "c.gguf", model=DEMO)


def weighted_error(folder: Path, model: Path, matrix: ImportanceMatrix) -> float:
    """What a model of the mixture has lost of one layer's outputs, by the mean squares of its inputs."""
    name, shape = "model.layers.0.mlp.down_proj", (256, 512)
    change = bitwright.load_model(folder).weight(name, shape)
    change = change - bitwright.load_model(model).weight(name, shape)
    return float((change**2 * matrix.entries["blk.0.ffn_down.weight"].means(0)).sum())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_S", "Q4_0"])
def test_rounding_is_weighted(
    kind: str, model: Path, known: bitwright.Statistics, tmp_path: Path
) -> None:
    matrix = bitwright.export_imatrix(known.folder, tmp_path / "a.gguf")
    options: dict[str, Any] = {"format": "gguf", "type": kind, "pure": True, "progress": False}
    # Any method: of a diagonal alone none knows more than rounding does.
    bitwright.quantize(model, tmp_path / "by", "gptq", imatrix=tmp_path / "a.gguf", **options)
    bitwright.quantize(model, tmp_path / "plain", "rtn", grid_search=True, **options)
    by, plain = (weighted_error(tmp_path / each, model, matrix) for each in ("by", "plain"))
    assert by < plain
    metadata, _ = read_gguf(next((tmp_path / "by").glob("*.gguf")).read_bytes())
    said = {key: value for key, value in metadata.items() if key.startswith("quantize.imatrix.")}
    assert said == {
        "quantize.imatrix.file": "a.gguf",
        "quantize.imatrix.dataset": "s",
        "quantize.imatrix.entries_count": 15,
        "quantize.imatrix.chunks_count": 1,
    }


def test_the_older_format_rounds_alike(
    model: Path, known: bitwright.Statistics, tmp_path: Path
) -> None:
    files = []
    for name in ("a.gguf", "a.dat"):
        made = bitwright.export_imatrix(known.folder, tmp_path / name)
        del made.entries["blk.0.attn_output.weight"]
        made.save(tmp_path / name)
        out = tmp_path / name[2:]
        report = bitwright.quantize(
            model, out, "rtn", format="gguf", type="Q4_K_S", imatrix=tmp_path / name, progress=False
        )
        assert any(
            "has nothing of 1 tensors of the model, such as blk.0.attn_output" in each
            for each in report.warnings
        )
        files.append(read_gguf((out / "k-Q4_K_S.gguf").read_bytes())[1])
    for name, tensor in files[0].items():
        assert tensor.tobytes() == files[1][name].tobytes(), name


def test_an_imatrix_chooses_types_and_weighs_the_embedding(
    model: Path, known: bitwright.Statistics, tmp_path: Path
) -> None:
    """As llama-quantize has it: Q4_0 becomes Q4_1 in the first eighth, which two blocks do not have."""
    made = bitwright.export_imatrix(known.folder, tmp_path / "a.gguf")
    made.entries["token_embd.weight"] = made.entries["output.weight"]
    made.save(tmp_path / "b.gguf")
    files = []
    for options in ({}, {"imatrix": tmp_path / "b.gguf"}):
        out = tmp_path / f"out{len(files)}"
        bitwright.quantize(
            model,
            out,
            "gptq",
            4,
            format="gguf",
            calibration=IDS,
            type="Q4_K_M",
            progress=False,
            **options,
        )
        files.append(read_gguf((out / "k-Q4_K_M.gguf").read_bytes())[1])
    changed = {name for name in files[0] if files[0][name].tobytes() != files[1][name].tobytes()}
    assert "token_embd.weight" in changed
    assert TYPE_NAMES[files[1]["blk.0.ffn_up.weight"].dtype] == "Q4_K"


def test_what_is_wrong_is_told(model: Path, known: bitwright.Statistics, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    made = bitwright.export_imatrix(known.folder, path)
    options: dict[str, Any] = {"format": "gguf", "type": "Q4_0", "progress": False}
    with pytest.raises(ValueError, match="imatrix: awq asks for more than the mean squares"):
        bitwright.quantize(model, tmp_path / "out", "awq", imatrix=path, **options)
    with pytest.raises(StatisticsError, match=r"none\.gguf: there is no such file"):
        bitwright.quantize(model, tmp_path / "out", imatrix=tmp_path / "none.gguf", **options)
    content = path.read_bytes()
    short = struct.pack("<i", 1) + struct.pack("<i", 3) + b"abc" + struct.pack("<ii", 1, 9)
    for wrong in (b"", b"GGUF", content[:200], content[:-900], short, b"\xff" * 64):
        path.write_bytes(wrong)
        with pytest.raises(StatisticsError, match=r"a\.gguf"):
            ImportanceMatrix.load(path)
    first, *_ = made.entries
    for change in (np.nan, -1.0, np.inf):
        entries = dict(made.entries)
        sums = entries[first].sums.copy()
        sums[0, 3] = change
        ImportanceMatrix({**entries, first: Importance(sums, entries[first].counts)}).save(path)
        with pytest.raises(StatisticsError, match="negative, NaN or infinite"):
            ImportanceMatrix.load(path)
    wide = Importance(np.ones((1, 7), np.float32), np.ones(1, np.float32))
    ImportanceMatrix({**made.entries, "blk.0.attn_q.weight": wide}).save(path)
    with pytest.raises(StatisticsError, match=r"has 7 values for blk\.0\.attn_q\.weight"):
        bitwright.quantize(model, tmp_path / "out", imatrix=path, **options)
    cut = Importance(np.ones((2, 128), np.float32), np.ones(2, np.float32))  # as of two experts
    ImportanceMatrix({**made.entries, "blk.0.attn_q.weight": cut}).save(path)
    with pytest.raises(StatisticsError, match=r"has 256 values for .*, but 1 x 256 are read there"):
        bitwright.quantize(model, tmp_path / "out", imatrix=path, **options)
    ImportanceMatrix({"blk.77.attn_q.weight": wide}).save(path)
    with pytest.raises(StatisticsError, match="knows none of the tensors"):
        bitwright.quantize(model, tmp_path / "out", imatrix=path, **options)
    write_gguf(path, {}, {"a.in_sum2": np.ones((1, 3), np.float32)})
    with pytest.raises(StatisticsError, match="is not an importance matrix"):
        ImportanceMatrix.load(path)


def test_the_command_exports(known: bitwright.Statistics, tmp_path: Path) -> None:
    arguments = ["statistics", "export", str(known.folder), "--imatrix", str(tmp_path / "a.gguf")]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 0, found.output
    assert "the importance matrix of 15 tensors is" in found.output
    assert len(ImportanceMatrix.load(tmp_path / "a.gguf").entries) == 15
