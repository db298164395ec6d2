"""A teacher's targets on disk: what they hold, and what damaged or foreign ones lead to."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import bitwright
from bitwright.checkpoint.work_folder import work_path
from bitwright.distill import targets as targets_module
from bitwright.text.samples import load_tokens

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
VOCABULARY = 512
SAMPLES, LENGTH, K = 6, 16, 32
IDS = load_tokens(TEXT, tokenizer=DEMO, length=LENGTH, samples=SAMPLES)
Wrong = (bitwright.TargetsError, bitwright.CheckpointError)


def make(folder: Path, ids: Any = IDS, model: Any = DEMO, **options: Any) -> bitwright.DwqTargets:
    return bitwright.compute_dwq_targets(model, ids, folder, **{"k": K, **options})


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples per file."""
    monkeypatch.setattr(targets_module, "SHARD_BYTES", 2 * LENGTH * 4 * 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets_module, "SHARD_BYTES", 2 * LENGTH * 4 * 64)
        assert make(folder).shard_count == 3
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "rtn"
    bitwright.quantize(DEMO, folder, "rtn", progress=False)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "targets"))


def all_log_probabilities(temperature: float = 1.0) -> np.ndarray[Any, Any]:
    model = bitwright.load_model(DEMO)
    logits = np.concatenate([model.logits(row[None]).reshape(LENGTH, -1) for row in IDS])
    logits = logits.astype(np.float64) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (32, 1.0), (32, 2.5), (512, 1.0)])
def test_targets_are_what_the_model_says(
    tmp_path: Path, sharded: None, k: int, temperature: float
) -> None:
    targets = make(tmp_path / "out", k=k, temperature=temperature)
    order = np.array([5, 0, 3, 3])
    found = targets.read(order)
    expected = all_log_probabilities(temperature).reshape(SAMPLES, LENGTH, -1)[order]
    expected = expected.reshape(-1, VOCABULARY)
    assert found.ids.shape == found.log_probabilities.shape == (4 * LENGTH, k)
    assert (np.diff(found.ids, axis=1) > 0).all()
    at_them = np.take_along_axis(expected, found.ids, axis=1)
    np.testing.assert_allclose(found.log_probabilities, at_them, rtol=1e-3, atol=1e-4)
    least = np.sort(expected, axis=1)[:, -k]
    assert (at_them.min(axis=1) > least - 1e-5).all()
    rest = 1 - np.exp(at_them).sum(axis=1)
    np.testing.assert_allclose(found.rest, rest, atol=1e-5)
    assert (targets.tokens() == IDS).all()
    assert (targets.samples, targets.length, targets.k) == (SAMPLES, LENGTH, k)


def test_default_k_is_the_vocabulary_of_a_small_model(tmp_path: Path) -> None:
    assert make(tmp_path / "out", k=None).k == VOCABULARY


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": VOCABULARY + 1}, "k: expected 1 to 512"),
        ({"k": 0}, "k: expected 1 to 512"),
        ({"k": -1}, "k: expected"),
        ({"k": 3.5}, "k: expected"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"samples": SAMPLES + 1}, "samples"),
        ({"length": LENGTH + 1}, "length"),
    ],
)
def test_wrong_options_write_nothing(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_lost_files_are_made_again_and_no_others(
    copied: Path, sharded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(copied)
    kept = copied / "targets-00001.safetensors"
    stamp = kept.stat()
    (copied / "targets-00002.safetensors").unlink()
    (copied / "targets-00003.safetensors").write_bytes(b"")
    passes: list[int] = []
    states = targets_module.Network.final_states

    def counted(network: Any, ids: Any) -> Any:
        passes.append(len(ids))
        return states(network, ids)

    monkeypatch.setattr(targets_module.Network, "final_states", counted)
    shares: list[float] = []
    make(copied, on_progress=shares.append)
    assert passes == [2, 2]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    assert digests(copied) == before
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    make(copied)
    assert passes == [2, 2]


def test_interrupted_computation_goes_on(
    tmp_path: Path, made: Path, sharded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        teach, calls = targets_module._teach, []

        def interrupted(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return teach(*arguments)

        patch.setattr(targets_module, "_teach", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "targets.json",
        "targets-00001.safetensors",
    }
    with pytest.raises(bitwright.TargetsError, match="00002.safetensors: is missing"):
        bitwright.DwqTargets(tmp_path / "out")
    make(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(made)


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path, made: Path) -> None:
    """Killed while it wrote the manifest, or a file under a process id that comes again."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".targets.json.partial-12345").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitwright.files.replacing.os.getpid", lambda: 4)
        make(folder)
        file = folder / "targets-00001.safetensors"
        before = file.read_bytes()
        file.rename(folder / f".{file.name}.partial-4")
        make(folder)
    assert file.read_bytes() == before


def other_tokenizer(folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def other_weights(folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("content", [[], ["lock"], ["lock", "last"], ["lock", "data.0"]], ids=str)
def test_the_work_folder_of_one_killed_at_its_end_is_removed(
    copied: Path, sharded: None, content: list[str]
) -> None:
    work, before = work_path(copied), digests(copied)
    work.mkdir()
    for name in content:
        last = f"checkpoint\0{zlib.crc32(b'checkpoint')}"
        (work / name).write_text(last if name == "last" else "")
    make(copied)
    assert not work.exists()
    assert digests(copied) == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda folder: {"model": other_weights(folder / "m")}, "another model"),
        (lambda folder: {"model": other_tokenizer(folder / "m")}, "another tokenizer"),
        (lambda folder: {"ids": IDS[::-1].copy()}, "other tokens"),
        (lambda folder: {"ids": IDS[:4]}, "other tokens"),
        (lambda folder: {"length": 8}, "other tokens"),
        (lambda folder: {"k": 16}, r"another k \(32, not 16\)"),
        (lambda folder: {"temperature": 2.0}, "another temperature"),
    ],
)
def test_other_targets_are_not_replaced(
    tmp_path: Path, made: Path, sharded: None, change: Callable[[Path], Any], word: str
) -> None:
    before = digests(made)
    options = change(tmp_path)
    with pytest.raises(bitwright.TargetsError, match=word) as raised:
        make(made, **options)
    assert str(made) in str(raised.value)
    assert "remove the folder or choose another" in str(raised.value)
    assert digests(made) == before


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(bitwright.OutputError, match="holds no targets"):
        make(folder)
    with pytest.raises(bitwright.OutputError, match="holds no targets"):
        make(folder / "thesis.txt")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert (folder / "thesis.txt").read_text() == "years of work"
    with pytest.raises(bitwright.OutputError, match="cannot be written"):
        make(Path("/proc/targets"))


def shard(folder: Path) -> Path:
    return folder / "targets-00002.safetensors"


@pytest.mark.parametrize(
    "share", [None, 0, 4, 8, "half header", "header", "half data", "all but 1"]
)
def test_missing_or_truncated_file(copied: Path, sharded: None, share: Any) -> None:
    before = digests(copied)
    content = shard(copied).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    lengths = {
        "half header": header // 2,
        "header": header,
        "half data": (header + len(content)) // 2,
        "all but 1": len(content) - 1,
    }
    if share is None:
        shard(copied).unlink()
    else:
        shard(copied).write_bytes(content[: lengths.get(share, share)])
    with pytest.raises(bitwright.TargetsError, match="00002.safetensors: .*compute the targets"):
        bitwright.DwqTargets(copied)
    make(copied)
    assert digests(copied) == before


def test_files_that_change_after_opening(copied: Path, sharded: None) -> None:
    targets = bitwright.DwqTargets(copied)
    shard(copied).write_bytes(shard(copied).read_bytes()[:50])
    targets.read(np.array([0, 1, 4]))
    for call in (lambda: targets.read(np.array([2])), targets.tokens):
        with pytest.raises(bitwright.TargetsError, match="00002.safetensors"):
            call()
    shard(copied).unlink()
    with pytest.raises(bitwright.TargetsError, match="00002.safetensors"):
        targets.read(np.array([3]))


@pytest.mark.parametrize("sample", [SAMPLES, SAMPLES + 100, -1])
def test_samples_that_there_are_not(made: Path, sample: int) -> None:
    with pytest.raises(IndexError, match=f"sample {sample}.* 0 to {SAMPLES - 1}"):
        bitwright.DwqTargets(made).read(np.array([0, sample]))


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {**arrays, "ids": arrays["ids"][:, :, :-1].copy()},
        lambda arrays: {**arrays, "ids": arrays["ids"][:1].copy()},
        lambda arrays: {**arrays, "rest": arrays["rest"].astype(np.float64)},
        lambda arrays: {**arrays, "log_probabilities": arrays["ids"]},
        lambda arrays: {**arrays, "tokens": arrays["tokens"].reshape(-1)},
        lambda arrays: {**arrays, "more": arrays["rest"]},
        lambda arrays: {name: arrays[name] for name in ("ids", "rest", "tokens")},
        lambda arrays: {},
    ],
)
def test_files_of_other_tensors(copied: Path, change: Callable[[Any], Any]) -> None:
    save_file(change(load_file(shard(copied))), shard(copied))
    with pytest.raises(bitwright.TargetsError, match="00002.safetensors: .*compute the targets"):
        bitwright.DwqTargets(copied)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ids", VOCABULARY),
        ("ids", 65535),
        ("log_probabilities", np.nan),
        ("log_probabilities", np.inf),
        ("log_probabilities", 1.0),
        ("rest", np.nan),
        ("rest", -1.0),
        ("rest", 7.0),
        ("tokens", -1),
        ("tokens", VOCABULARY),
    ],
)
def test_impossible_values(copied: Path, name: str, value: float) -> None:
    arrays = load_file(shard(copied))
    arrays[name][0].flat[3] = value
    save_file(arrays, shard(copied))
    targets = bitwright.DwqTargets(copied)
    with pytest.raises(bitwright.TargetsError, match="impossible"):
        _ = targets.tokens() if name == "tokens" else targets.read(np.array([2]))


GARBAGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, 2**31, 2**63, 10**30, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from(["", "6", "1e3", "x" * 500, "\ud800", "9" * 5000]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["samples", "k"]), st.integers(), max_size=1),
)
KEYS = (
    *("version", "model", "tokenizer", "vocabulary", "tokens", "samples", "length", "k"),
    *("temperature", "shard_samples"),
)


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Wrong as error:
        return str(error)
    return None


def read_all(targets: bitwright.DwqTargets) -> object:
    """Read as many samples as a manifest says, up to those that were made."""
    return targets.read(np.arange(min(targets.samples, SAMPLES)))


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(st.sampled_from(KEYS), GARBAGE, min_size=1, max_size=3),
    st.sets(st.sampled_from(KEYS), max_size=1),
)
def test_garbage_in_the_manifest(
    made: Path, student: Path, tmp_path: Path, changes: dict[str, Any], removed: set[str]
) -> None:
    folder, out = tmp_path / "garbage", tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder, copy_function=shutil.os.link)  # type: ignore[attr-defined]
    manifest = json.loads((made / "targets.json").read_text()) | changes
    for key in removed:
        del manifest[key]
    (folder / "targets.json").unlink()
    (folder / "targets.json").write_text(json.dumps(manifest))
    for call in (
        lambda: read_all(bitwright.DwqTargets(folder)),
        lambda: bitwright.DwqTargets(folder).tokens(),
        lambda: make(folder),
        lambda: bitwright.dwq_quantize(DEMO, student, out, targets=folder, progress=False),
        lambda: bitwright.dwq_quantize(DEMO, student, out, IDS, targets=folder, progress=False),
    ):
        message = refusal(call)
        assert message is None or (str(folder) in message and len(message) < 1000)
    assert not out.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"version": 1}', b"[" * 100_000, b"1" * 9999],
)
def test_manifests_that_are_none(copied: Path, content: bytes) -> None:
    (copied / "targets.json").write_bytes(content)
    for call in (lambda: bitwright.DwqTargets(copied), lambda: make(copied)):
        with pytest.raises(Wrong, match="targets") as raised:
            call()
        assert str(copied) in str(raised.value)
    assert (copied / "targets.json").read_bytes() == content


def test_absent_targets(tmp_path: Path) -> None:
    with pytest.raises(bitwright.TargetsError, match="is missing; compute the targets first"):
        bitwright.DwqTargets(tmp_path)
