"""Several settings of one model side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bitwright
from bitwright.tools import compare as module

DEMO = bitwright.demo_folder()
TEXT = DEMO / "evaluation.txt"
SETTINGS = [{"method": "rtn", "bits": 8}, {"method": "rtn", "bits": 3}]


def test_figures_are_those_of_evaluate(tmp_path: Path) -> None:
    found = bitwright.compare(
        DEMO, SETTINGS, tmp_path / "out", TEXT, samples=4, plot=tmp_path / "p.svg", progress=False
    )
    for row in found.rows:
        alone = bitwright.evaluate(row.folder, TEXT, reference=DEMO, samples=4)
        assert row.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
        assert row.kl_divergence == pytest.approx(alone.kl_divergence, rel=1e-4, abs=1e-7)
        assert row.top1_agreement == alone.top1_agreement
        assert found.reference_perplexity == pytest.approx(alone.reference_perplexity, rel=1e-6)
    assert [row.name for row in found.best()] == ["rtn-3", "rtn-8"]
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_what_is_there_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, runs = tmp_path / "out", list[str]()
    plain = module.quantize

    def counted(model: Path, folder: Path, **given: object) -> object:
        runs.append(folder.name)
        if folder.name == "rtn-3" and runs.count("rtn-3") == 1:
            raise KeyboardInterrupt
        return plain(model, folder, **given)

    monkeypatch.setattr(module, "quantize", counted)
    with pytest.raises(KeyboardInterrupt):
        bitwright.compare(DEMO, SETTINGS, out, TEXT, samples=2, progress=False)
    found = bitwright.compare(DEMO, SETTINGS, out, TEXT, samples=2, progress=False)
    assert runs == ["rtn-8", "rtn-3", "rtn-3"]
    assert bitwright.compare(DEMO, SETTINGS, out, TEXT, samples=2, progress=False) == found
    with pytest.raises(bitwright.OutputError, match="of another model or on another text"):
        bitwright.compare(DEMO, SETTINGS, out, TEXT, samples=3, progress=False)
    other = [{"name": "rtn-8", "method": "rtn", "bits": 4}]
    with pytest.raises(bitwright.OutputError, match="rtn-8 was another setting"):
        bitwright.compare(DEMO, other, out, TEXT, samples=2, progress=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "there are none"),
        ([{"bit": 3}], "'bit' is no argument"),
        ([{"out": "x"}], "the same for all"),
        ([{"bits": 3}, {"name": "3", "bits": 4}], "two are called 3"),
        ([{"name": "../x", "bits": 4}], "must be that of a folder"),
        ([{"folder": "x", "bits": 4}], "compared as it is"),
    ],
)
def test_settings_that_are_none(
    settings: list[dict[str, object]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        bitwright.compare(DEMO, settings, tmp_path / "out", TEXT, samples=2, progress=False)
    assert not list(tmp_path.iterdir())


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitwright", "compare", str(DEMO), "--evaluation", str(TEXT)]
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False)


def test_compare_as_a_command(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("small:\n  method: rtn\n  bits: 3:32\n")
    words = ("--out", str(tmp_path / "out"), "--samples", "2", "--json")
    listed = ("--bits", "4", "--method", "rtn", "--format", "mlx,gguf")
    done = run("--settings", str(settings), *listed, *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in rows] == ["small", "rtn-4-mlx", "rtn-4-gguf"]
    assert rows[0]["bits_per_weight"] < rows[1]["bits_per_weight"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- bits: 3\n  methud: rtn\n", "line 2: there is no setting 'methud'; is method meant?"),
        ("- 3\n", "line 1: a setting must be an object"),
        ("word\n", "line 1: must be a list of settings"),
    ],
)
def test_mistakes_in_the_file_are_told_with_their_line(
    text: str, said: str, tmp_path: Path
) -> None:
    from bitwright.cli.settings_file import read_settings_list

    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(bitwright.ConfigError, match=f"settings.yaml, {said}".replace("?", r"\?")):
        read_settings_list(path, ("name", "folder", *module.SETTINGS))
