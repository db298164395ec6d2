"""Text gets what the tokenizer puts first, once a sample, wherever text is read; token ids never do."""

import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from shared_data import SHARED, needs_shared
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from told import TOLD

import bitwright
from bitwright.cli.main import cli
from bitwright.errors import CalibrationError, ResumeError, StatisticsError, TargetsError
from bitwright.models.config import RopeConfig
from bitwright.precision.estimate import _Estimate
from bitwright.runs.journal import Journal
from bitwright.text.first_tokens import first_tokens
from bitwright.text.samples import load_samples, load_tokens

DEMO = bitwright.demo_folder()
TEXT = (DEMO / "calibration.txt").read_text(encoding="utf-8")[:3000]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
SPECIAL = [("[BOS]", 10), ("[EOS]", 11), ("[MASK]", 12)]


def words(processor: Any = None) -> Tokenizer:
    """Words "0" to "9" and three special tokens."""
    known = {str(i): i for i in range(10)} | {token: i for token, i in SPECIAL} | {"?": 13}
    made = Tokenizer(models.WordLevel(known, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([token for token, _ in SPECIAL])
    if processor is not None:
        made.post_processor = processor
    return made


def template(single: str) -> Any:
    return processors.TemplateProcessing(single=single, special_tokens=SPECIAL)


PROCESSORS: list[tuple[Any, tuple[int, ...]]] = [
    (None, ()),
    (processors.ByteLevel(), ()),
    (template("[BOS] $A"), (10,)),
    (template("[BOS] $A [EOS]"), (10,)),
    (template("$A [EOS]"), ()),
    (template("[MASK] [BOS] $A"), (12, 10)),
    (processors.BertProcessing(("[EOS]", 11), ("[BOS]", 10)), (10,)),
    (processors.RobertaProcessing(("[EOS]", 11), ("[BOS]", 10)), (10,)),
    (processors.Sequence([processors.ByteLevel(), template("[BOS] $A")]), (10,)),
    (processors.Sequence([template("[BOS] $A"), template("[MASK] $A")]), (10,)),
]


@pytest.mark.parametrize(("processor", "expected"), PROCESSORS)
def test_first_tokens_are_what_the_tokenizer_puts_first(
    processor: Any, expected: tuple[int, ...]
) -> None:
    made = words(processor)
    assert first_tokens(made) == expected
    encoded = made.encode("1 2").ids
    assert tuple(encoded[: encoded.index(1)]) == expected


@given(
    ids=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    length=st.integers(1, 12),
    case=st.sampled_from(PROCESSORS),
)
def test_every_sample_of_a_text_begins_so(
    ids: list[int], length: int, case: tuple[Any, tuple[int, ...]]
) -> None:
    processor, first = case
    body = length - len(first)
    text, made = " ".join(map(str, ids)), words(processor)
    if body < 1 or len(ids) < body:
        with pytest.raises(CalibrationError, match="no place behind|too few for one sample"):
            load_tokens([text], tokenizer=made, length=length)
        return
    rows = load_tokens([text], tokenizer=made, length=length)
    assert rows.shape == (len(ids) // body, length)
    assert {tuple(row) for row in rows[:, : len(first)].tolist()} == {first}
    assert rows[:, len(first) :].ravel().tolist() == ids[: len(rows) * body]
    plain = [text] if len(ids) >= length else [f"{text} {'1 ' * length}"]
    assert load_tokens(plain, tokenizer=made, length=length, bos=False)[0, 0] == ids[0]


@pytest.mark.parametrize("single", ["[BOS] $A", "[MASK] [BOS] $A", "[BOS] $A [EOS]"])
def test_what_begins_so_by_itself_is_not_given_it_twice(tmp_path: Path, single: str) -> None:
    """Chats whose template writes the first tokens, packed one after another, and such a text."""
    made = words(template(single))
    first = list(first_tokens(made))
    spelled = single.split(" $A")[0]
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": f"{spelled} "}))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": each}]})
            for each in ("1 2 3 4 5 ", "6 7 8 9 ", "1 2 ")
        )
    )
    length = 3 + len(first)
    expected = [[*first, 1, 2, 3], [*first, 4, 5, *first][:length], [*first, 6, 7, 8]]
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    rows = load_tokens(chats, tokenizer=tmp_path, length=length).tolist()
    assert rows[0] == expected[0]
    assert all(row[: len(first)] == first and row[len(first)] != first[0] for row in rows)
    assert rows[1][: len(first) + 2] == [*first, 4, 5]
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("{{ bos_token }}", ""))
    rows = load_tokens(chats, tokenizer=tmp_path, length=length).tolist()
    assert rows == [[*first, 1, 2, 3], [*first, 4, 5, 6], [*first, 7, 8, 9]]
    rows = load_tokens([f"{spelled} 1 2 3 4 5 6"], tokenizer=made, length=length).tolist()
    assert rows == [[*first, 1, 2, 3], [*first, 4, 5, 6]]


@pytest.mark.parametrize("bos", [True, False])
def test_token_ids_are_never_changed(tmp_path: Path, bos: bool) -> None:
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "ids.npy", ids)
    made = words(template("[BOS] $A"))
    for source in (ids, tmp_path / "ids.npy"):
        np.testing.assert_array_equal(load_tokens(source, tokenizer=made, bos=bos), ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, with a tokenizer that begins every text with token 0."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(DEMO, folder)
    made = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def little_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.presets.best.TRAINED_TOKENS", 96)


def everything(folder: Path) -> dict[str, bytes]:
    """What a folder holds but its card, which tells the call, and a report of times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TOLD}


def quantized(model: Path, data: Any, out: Path, **more: Any) -> Any:
    bitwright.quantize(model, out, calibration=data, **more, progress=False)
    return everything(out)


def dynamic(model: Path, data: Any, out: Path, **more: Any) -> Any:
    report = bitwright.dynamic_quantize(
        *(model, out, 4.5, [(3, 64), (5, 64)], "rtn", "mlx", data),
        evaluation=data, **more, progress=False,
    )  # fmt: skip
    assert report.before is not None
    return everything(out), report.sensitivities.alignments, report.before.perplexity


def refined(model: Path, data: Any, out: Path, **more: Any) -> Any:
    rounded = out.with_name("rounded")
    if not rounded.exists():
        bitwright.quantize(model, rounded, "rtn", bits=3, progress=False)
    bitwright.refine_model(model, rounded, out, data, **more, progress=False)
    return everything(out)


def trained(model: Path, data: Any, out: Path, **more: Any) -> Any:
    rounded = out.with_name("rounded")
    if not rounded.exists():
        bitwright.quantize(model, rounded, "rtn", bits=3, progress=False)
    report = bitwright.dwq_quantize(
        *(model, rounded, out, data),
        validation=data,
        batch_size=1,
        tokens=48,
        **more,
        progress=False,
    )
    return report.losses, report.validations


def best(model: Path, data: Any, out: Path, **more: Any) -> Any:
    report = bitwright.quantize(
        *(model, out, "rtn", 3), calibration=data, preset="best", **more, progress=False
    )
    return everything(out), report.calibration_tokens


def sensitivities(model: Path, data: Any, out: Path, **more: Any) -> Any:
    return bitwright.estimate_sensitivities(model, data, **more, progress=False).alignments


def collected(model: Path, data: Any, out: Path, **more: Any) -> Any:
    return bitwright.collect_statistics(model, out, data, **more, progress=False).samples


def activations(model: Path, data: Any, out: Path, **more: Any) -> Any:
    bitwright.collect_activations(model, out, data, **more)
    return out.read_bytes()


def targets(model: Path, data: Any, out: Path, **more: Any) -> Any:
    return bitwright.compute_dwq_targets(model, data, out, k=4, **more).tokens().tolist()


def evaluated(model: Path, data: Any, out: Path, **more: Any) -> Any:
    found = bitwright.evaluate(model, data, reference=DEMO, **more)
    return found.perplexity, found.reference_perplexity, found.kl_divergence


READERS = [
    *(quantized, dynamic, refined, trained, best, sensitivities, collected, activations),
    *(targets, evaluated),
]


@pytest.mark.parametrize("read", READERS)
def test_every_reader_of_text_takes_the_same_samples(
    tmp_path: Path, model: Path, read: Callable[..., Any]
) -> None:
    """Text gives what the token ids of these samples give, and without the first token those of other."""
    found = {}
    for bos in (True, False):
        ids = load_tokens(model / "text.txt", tokenizer=model, length=24, bos=bos)[:6]
        assert (ids[:, 0] == 0).all() == bos
        short = model / f"text-{bos}.txt"
        body = ids[:, 1:] if bos else ids
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        short.write_text(tokenizer.decode(body.ravel().tolist()))
        found[bos] = read(model, short, tmp_path / f"text {bos}", length=24, bos=bos)
        assert found[bos] == read(model, ids, tmp_path / f"ids {bos}")
    assert found[True] != found[False]


def test_every_public_function_that_takes_text_has_the_option() -> None:
    public = {name: getattr(bitwright, name) for name in bitwright.__all__}
    taking = {
        name: inspect.signature(each).parameters
        for name, each in public.items()
        if inspect.isfunction(each)
    }
    taking = {
        name: parameters
        for name, parameters in taking.items()
        if any(Sequence[str] in get_args(each.annotation) for each in parameters.values())
        and any(
            np.ndarray in map(get_origin, get_args(each.annotation)) for each in parameters.values()
        )
    }
    assert taking.keys() >= {"load_tokens", "quantize", "evaluate", "dwq_quantize", "collect_grams"}
    assert len(taking) == 14
    for parameters in taking.values():
        assert parameters["bos"].default is True
        assert parameters["bos"].kind is inspect.Parameter.KEYWORD_ONLY


COMMANDS = [
    *(["quantize"], ["refine"], ["statistics", "collect"], ["sensitivities"], ["dynamic"], ["dwq"]),
    *(["evaluate"], ["salient"]),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_text_has_the_option(command: list[str]) -> None:
    shown = CliRunner().invoke(cli, [*command, "--help"], terminal_width=200).output
    assert "--bos / --no-bos" in shown


def test_the_option_reaches_what_is_computed(tmp_path: Path, model: Path) -> None:
    for option, first in (("--bos", [0]), ("--no-bos", [])):
        asked = ("--evaluation", str(model / "text.txt"), "--length", "32", "--json", option)
        done = CliRunner().invoke(cli, ["evaluate", str(model), *asked])
        assert json.loads(done.stdout)["first_tokens"] == first
        out = tmp_path / option
        asked = (
            "--out",
            str(out),
            "--calibration",
            str(model / "text.txt"),
            "--length",
            "32",
            option,
        )
        CliRunner().invoke(cli, ["statistics", "collect", str(model), *asked])
        assert bitwright.Statistics(out).first == tuple(first)
        assert json.loads((out / "statistics.json").read_text())["first"] == first


def interrupted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> Callable[[], None]:
    whole = getattr(place, name)
    calls = 0

    def once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if place is _Estimate and calls > 1:
            raise KeyboardInterrupt
        found = whole(*args)
        if place is Journal:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(place, name, once)
    return lambda: monkeypatch.setattr(place, name, whole)


def estimated(model: Path, data: Any, out: Path, **more: Any) -> Any:
    return bitwright.estimate_sensitivities(
        model, data, out=out, batch_size=2, **more, progress=False
    )


@pytest.mark.parametrize(
    ("read", "place", "name"),
    [
        (quantized, Journal, "commit"),
        (refined, Journal, "commit"),
        (collected, Journal, "commit"),
        (estimated, _Estimate, "_batch"),
    ],
)
def test_a_run_goes_on_with_the_same_rule_only(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Any],
    place: Any,
    name: str,
) -> None:
    if read is refined:
        bitwright.quantize(model, tmp_path / "rounded", "rtn", bits=3, progress=False)
    back = interrupted(monkeypatch, place, name)
    text, out = model / "text.txt", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        read(model, text, out, length=24, samples=6)
    back()
    with pytest.raises(ResumeError, match=r"bos \(was \[0\], is None\).*--no-resume"):
        read(model, text, out, length=24, samples=6, bos=False)
    read(model, text, out, length=24, samples=6)


def test_targets_are_of_one_rule(tmp_path: Path, model: Path) -> None:
    text, out = model / "text.txt", tmp_path / "targets"
    made = bitwright.compute_dwq_targets(model, text, out, k=4, length=24)
    assert made.bos == [0]
    with pytest.raises(TargetsError, match="begin with other tokens"):
        bitwright.compute_dwq_targets(model, text, out, k=4, length=24, bos=False)
    bitwright.compute_dwq_targets(model, made.tokens(), out, k=4)  # the same tokens, as ids
    rounded = tmp_path / "rounded"
    bitwright.quantize(model, rounded, "rtn", bits=3, progress=False)
    options: dict[str, Any] = {"targets": out, "tokens": 96, "k": 4, "progress": False}
    known, text_again = (
        bitwright.dwq_quantize(
            model, rounded, tmp_path / f"{length}", data, length=length, **options
        )
        for data, length in ((None, None), (text, 24))
    )
    assert known.losses == text_again.losses
    with pytest.raises(TargetsError, match="begin with other tokens"):
        bitwright.dwq_quantize(
            model, rounded, tmp_path / "other", text, length=24, bos=False, **options
        )


def test_statistics_of_other_rules_are_not_merged(tmp_path: Path, model: Path) -> None:
    def part(name: str, data: Any, **more: Any) -> Path:
        bitwright.collect_statistics(model, tmp_path / name, data, **more, progress=False)
        return tmp_path / name

    text = model / "text.txt"
    ids = load_tokens(text, tokenizer=model, length=24)
    begun = part("begun", text, length=24, samples=4)
    plain = part("plain", text, length=24, samples=4, bos=False)
    given, more = part("ids", ids[20:24]), part("more", TEXT[1500:].split("\n\n"), length=24)
    with pytest.raises(StatisticsError, match=r"no token of the tokenizer's own.*\[0\].*--no-bos"):
        bitwright.merge_statistics([begun, plain], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    assert bitwright.merge_statistics([begun, more], tmp_path / "a").first == (0,)
    assert bitwright.merge_statistics([given, plain], tmp_path / "b").first is None
    manifest = json.loads((begun / "statistics.json").read_text())
    (begun / "statistics.json").write_text(json.dumps({**manifest, "first": [-1]}))
    with pytest.raises(StatisticsError, match="damaged"):
        bitwright.Statistics(begun)


@pytest.mark.slow
@needs_shared
def test_story_is_calibrated_as_it_is_used(tmp_path: Path) -> None:
    """The model of the case: its texts begin with token 1, and codes found so serve it better."""
    model, text = SHARED / "models" / "story", SHARED / "text"
    begun = load_tokens(text / "story_eval.txt", tokenizer=model, length=4)[0]
    assert begun.tolist() == [1, 80, 147, 201]
    found = {}
    for bos in (True, False):
        out = tmp_path / str(bos)
        bitwright.quantize(
            *(model, out, "gptq", 3, 64),
            calibration=text / "story_calibration.txt",
            samples=32,
            length=128,
            bos=bos,
            progress=False,
        )
        used = bitwright.evaluate(
            out, text / "story_eval.txt", length=128, samples=24, reference=model
        )
        found[bos] = used.kl_divergence
    assert found[True] is not None
    assert found[False] is not None
    assert found[True] < 0.9 * found[False]


@needs_shared
@pytest.mark.parametrize(("length", "warned"), [(512, 0), (513, 1), (2048, 1)])
def test_story_is_longer_than_it_has_learned(length: int, warned: int) -> None:
    asked = ("--evaluation", str(SHARED / "text" / "story_eval.txt"), "--length", str(length))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        done = CliRunner().invoke(
            cli, ["evaluate", str(SHARED / "models" / "story"), *asked, "--samples", "1", "--json"]
        )
    assert len(given) == warned == len(json.loads(done.stdout)["warnings"])
    assert all(f"{length} tokens" in str(each.message) for each in given)
    assert all("512 positions" in str(each.message) for each in given)


@pytest.mark.parametrize("read", READERS)
def test_samples_longer_than_the_positions_are_warned_of_once(
    tmp_path: Path, read: Callable[..., Any]
) -> None:
    ids = np.random.default_rng(0).integers(0, 512, (2, 260))
    with pytest.warns(bitwright.BitwrightWarning) as given:
        read(DEMO, ids, tmp_path / "out")
    said = [str(each.message) for each in given if "positions" in str(each.message)]
    assert len(said) == 1
    assert "260 tokens" in said[0]
    assert "256 positions" in said[0]


def test_text_is_cut_to_the_positions_unless_a_length_is_asked_for() -> None:
    found = bitwright.evaluate(DEMO, DEMO / "evaluation.txt", samples=1)
    assert (found.tokens, found.warnings) == (256, ())
    with pytest.warns(bitwright.BitwrightWarning, match="300 tokens are longer than the 256"):
        found = bitwright.evaluate(DEMO, DEMO / "evaluation.txt", samples=1, length=300)
    assert found.tokens == 300
    assert len(found.warnings) == 1
    assert bitwright.inspect_model(DEMO).tokens == 128 * 256


@pytest.mark.parametrize(
    ("rope", "declared", "expected"),
    [
        ({}, 256, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 256, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 256, 1024),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 256, 256),
    ],
)
def test_positions_are_those_that_rope_scaling_reaches(
    rope: dict[str, Any], declared: int, expected: int
) -> None:
    model = bitwright.load_model(DEMO)
    model.config = replace(model.config, rope=RopeConfig(**rope), max_position_embeddings=declared)
    assert model.positions == expected


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(shifted - log_sums)


@pytest.mark.parametrize("length", [2, 3, 32, 33])
@pytest.mark.parametrize("bos", [True, False])
def test_windows_of_llama_cpp(tmp_path: Path, model: Path, length: int, bos: bool) -> None:
    """The rule of llama-perplexity, stated again; tests/interop has the real one."""
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>" + TEXT[:700] + "\n")
    bitwright.quantize(model, tmp_path / "q", "rtn", bits=2, group_size=32, progress=False)
    if length == 2:
        with pytest.raises(CalibrationError, match="2 tokens have no next token"):
            bitwright.evaluate(model, text, length=2, windows="llama.cpp", bos=bos)
        return
    found = bitwright.evaluate(
        tmp_path / "q", text, length=length, windows="llama.cpp", reference=model, bos=bos
    )
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text.read_text()[:-1], add_special_tokens=bos).ids
    rows = np.array(ids[: len(ids) // length * length]).reshape(-1, length)
    targets = rows.copy()
    if bos:
        rows[:, 0] = 0
    judged, reference = (
        softmax(bitwright.load_model(folder).logits(rows)) for folder in (tmp_path / "q", model)
    )
    places = slice(length // 2, length - 1)
    following = targets[:, length // 2 + 1 :, None]
    losses = [-np.take_along_axis(each[:, places], following, 2) for each in (judged, reference)]
    assert found.perplexity == pytest.approx(np.exp(losses[0].mean()), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(np.exp(losses[1].mean()), rel=1e-5)
    divergence = (np.exp(reference) * (reference - judged)).sum(-1)[:, places].mean()
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-4)
    agreed = (reference.argmax(-1) == judged.argmax(-1))[:, places].mean()
    assert found.top1_agreement == pytest.approx(agreed)
    assert (found.windows, found.tokens) == ("llama.cpp", rows.size)


def test_windows_that_llama_cpp_has_not(tmp_path: Path, model: Path) -> None:
    options: dict[str, Any] = {"length": 64, "windows": "llama.cpp"}
    with pytest.raises(CalibrationError, match=r"at least two windows, 128"):
        bitwright.evaluate(model, ["once upon a time"], **options)
    with pytest.raises(ValueError, match="windows"):
        bitwright.evaluate(model, TEXT.split("\n\n"), windows="halves")  # type: ignore[arg-type]
    two = words(template("[MASK] [BOS] $A"))
    with pytest.raises(CalibrationError, match="2 tokens first, and llama-perplexity replaces one"):
        load_samples(
            *(["1 2 3"],), tokenizer=two, length=2, samples=None, vocab_size=20,
            positions=None, windows="llama.cpp",
        )  # type: ignore[arg-type]  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 512, (2, 16))
    whole, halves = (
        bitwright.evaluate(model, ids, reference=DEMO, windows=windows)  # type: ignore[arg-type]
        for windows in ("whole", "llama.cpp")
    )
    assert whole.perplexity != halves.perplexity
    assert halves.first_tokens is None
