"""Statistics in files: collected as a run gathers them, merged, resumed, used; refused where damaged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from shared_data import TESTS

import bitwright
from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.cli.main import cli
from bitwright.files.replacing import output_errors
from bitwright.methods.moments import Moments
from bitwright.models.block import ChunkStates
from bitwright.statistics.folder import Statistics, StatisticsWriter, expected_stages
from bitwright.tools import collect_statistics as collecting

DEMO = bitwright.demo_folder()
MOE = TESTS / "data" / "tiny" / "qwen3_moe"
LATENT = TESTS / "data" / "tiny" / "deepseek_v3-qlora"
IDS = bitwright.load_tokens(DEMO / "calibration.txt", tokenizer=DEMO, length=64, samples=24)
MOE_IDS = np.random.default_rng(0).integers(0, 96, (20, 64)).astype(np.int32)
BLOCK = "block-00001.safetensors"
DOWN = "model.layers.1.mlp.down_proj"


def collect(out: Path, ids: Any = IDS, model: Path = DEMO, **options: Any) -> Statistics:
    return bitwright.collect_statistics(model, out, ids, **{"progress": False, **options})


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def quantize(out: Path, model: Path = DEMO, **options: Any) -> bitwright.QuantizationReport:
    chosen: dict[str, Any] = {"bits": 3, "preset": "fast", "progress": False}
    return bitwright.quantize(model, out, **{**chosen, **options})


def weights(folder: Path) -> str:
    return digests(folder)["model.safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(tmp_path_factory.mktemp("statistics") / "all").folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(tmp_path_factory.mktemp("statistics") / "moe", MOE_IDS, MOE).folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("method", "format", "options"),
    [
        ("gptq", "mlx", {}),
        ("gptq", "gptq", {"refine": True}),
        ("rtn", "mlx", {"grid_search": True}),
        ("salient", "mlx", {"bits": 4}),
        ("awq", "mlx", {}),
    ],
)
def test_quantizing_by_them_is_quantizing_on_the_original(
    tmp_path: Path, made: Path, method: Any, format: Any, options: dict[str, Any]
) -> None:
    """To the bit: a run that propagates the original gathers the same sums in the same order. Of AWQ it is
    so where both keep the same blocks, by their own judgement."""
    chosen = {"method": method, "format": format, **options}
    by_files = quantize(tmp_path / "files", statistics=made, **chosen)
    by_tokens = quantize(tmp_path / "run", calibration=IDS, propagate="original", **chosen)
    assert [block.scaled for block in by_files.blocks] == [each.scaled for each in by_tokens.blocks]
    assert weights(tmp_path / "files") == weights(tmp_path / "run")
    assert by_files.layers == by_tokens.layers
    assert by_files.calibration_tokens == IDS.size


@pytest.mark.parametrize("model", [MOE, LATENT])
def test_experts_have_their_own_statistics(tmp_path: Path, model: Path) -> None:
    loaded = bitwright.load_model(model)
    ids = MOE_IDS[:4] % loaded.config.vocab_size
    found = collect(tmp_path / "out", ids, model)
    assert list(found.stages) == [name for name, _ in expected_stages(loaded)]
    hidden, rope = loaded.embed(ids), loaded.rotation(ids.shape[1])
    for index in range(loaded.config.num_hidden_layers):
        block, chunk = loaded.block(index), ChunkStates(hidden)
        for stage in block.stages:
            inputs = block.stage_input(stage, chunk)
            if stage.has_own_input:
                name = loaded.block_prefix(index) + stage.name
                moments = found.read(name)
                assert found.stages[name].tokens == len(inputs)
                assert (moments is None) == (len(inputs) == 0)
                if moments is not None and moments.mean_abs is not None:
                    expected = bitwright.gram(np.ascontiguousarray(inputs))
                    np.testing.assert_allclose(moments.gram, expected, rtol=1e-4, atol=1e-5)
                    mean_abs = np.abs(inputs).mean(axis=0)
                    np.testing.assert_allclose(moments.mean_abs, mean_abs, rtol=1e-4, atol=1e-6)
            block.advance(stage, inputs, chunk, rope)
    head = found.read(loaded.names.head)
    assert head is not None
    expected = bitwright.gram(loaded.final_norm(hidden))
    np.testing.assert_allclose(head.gram, expected, rtol=1e-4, atol=1e-5)


def test_experts_are_quantized_by_them(tmp_path: Path, moe: Path) -> None:
    options: dict[str, Any] = {"model": MOE, "group_size": 32, "head_bits": 6}
    by_files = quantize(tmp_path / "files", statistics=moe, **options)
    quantize(tmp_path / "run", calibration=MOE_IDS, propagate="original", **options)
    assert weights(tmp_path / "files") == weights(tmp_path / "run")
    assert not by_files.experts_with_few_tokens()
    awq = quantize(tmp_path / "awq", statistics=moe, method="awq", **options)
    assert all(block.loss_after < block.loss_before for block in awq.blocks if block.scaled)
    assert any(block.scaled for block in awq.blocks)
    ids = MOE_IDS[:6] % bitwright.load_model(MOE).config.vocab_size
    rtn = quantize(tmp_path / "rtn", method="rtn", **options)
    assert rtn.calibration_tokens == 0
    errors = [
        bitwright.evaluate(tmp_path / name, ids, reference=MOE).kl_divergence
        for name in ("awq", "rtn")
    ]
    assert errors[0] < errors[1]  # type: ignore[operator]


def test_experts_with_few_tokens_or_none(tmp_path: Path) -> None:
    """One token leaves two of four experts without any: these are rounded by the router's gram where they
    read its input, and plainly where nothing is known; all are named."""
    found = collect(tmp_path / "few", np.array([[5]]), MOE)
    counts = [stage.tokens for name, stage in found.stages.items() if name.endswith("gate_proj")]
    assert 0 in counts
    for method in ("gptq", "awq+gptq"):
        report = quantize(
            tmp_path / method, MOE, statistics=found.folder, method=method, group_size=32
        )
        assert len(report.experts_with_few_tokens()) == 4 * 3
        assert np.isfinite(bitwright.load_model(tmp_path / method).logits([[5, 6]])).all()


def test_merging_is_collecting_over_all_tokens(tmp_path: Path, made: Path) -> None:
    parts = [
        collect(tmp_path / name, IDS[rows]).folder
        for name, rows in (("a", slice(3)), ("b", slice(3, 14)), ("c", slice(14, None)))
    ]
    both = bitwright.merge_statistics(parts, tmp_path / "merged")
    again = bitwright.merge_statistics(parts[::-1], tmp_path / "reversed")
    assert digests(both.folder) == digests(again.folder)
    known = Statistics(made)
    assert (both.tokens, both.model) == (known.tokens, known.model)
    assert sorted(both.samples) == sorted(known.samples)
    for name, stage in known.stages.items():
        ours, theirs = both.read(name), known.read(name)
        assert ours is not None
        assert theirs is not None
        assert ours.tokens == theirs.tokens == stage.tokens
        scale = theirs.gram.diagonal().max()
        np.testing.assert_allclose(ours.gram, theirs.gram, rtol=1e-5, atol=1e-6 * scale)
        np.testing.assert_allclose(ours.mean_abs, theirs.mean_abs, rtol=1e-4)
    merged = quantize(tmp_path / "q", statistics=both.folder)
    alone = quantize(tmp_path / "q-alone", statistics=made)
    errors = [[layer.error for layer in report.layers] for report in (merged, alone)]
    np.testing.assert_allclose(*errors, rtol=0.05)
    for twice in ([parts[0], parts[0]], [parts[1], both.folder]):
        with pytest.raises(bitwright.StatisticsError, match="samples are in .* count twice") as one:
            bitwright.merge_statistics(twice, tmp_path / "twice")
        assert str(twice[1]) in str(one.value)
    assert not (tmp_path / "twice").exists()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_means_are_weighted_by_tokens(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], channels: int, seed: int
) -> None:
    folder, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(seed)
    parts = []
    for number, count in enumerate(counts):
        inputs = rng.standard_normal((count, channels), dtype=np.float32) * np.float32(10**number)
        moments = None
        if count:
            mean_abs = np.abs(inputs).mean(axis=0, dtype=np.float64)
            moments = Moments(bitwright.gram(inputs), None, mean_abs, count)
        out = folder / f"part-{number}"
        with WorkFolder(out) as work:
            writer = StatisticsWriter(work)
            writer.add("layer", channels, moments)
            writer.end_file("block-00000.safetensors")
            writer.finish("0" * 16, max(count, 1), [f"{number:016x}"])
        parts.append((Statistics(out), inputs))
    merged = bitwright.merge_statistics([part.folder for part, _ in parts], folder / "all")
    every = np.concatenate([inputs for _, inputs in parts]).astype(np.float64)
    found = merged.read("layer")
    assert merged.stages["layer"].tokens == len(every)
    if not len(every):
        assert found is None
        return
    assert found is not None
    exact = every.T @ every / len(every)
    np.testing.assert_allclose(found.gram, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())
    np.testing.assert_allclose(found.mean_abs, np.abs(every).mean(axis=0), rtol=1e-6)
    one, inputs = parts[0]
    again = bitwright.merge_statistics([one.folder], folder / "again").read("layer")
    if len(inputs):
        assert again is not None
        assert (again.gram == one.read("layer").gram).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_interrupted_collecting_goes_on(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """With the hidden states in files, too, and interrupted in the middle of a block or of the head."""
    out = tmp_path / "out"

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if blocks == 3:
            patch.setattr(collecting, "head_moments", interrupted)
        else:
            gather, calls = bitwright.LayerStatistics.gather, []

            def counted(statistics: Any) -> Any:
                calls.append(1)
                return interrupted() if len(calls) == 4 * blocks + 3 else gather(statistics)

            patch.setattr(bitwright.LayerStatistics, "gather", counted)
        with pytest.raises(KeyboardInterrupt):
            collect(out)
    assert not out.exists()
    if blocks:
        with pytest.raises(bitwright.ResumeError, match="calibration"):
            collect(out, IDS[:5])
        with pytest.raises(bitwright.ResumeError):
            bitwright.merge_statistics([made], out)
    computed: list[int] = []
    stages = collecting._stages
    monkeypatch.setattr(
        collecting,
        "_stages",
        lambda model, index, *rest: computed.append(index) or stages(model, index, *rest),  # type: ignore[func-returns-value]
    )
    plan = collecting.plan_run

    def spilled(*arguments: Any, **options: Any) -> Any:
        object.__setattr__(found := plan(*arguments, **options), "resident", 0)
        return found

    monkeypatch.setattr(collecting, "plan_run", spilled)
    collect(out)
    assert computed == list(range(blocks, 3))
    assert digests(out) == digests(made)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_commits_and_starting_over(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", []
    commit = WorkFolder.commit

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt, match="resumes from what is done"):
            collect(out)
    with WorkFolder(out) as work:
        work.keep = True
        with pytest.raises(bitwright.OutputError, match="another run .* is writing it"):
            collect(out)
        with pytest.raises(KeyError):
            raise_inside(work)
    collect(out, IDS[:5], resume=False)
    assert Statistics(out).tokens == 5 * 64
    shutil.rmtree(out)
    collect(out)
    assert digests(out) == digests(made)


def raise_inside(work: WorkFolder) -> None:
    raise KeyError(work.path)


def test_quantizing_by_them_is_resumed(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, calls = WorkFolder.commit, []

    def interrupted(*arguments: Any) -> None:
        commit(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path / "out", statistics=made, method="awq")
    other = collect(tmp_path / "other", IDS[:5]).folder
    with pytest.raises(bitwright.ResumeError, match="statistics"):
        quantize(tmp_path / "out", statistics=other, method="awq")
    resumed = quantize(tmp_path / "out", statistics=made, method="awq")
    whole = quantize(tmp_path / "whole", statistics=made, method="awq")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert resumed.layers == whole.layers


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"calibration": IDS}, "take the place of calibration"),
        ({"activations": "a.npz"}, "take the place of activations"),
        ({"drift": True}, "drift: .*needs calibration data instead"),
        ({"propagate": "quantized"}, "propagate: .*needs calibration data instead"),
        ({"preset": "best"}, "preset: .*needs calibration data instead"),
        ({"method": "awq", "metric": "mae"}, "metric: .*mse only"),
        ({"method": "awq+gptq", "objective": "block"}, "objective: .*layer only"),
        ({"samples": 5}, "samples: .*when they were collected"),
        ({"length": 5}, "length: .*when they were collected"),
        ({"seed": 5}, "seed: .*when they were collected"),
        ({"method": "salient", "activation_method": "max"}, "activation_method"),
    ],
)
def test_what_statistics_cannot_do(
    tmp_path: Path, made: Path, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        quantize(tmp_path / "out", statistics=made, **options)
    assert not list(tmp_path.iterdir())


def other_model(folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_statistics_of_another_model(tmp_path: Path, made: Path) -> None:
    model = other_model(tmp_path / "model")
    with pytest.raises(bitwright.StatisticsError, match="another model") as raised:
        quantize(tmp_path / "out", model, statistics=made)
    assert str(made) in str(raised.value)
    assert str(model) in str(raised.value)
    theirs = collect(tmp_path / "theirs", IDS[:3], model).folder
    with pytest.raises(bitwright.StatisticsError, match="another model") as raised:
        bitwright.merge_statistics([made, theirs], tmp_path / "out")
    assert str(made) in str(raised.value)
    assert str(theirs) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_places_that_are_taken_or_wrong(tmp_path: Path, made: Path) -> None:
    before = digests(made)
    for call in (
        lambda: collect(made),
        lambda: collect(DEMO / "inside"),
        lambda: bitwright.merge_statistics([made], made / "inside"),
        lambda: bitwright.merge_statistics([made], made),
        lambda: collect(Path("/proc/statistics")),
    ):
        with pytest.raises(bitwright.OutputError):
            call()
    assert digests(made) == before
    with pytest.raises(bitwright.StatisticsError, match="is missing; give a folder"):
        quantize(tmp_path / "out", statistics=tmp_path)
    with pytest.raises(ValueError, match="parts: there are none"):
        bitwright.merge_statistics([], tmp_path / "out")
    with pytest.raises(bitwright.MemoryBudgetError, match="needs at least .*--memory"):
        collect(tmp_path / "out", memory=1e-3)
    assert not list(tmp_path.iterdir())


def test_only_statistics_are_overwritten(tmp_path: Path, made: Path) -> None:
    """By statistics, when it is asked for; what is there stays until all is done."""
    out = tmp_path / "s"
    old = collect(out, IDS[:2]).fingerprint()
    with pytest.raises(bitwright.OutputExistsError, match=r"\(overwrite=True, --overwrite\)"):
        collect(out, IDS[2:5])
    assert bitwright.Statistics(out).fingerprint() == old
    new = collect(out, IDS[2:5], overwrite=True).fingerprint()
    assert new == collect(tmp_path / "fresh", IDS[2:5]).fingerprint() != old
    merged = bitwright.merge_statistics([made], out, overwrite=True)
    assert merged.tokens == bitwright.Statistics(made).tokens
    assert {path.name for path in tmp_path.iterdir()} == {"s", "fresh"}
    for name in ("notes.txt", "folder/a"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        for call in (
            lambda: collect(out, IDS[:2], overwrite=True),
            lambda: bitwright.merge_statistics([made], out, overwrite=True),
        ):
            with pytest.raises(bitwright.OutputError, match="not a folder of statistics"):
                call()
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(bitwright.OutputError, match="not a folder of statistics"):
        collect(tmp_path / "file", IDS[:2], overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    """Nothing is left of a merge; of collecting, what it goes on from."""

    def full(writer: StatisticsWriter, name: str, *_: Any) -> None:
        with output_errors(writer._folder / name):
            raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(StatisticsWriter, "finish", full)
        with pytest.raises(bitwright.OutputError, match="No space left"):
            bitwright.merge_statistics([made], out)
        assert not list(tmp_path.iterdir())
        with pytest.raises(bitwright.OutputError, match="No space left.*resumes from what is done"):
            collect(out)
    assert not out.exists()
    collect(out)
    assert digests(out) == digests(made)


def rewritten(file: Path, change: Callable[[dict[str, Any]], None], known: bool) -> None:
    """Change the arrays of a file and, if `known`, the manifest's digests with them."""
    arrays = {name: array.copy() for name, array in load_file(file).items()}
    change(arrays)
    save_file(arrays, file)
    if known:
        place = file.parent / "statistics.json"
        manifest = json.loads(place.read_text())
        stage = manifest["files"][file.name][DOWN]
        data = arrays[f"{DOWN}.gram"].tobytes() + arrays[f"{DOWN}.mean_abs"].tobytes()
        stage["digest"] = hashlib.sha256(data).hexdigest()[:16]
        place.write_text(json.dumps(manifest))


def put(name: str, place: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[f"{DOWN}.{name}"][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "known", "word"),
    [
        (put("gram", (0, 0), 7.0), False, "is not what was written"),
        (put("gram", (3, 4), np.nan), True, "NaN or infinite"),
        (put("gram", (3, 3), np.inf), True, "NaN or infinite"),
        (put("gram", (5, 5), -1.0), True, "negative"),
        (put("gram", (100, 3), 9.0), True, "not symmetric"),
        (put("mean_abs", 2, -1.0), True, "negative"),
        (put("mean_abs", 2, np.nan), True, "NaN or infinite"),
    ],
)
def test_damaged_values(tmp_path: Path, copied: Path, change: Any, known: bool, word: str) -> None:
    rewritten(copied / BLOCK, change, known)
    for call in (
        lambda: Statistics(copied).read(DOWN),
        lambda: bitwright.merge_statistics([copied], tmp_path / "out"),
    ):
        with pytest.raises(bitwright.StatisticsError, match=f"{BLOCK}: .*{word}"):
            call()
    assert Statistics(copied).read("model.layers.0.mlp.down_proj") is not None
    assert {path.name for path in tmp_path.iterdir()} == {"copied"}


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop(f"{DOWN}.gram"),
        lambda arrays: arrays.update({"more": np.zeros(2)}),
        lambda arrays: arrays.update({f"{DOWN}.gram": np.zeros((2, 2), np.float32)}),
        lambda arrays: arrays.update({f"{DOWN}.mean_abs": np.zeros(192, np.float32)}),
    ],
)
def test_files_of_other_arrays(copied: Path, change: Any) -> None:
    rewritten(copied / BLOCK, change, False)
    with pytest.raises(bitwright.StatisticsError, match=f"{BLOCK}: .*collect again"):
        Statistics(copied)


@pytest.mark.parametrize("size", [None, 0, 8, 100, -1])
def test_missing_or_truncated_files(copied: Path, size: int | None) -> None:
    opened, file = Statistics(copied), copied / BLOCK
    content = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes(content[:size])
    with pytest.raises(bitwright.StatisticsError, match=f"{BLOCK}: "):
        Statistics(copied)
    with pytest.raises(bitwright.StatisticsError, match=f"{BLOCK}: .*meanwhile"):
        opened.read(DOWN)
    assert opened.read("lm_head") is not None
    with pytest.raises(bitwright.StatisticsError, match="no statistics of 'lm'"):
        opened.read("lm")


GARBAGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, 2**31, 2**63, 10**30, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from(["", "0" * 16, "x" * 500, "\ud800", "../x", "head.safetensors"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["lm_head", BLOCK, "../x"]), st.integers(), max_size=1),
)
KEYS = st.sampled_from(["version", "model", "tokens", "samples", "files"])
INNER = st.sampled_from(["channels", "tokens", "digest"])


def refusal(call: Callable[[], str]) -> str:
    try:
        return call()
    except bitwright.StatisticsError as error:
        return str(error)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(KEYS, GARBAGE, max_size=2),
    st.dictionaries(INNER, GARBAGE, max_size=2),
    st.sets(KEYS, max_size=1),
)
def test_garbage_in_the_manifest(
    made: Path, tmp_path: Path, outer: dict[str, Any], inner: dict[str, Any], removed: set[str]
) -> None:
    folder = tmp_path / "garbage"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder, copy_function=shutil.os.link)  # type: ignore[attr-defined]
    manifest = json.loads((made / "statistics.json").read_text())
    manifest["files"][BLOCK][DOWN] |= inner
    manifest |= outer
    for key in removed:
        del manifest[key]
    (folder / "statistics.json").unlink()
    (folder / "statistics.json").write_text(json.dumps(manifest))
    model = bitwright.load_model(DEMO)

    def read_all() -> str:
        found = Statistics(folder)
        found.check(model)
        for name in found.stages:
            found.read(name)
        return ""

    message = refusal(read_all)
    assert not message or (str(folder) in message and len(message) < 1000)
    assert message or not removed


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"version": 2}', b"[" * 100_000]
)
def test_manifests_that_are_none(copied: Path, content: bytes) -> None:
    (copied / "statistics.json").write_bytes(content)
    with pytest.raises(bitwright.StatisticsError, match=r"statistics\.json: "):
        Statistics(copied)


def test_states_that_overflow_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.full_like(tensors[name], 1e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(bitwright.NonFiniteError, match=f"inputs of {DOWN} .block 1. are NaN"):
        collect(tmp_path / "out", IDS[:2], model)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    runner, parts = CliRunner(), []
    for number in range(2):
        ids, part = tmp_path / f"{number}.npy", tmp_path / f"part-{number}"
        np.save(ids, IDS[number::2])
        arguments = ["statistics", "collect", str(DEMO), "--out", str(part), "--samples", "3"]
        done = runner.invoke(cli, [*arguments, "--calibration", str(ids)], catch_exceptions=False)
        assert done.exit_code == 0
        assert "13 groups of layers over 192 tokens" in done.output.replace("\n", " ")
        parts.append(str(part))
    both = tmp_path / "both"
    done = runner.invoke(cli, ["statistics", "merge", *parts, "--out", str(both)])
    assert "over 384 tokens" in done.output.replace("\n", " ")
    arguments = ["quantize", str(DEMO), "--out", str(tmp_path / "q"), "--statistics", str(both)]
    done = runner.invoke(cli, [*arguments, "--preset", "fast"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "384 tokens" in (tmp_path / "q" / "README.md").read_text()
    for wrong in (["--drift"], ["--propagate", "quantized"]):
        done = runner.invoke(cli, [*arguments, "--overwrite", *wrong])
        assert isinstance(done.exception, ValueError)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("0.npy", "1.npy", "part-0", "part-1", "both", "q")
    }
