"""Commands that write several files: what is done before an interruption is not done again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitwright
from bitwright.checkpoint.work_folder import WorkFolder, kept_until_written
from bitwright.loading.model import Model
from bitwright.presets import dynamic
from bitwright.tools import collect_activations as activations

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
FEW: dict[str, Any] = {"samples": 2, "length": 32}


class Killed(KeyboardInterrupt):
    """Stands for an end at a chosen moment."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an activation file that was gathered without a stop."""
    path = tmp_path_factory.mktemp("known") / "a.npz"
    bitwright.collect_activations(DEMO, path, TEXT, **FEW)
    return path.read_bytes()


def stop_at_block(monkeypatch: pytest.MonkeyPatch, last: int | None) -> list[int]:
    """Have gathering end when a block is due, and return which blocks were."""
    block, seen = Model.block, list[int]()

    def stopping(model: Model, index: int) -> Any:
        if index == last:
            raise Killed
        seen.append(index)
        return block(model, index)

    monkeypatch.setattr(Model, "block", stopping)
    return seen


@pytest.mark.parametrize("stops", [[1], [2], [1, 2], [0, 1, 1, 2]])
def test_gathering_goes_on_at_the_block_that_is_due(
    tmp_path: Path, known: bytes, stops: list[int]
) -> None:
    out = tmp_path / "a.npz"
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_at_block(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                bitwright.collect_activations(DEMO, out, TEXT, **FEW)
        assert names(tmp_path) == ([".a.npz.work"] if stop else [])
    with pytest.MonkeyPatch.context() as patch:
        seen = stop_at_block(patch, None)
        assert bitwright.collect_activations(DEMO, out, TEXT, **FEW) == 12
    assert seen == list(range(stops[-1], 3))
    assert out.read_bytes() == known
    assert names(tmp_path) == ["a.npz"]


def test_a_file_in_its_place_is_known_until_something_changes(tmp_path: Path, known: bytes) -> None:
    out = tmp_path / "a.npz"

    def gather(**changed: Any) -> list[int]:
        with pytest.MonkeyPatch.context() as patch:
            seen = stop_at_block(patch, None)
            with kept_until_written(WorkFolder(out)) as work:
                bitwright.collect_activations(DEMO, work, TEXT, **{**FEW, **changed})
                raise Killed
        return seen

    with pytest.raises(Killed):
        gather()
    assert names(tmp_path) == [".a.npz.work", "a.npz"]
    with pytest.MonkeyPatch.context() as patch:
        seen = stop_at_block(patch, None)
        with kept_until_written(WorkFolder(out)) as work:
            assert bitwright.collect_activations(DEMO, work, TEXT, **FEW) == 12
            work.keep = True
            assert seen == []
            with pytest.raises(bitwright.ResumeError, match="calibration"):
                bitwright.collect_activations(DEMO, work, TEXT, **{**FEW, "seed": 1})
    assert names(tmp_path) == ["a.npz"]
    assert out.read_bytes() == known
    # Without the work folder it is anybody's.
    with pytest.raises(bitwright.OutputExistsError, match="--overwrite"):
        bitwright.collect_activations(DEMO, out, TEXT, **FEW)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_changed_work_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: float
) -> None:
    out = tmp_path / "a.npz"
    with monkeypatch.context() as patch:
        stop_at_block(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            bitwright.collect_activations(DEMO, out, TEXT, **FEW)
    partial = tmp_path / ".a.npz.work" / activations.WHOLE
    content = bytearray(partial.read_bytes())
    content[int(place * 0.95 * len(content))] ^= 1
    partial.write_bytes(content)
    with pytest.raises(bitwright.ResumeError, match="was changed since it was written"):
        bitwright.collect_activations(DEMO, out, TEXT, **FEW)
    assert bitwright.collect_activations(DEMO, out, TEXT, **FEW, resume=False) == 12


def dynamic_call(folder: Path, **more: Any) -> bitwright.DynamicReport:
    return bitwright.dynamic_quantize(
        *(DEMO, folder / "q", 4.5, [(3, 64), (5, 64)], "rtn"),
        **{"calibration": TEXT, "sensitivities": folder / "s.json", "recipe": folder / "r.json", **more},
        **FEW,
        sensitivity_samples=2,
        progress=False,
    )  # fmt: skip


def test_evaluations_and_recipes_come_before_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(64).reshape(2, 32))
    steps, evaluate = list[list[str]](), dynamic.evaluate

    def watched(*arguments: Any, **options: Any) -> Any:
        steps.append(names(tmp_path))
        if len(steps) == 2:
            raise Killed
        return evaluate(*arguments, **options)

    monkeypatch.setattr(dynamic, "evaluate", watched)
    with pytest.raises(KeyboardInterrupt, match="resumes from what is done"):
        dynamic_call(tmp_path, evaluation=ids)
    report = dynamic_call(tmp_path, evaluation=ids)
    assert all("q" not in seen and "r.json" not in seen for seen in steps)
    assert report.after is not None
    assert f"{report.after.perplexity:.4f}" in (tmp_path / "q" / "README.md").read_text()
    assert bitwright.Recipe.load(tmp_path / "r.json") == report.recipe
    assert names(tmp_path) == ["ids.npy", "q", "r.json", "s.json"]
    with pytest.raises(bitwright.OutputExistsError, match="--overwrite"):
        dynamic_call(tmp_path, evaluation=ids)


def test_an_evaluation_that_fails_takes_nothing_else_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(64).reshape(2, 32))

    def failing(*arguments: Any, **options: Any) -> Any:
        raise bitwright.NonFiniteError("logits: are not finite")

    monkeypatch.setattr(dynamic, "evaluate", failing)
    with pytest.raises(bitwright.NonFiniteError, match="logits"):
        dynamic_call(tmp_path, evaluation=ids)
    assert names(tmp_path) == ["ids.npy", "q", "r.json", "s.json"]
    bitwright.load_model(tmp_path / "q")


@pytest.mark.parametrize("ending", ["svg", "png", "jpg"])
def test_plots_of_interrupted_runs_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Also those that have no place for a mark."""
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "s.json", tmp_path / f"s.{ending}"

    def estimate(seed: int = 0) -> bitwright.Sensitivities:
        return bitwright.estimate_sensitivities(
            DEMO, TEXT, **FEW, seed=seed, out=out, plot=plot, progress=False
        )

    def killed(work: WorkFolder, name: str) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "put_file_into_place", killed)
        with pytest.raises(KeyboardInterrupt):
            estimate()
    assert plot.exists()
    assert not out.exists()
    found = estimate()
    assert bitwright.Sensitivities.load(out) == found
    assert names(tmp_path) == sorted(["s.json", plot.name])
    plot.write_bytes(b"a stranger's")
    with pytest.raises(bitwright.OutputExistsError, match="--overwrite"):
        estimate()
