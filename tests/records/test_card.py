"""Model cards: what they hold, and that nothing in them can be more than text."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt  # which rich needs

import bitwright
from bitwright.cli.main import cli
from bitwright.errors import OutputError
from bitwright.evaluation import Evaluation
from bitwright.formats import FORMATS
from bitwright.records.card import add_evaluations, command_line, model_card, python_call
from bitwright.records.made_by import made_by

DEMO = bitwright.demo_folder()


def card(folder: Path = DEMO, out: str = "q", format: str | None = "mlx", **options: Any) -> str:
    kind = None if format is None else FORMATS[format]
    return model_card(bitwright.Checkpoint(folder), out, kind, **options)


def front(text: str) -> dict[str, Any]:
    """Read the YAML in front, all of it strings."""
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.load(text[4:].partition("\n---\n")[0], yaml.BaseLoader)
    return found


def source(folder: Path, readme: str | bytes | None = None, **config: Any) -> Path:
    shutil.copytree(DEMO, folder)
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), **config})
    )
    if readme is not None:
        content = readme.encode() if isinstance(readme, str) else readme
        (folder / "README.md").write_bytes(content)
    return folder


def report(layers: Sequence[str] = ("a.b",), **changes: Any) -> bitwright.QuantizationReport:
    values: dict[str, Any] = {
        "out": Path("q"),
        "method": "awq+gptq",
        "format": "mlx",
        "layers": tuple(
            bitwright.LayerReport(name, 3, 64, 0.5 / (i + 1), None) for i, name in enumerate(layers)
        ),
        "blocks": (),
        "layer_bits_per_weight": 3.5,
        "bits_per_weight": 4.25,
        "size_bytes": 2_000_000,
        "original_bytes": 8_000_000,
        "calibration_tokens": 1024,
        "seconds": 12.3456,
        "peak_memory_bytes": 987_654_321,
    }
    return bitwright.QuantizationReport(**{**values, **changes})


TRAINED = bitwright.DwqReport(
    Path("q"), "kl", 2, 256, (0.3, 0.2), ((0, 0.3), (2, 0.125)), 2, None, 1.0, 1.0, 1
)


def test_of_a_run(tmp_path: Path) -> None:
    blocks = (
        bitwright.BlockReport(0, 2.0, 1.0, True, {}),
        bitwright.BlockReport(1, 1.0, 2.0, False, {}),
    )
    names = [f"layer.{i}" for i in range(7)]
    text = card(
        source(tmp_path / "story"),
        reports=[report(names, blocks=blocks), TRAINED],
        facts={"preset": "best", "grid": "affine", "seed": None},
    )
    assert front(text) == {
        "library_name": "mlx",
        "base_model": "story",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "bitwright", "awq", "gptq", "dwq", "3-bit"],
    }
    assert text.count("\n# ") == 1
    for row in (
        "| original | `story` |",
        "| method | awq+gptq, then dwq |",
        "| precision | 3 bits in groups of 64 |",
        "| preset | best |",
        "| grid | affine |",
        "| bits per weight | 3.500 in the quantized layers, 4.250 over all tensors |",
        "| size | 2.0 MB (was 8.0 MB) |",
        "| calibration | 1,024 tokens |",
        "| trained on | 256 tokens in 2 steps, loss kl |",
        "| validation KL | 0.30000 before training, 0.12500 after |",
        f"| bitwright | {bitwright.__version__} |",
        "| `layer.4` | 3 | 64 | 1.00e-01 |",
        "| 0 | 2.000e+00 | 1.000e+00 | 0.500 |",
        "| 1 | 1.000e+00 | 2.000e+00 | not kept |",
    ):
        assert f"\n{row}\n" in text
    assert "`story` in the mlx format (7 layers quantized, by AWQ and GPTQ, then DWQ), made" in text
    assert "layer.5" not in text  # only the worst five
    assert "seed" not in text
    assert "bitwright quantize" not in text  # nobody said how it was made


def test_says_nothing_that_differs_from_run_to_run() -> None:
    texts = {
        card(reports=[report(seconds=seconds, peak_memory_bytes=memory)])
        for seconds, memory in ((1.0, 1), (2.0, 2))
    }
    assert len(texts) == 1
    assert "98" not in texts.pop()


def test_several_precisions() -> None:
    text = card(format="gptq", precisions=[(4, 64), (3, 64), (4, 64)])
    row = "| precision | 3 bits in groups of 64 (layers: 1), 4 bits in groups of 64 (layers: 2) |"
    assert f"\n{row}\n" in text
    assert front(text)["tags"] == ["gptq", "bitwright", "3-bit", "4-bit"]
    rows = card(format="gptq", precisions=[(4, 4096), (4, 11008)])  # reported by their length
    assert "\n| precision | 4 bits in whole rows |\n" in rows
    assert "GPTQModel" not in rows


README = """---
# a comment
license: other  # another
license_name: "llama3.1"
license_link: https://example.com/LICENSE#terms
language:
  - en
  - 'no'
pipeline_tag: text-generation
base_model: org/ancestor
library_name: elsewhere
datasets: [a, b]
widget:
  - text: "Hi: there"
---
# Title
license: mit
"""


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_licence_and_language_are_carried_over(tmp_path: Path, ending: str) -> None:
    folder = source(
        tmp_path / "m", b"\xef\xbb\xbf" + README.replace("\n", ending).encode(), _name_or_path="a/b"
    )
    found = front(card(folder))
    assert found["license"] == "other"
    assert found["license_name"] == "llama3.1"
    assert found["license_link"] == "https://example.com/LICENSE#terms"
    assert found["language"] == ["en", "no"]
    assert found["base_model"] == "a/b"
    assert found["library_name"] == "mlx"
    assert not {"datasets", "widget"} & set(found)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("license: mit", "mit"),
        ("license: 'mit'", "mit"),
        ("license: [mit]", "mit"),
        ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("license:\n- mit", "mit"),
        ("license: |\n  mit", None),
        ("license: mit\n  and more", None),
        ("license: {a: b}", None),
        ("license: &x mit", "mit"),
        ("license: !!python/object:os.system mit", "mit"),  # a string, whatever it asks for
        ("license: 'it''s'", None),
        ('license: "a\\nb"', None),
        ("license:\n- mit\n- {a: b}", None),
        ("license: ''", None),
        ("license:", None),
        ("license: mit`x", None),
        (f"license: {'a' * 100}", None),
    ],
)
def test_what_is_not_simple_is_dropped(tmp_path: Path, line: str, expected: object) -> None:
    folder = source(tmp_path / "m", f"---\n{line}\nlanguage: en\n---\n")
    found = front(card(folder))
    assert found.get("license") == expected
    assert found["language"] == "en"


# Each of the lists holds the one before nine times.
ALIASES = b"x0: &x0 [a]\n" + b"".join(
    b"x%d: &x%d [%s]\n" % (depth, depth, b",".join([b"*x%d" % (depth - 1)] * 9))
    for depth in range(1, 9)
)


@pytest.mark.parametrize(
    "readme",
    [
        b"",
        b"---",
        b"---\nlicense: mit\n",
        b"---\nlicense: mit\n" + b"# filler\n" * 20_000 + b"---\n",
        b"---\n" + b"license: " + b"[" * 100_000,
        b"---\n" + b" \t" * 40_000 + b"x\n---\n",
        b"---\nlicense: [mit\n---\n",
        b"---\n" + ALIASES + b"---\n",
        b"# Title\n---\nlicense: mit\n---\n",
        bytes(range(256)) * 300,
        b"---\nlicense\x00: mit\xff\n---\n",
    ],
    ids=range(11),
)
def test_strange_cards_are_nothing(tmp_path: Path, readme: bytes) -> None:
    found = front(card(source(tmp_path / "m", readme)))
    assert found == front(card(source(tmp_path / "other" / "m")))


def test_cards_without_end_or_of_other_kinds(tmp_path: Path) -> None:
    folder = source(tmp_path / "m")
    plain = card(folder)
    with open(folder / "README.md", "wb") as file:
        file.truncate(10 << 30)  # sparse
    assert card(folder) == plain
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")  # reading it would wait forever
    assert card(folder) == plain
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    assert card(folder) == plain


def test_name_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(folder: str, readme: str | None = None, **config: Any) -> object:
        return front(card(source(tmp_path / folder, readme, **config))).get("base_model")

    assert name("story") == "story"
    assert name("a", _name_or_path="org/it") == "org/it"
    assert name("b", _name_or_path="/home/someone/it") == "b"
    assert name("c", _name_or_path=["org/it"]) == "c"
    assert name("d", "---\nbase_model: org/it\n---\n", _name_or_path="org/it") == "d"
    assert name("models--org--it/snapshots/0123") == "org/it"
    assert name("models--it/snapshots/0123") == "it"
    assert name("with space") is None
    quantized = "---\nbase_model: org/it\nbase_model_relation: quantized\n---\n"
    assert name("e", quantized) == "org/it"
    monkeypatch.chdir(tmp_path / "story")
    assert front(card(Path("."), str(tmp_path / "q")))["base_model"] == "story"


NAMES = [
    "a|b",
    "a`b",
    "``|",
    "[x](javascript:y)",
    "<script>",
    "a\n---\nlicense: x\n# b",
    "\udcff",
    "a\\",
    " ",
]


def structure(text: str) -> list[object]:
    """Return what Markdown makes of a card, without the words."""
    body = text[text.index("\n---\n", 4) + 5 :]
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    kinds = {"text", "code_inline", "text_special"}
    return [
        (token.type, token.tag, token.info, {each.type for each in token.children or ()} - kinds)
        for token in tokens
    ]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_text(tmp_path: Path, name: str) -> None:
    text, plain = (
        card(out=f"{tmp_path}/{each}", reports=[report([each])], facts={each: each})
        for each in (name, "x")
    )
    text.encode()
    assert front(text) == front(plain)
    assert structure(text) == structure(plain)
    assert not any(found for *_, found in structure(text))


def test_yaml_is_read_by_others(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    readme = "---\nlicense_name: 'a: (b) - c'\nlanguage: [no, en]\nlicense: 1.0\n---\n"
    readme = readme.replace("a: (b)", "1e3 (b)")
    text = card(source(tmp_path / "true", readme), reports=[report()])
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "library_name": "mlx",
        "base_model": "true",
        "base_model_relation": "quantized",
        "license": "1.0",
        "license_name": "1e3 (b) - c",
        "language": ["no", "en"],
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "bitwright", "awq", "gptq", "3-bit"],
    }


def test_command_line_is_as_it_was_typed() -> None:
    typed = ["quantize", "my model", "--out", "it's; rm -rf /", "--exclude", "*.down_proj", "```"]
    with made_by(command_line(typed)), made_by("bitwright.quantize(1)"):
        text = card()
    block = text.split("````")[1]
    assert block.startswith("sh\nbitwright quantize ")
    shown = subprocess.run(
        ["bash", "-c", "bitwright() { printf '%s\\0' \"$@\"; }\n" + block.removeprefix("sh\n")],
        capture_output=True,
        check=True,
    )
    assert shown.stdout.decode().split("\0")[:-1] == typed
    assert "bitwright.quantize" not in text
    assert "my model" not in card()


def test_wrong_options_leave_no_command_behind(tmp_path: Path) -> None:
    for arguments in (
        ["quantize", "nowhere", "--out", "q"],
        ["quantize", str(DEMO), "--bits", "x"],
    ):
        with pytest.raises((click.exceptions.ClickException, bitwright.BitwrightError)):
            cli.main(arguments, standalone_mode=False, obj=arguments)
    bitwright.quantize(DEMO, tmp_path / "q", "rtn", progress=False)
    assert "nowhere" not in (tmp_path / "q" / "README.md").read_text()


def test_made_by_ends_with_an_error() -> None:
    with pytest.raises(KeyError), made_by("bitwright x"):
        raise KeyError
    assert "bitwright x" not in card()


def example(model: object, out: object, bits: int = 4, /, **options: Any) -> None: ...


def test_python_call() -> None:
    def call(arguments: Mapping[str, object]) -> str:
        everything = dict.fromkeys(("samples", "calibration", "grid", "recipe"))
        defaults = {"method": "gptq", "bits": 4, "include": (), "progress": True, "seed": 0}
        return python_call(bitwright.quantize, {**everything, **defaults, **arguments})

    plain = {"model": Path("m"), "out": 'o"\n\x1b\u2028'}
    assert call(plain) == 'bitwright.quantize("m", "o\\"\\n\\u001b\\u2028")'
    assert call({**plain, "include": [], "progress": False}) == call(plain)
    text = call(
        {
            "model": "m",
            "out": "o",
            "bits": np.int64(3),
            "group_size": None,
            "calibration": np.zeros((8, 128), np.int32),
            "refine": False,
            "damping": 0.01,
            "scale_dtype": ml_dtypes.bfloat16,
            "metric": call,
            "exclude": ["a*", "b"],
            "overrides": {"*.x": {"bits": 8}},
            "recipe": bitwright.Recipe({"a": (3, 64)}, 4.0, 4.0),
        }
    )
    assert text.split("\n") == [
        "bitwright.quantize(",
        '    "m",',
        '    "o",',
        "    bits=3,",
        "    group_size=None,",
        "    calibration=<array of shape [8, 128]>,",
        "    refine=False,",
        '    scale_dtype="bfloat16",',
        "    damping=0.01,",
        "    metric=<call>,",
        '    exclude=["a*", "b"],',
        '    overrides={"*.x": {"bits": 8}},',
        "    recipe=<Recipe>,",
        ")",
    ]
    assert call({**plain, "calibration": ["text " * 50] * 3}).endswith("calibration=<list of 3>)")
    options = {"model": "m", "out": "o", "bits": 4, "options": {"seed": 1, "grid": None}}
    assert python_call(example, options) == 'bitwright.example("m", "o", seed=1, grid=None)'


def test_python_call_is_a_block_of_python() -> None:
    with made_by(python_call(example, {"model": "m", "out": "o"})):
        assert '```python\nbitwright.example("m", "o")\n```' in card()


@pytest.mark.parametrize(
    ("format", "mixed", "library", "expected"),
    [
        ("mlx", False, "mlx", "mlx_lm.generate --model 'a b' --prompt"),
        ("gguf", False, "llama.cpp", "llama-cli -m 'a b/model.gguf' -p"),
        ("gptq", False, "transformers", 'AutoModelForCausalLM.from_pretrained("a b")'),
        ("gptq", True, "transformers", 'GPTQModel.load("a b")'),
        ("awq", False, "transformers", "vllm serve 'a b'"),
        ("compressed-tensors", False, "transformers", "CompressedTensorsConfig(dequantize=True)"),
        ("compressed-tensors", True, "transformers", "vllm serve 'a b'"),
        ("marlin", False, "transformers", 'pip install "vllm<=0.10.1.1"'),
        (None, False, "transformers", 'AutoModelForCausalLM.from_pretrained("a b")'),
    ],
)
def test_loading(format: str | None, mixed: bool, library: str, expected: str) -> None:
    text = card(out="a b", format=format, precisions=[(4, 64), (8, 64)][: 1 + mixed])
    loading = text[text.index("## Loading") : text.index("## Evaluation")]
    assert expected in loading
    assert front(text)["library_name"] == library
    assert (format is None) == ("base_model_relation" not in front(text))
    assert "bitwright evaluate 'a b' --reference demo_data --evaluation other.txt" in text
    for block in loading.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")


def test_every_format_has_a_test_of_loading() -> None:
    marks = test_loading.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in marks[0].args[1]} == {*FORMATS, None}


def test_evaluations_are_added(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(card())
    before = Evaluation(10.0, None, None, 16.0, 1024, 1.0, 1)
    after = Evaluation(
        11.0, 0.0625, 0.75, 3.5, 1024, 1.0, 1, reference_perplexity=10.0, windows="llama.cpp"
    )
    add_evaluations(tmp_path, {"original": before, "a|b": after})
    assert path.read_text() == card() + (
        "\n| model | perplexity | reference | KL (nats/token) | top-1 | tokens | windows |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| original | 10.0000 |  |  |  | 1,024 | whole |\n"
        "| a&#124;b | 11.0000 | 10.0000 | 0.06250 | 75.00 % | 1,024 | llama.cpp |\n"
    )
    with pytest.raises(OutputError, match="nowhere"):
        add_evaluations(tmp_path / "nowhere", {})


ABSOLUTE = "/home/me/secret place/models"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["quantize", f"{ABSOLUTE}/m", "--out", "/tmp/q/", "--bits", "3"], "m --out q --bits 3"),
        (
            ["evaluate", "a/b", f"--evaluation={ABSOLUTE}/my text.txt"],
            "a/b '--evaluation=my text.txt'",
        ),
        (["dwq", "~/models/m", "--calibration", "../d.npy"], "m --calibration ../d.npy"),
        (["quantize", "/", "--override", "*/x=bits:3"], "/ --override '*/x=bits:3'"),
    ],
)
def test_commands_tell_no_places(typed: list[str], expected: str) -> None:
    assert command_line(typed) == f"bitwright {typed[0]} {expected}"


def test_calls_tell_no_places() -> None:
    given = {"model": Path(ABSOLUTE, "m"), "out": f"{ABSOLUTE}/q", "calibration": "/data/c.npy"}
    more = {"statistics": Path("/s"), "bits": 4, "activations": "~/a.npz"}
    call = python_call(bitwright.quantize, {**given, **more})
    assert call == (
        'bitwright.quantize("m", "q", calibration="c.npy", activations="a.npz", statistics="s")'
    )


def test_cards_of_real_runs_tell_no_places(tmp_path: Path) -> None:
    """Made by Python, with absolute paths everywhere, in three ways."""
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "calibration.txt").read_text()[:3000])
    options: dict[str, Any] = {"samples": 4, "length": 32, "progress": False}
    quantized, refined = tmp_path / "quantized", tmp_path / "refined"
    bitwright.quantize(DEMO, quantized, "rtn", 3, calibration=text, **options)
    report = bitwright.refine_model(DEMO, quantized, refined, text, **options)
    seen = tmp_path / "seen.npz"
    bitwright.collect_activations(DEMO, seen, text, samples=4, length=32)
    salient = bitwright.awq_quantize_model(
        DEMO, tmp_path / "salient", seen, group_size=32, verbose=False
    )
    bitwright.dwq_quantize(
        DEMO, quantized, tmp_path / "trained", text, length=32, tokens=256, progress=False
    )
    cards = {
        name: (tmp_path / name / "README.md").read_text()
        for name in ("quantized", "refined", "salient", "trained")
    }
    for name, shown in cards.items():
        assert str(tmp_path) not in shown
        assert str(DEMO) not in shown
        assert f"bitwright evaluate {name} --reference demo_data" in shown
    assert 'calibration="text.txt"' in cards["quantized"]
    # The method by its name, and the error before and after.
    assert report.method == "refine"
    assert "| method | refine |" in cards["refined"]
    assert "quantized, by refinement of its codes and scales), made" in cards["refined"]
    before, after = report.mean_errors()
    assert before is not None
    assert after < before
    row = f"| squared error | {before:.2e} before, {after:.2e} after, relative, mean over the layers |"
    assert row in cards["refined"]
    worst = report.worst()[0]
    assert worst.error_before is not None
    cells = f"| 3 | 64 | {worst.error_before:.2e} | {worst.error:.2e} |"
    assert f"| `{worst.name}` {cells}" in cards["refined"]
    assert "squared error" not in cards["quantized"]
    assert salient.calibration_tokens == 4 * 32
    assert "| calibration | 128 tokens |" in cards["salient"]


def test_errors_before_are_those_of_what_was_refined(tmp_path: Path) -> None:
    """On the first layers, which see the same inputs before and after: the error that rounding reported."""
    ids = bitwright.load_tokens(DEMO / "calibration.txt", tokenizer=DEMO, length=64, samples=4)
    for bits, method in ((3, "rtn"), (4, "gptq"), (2, "rtn")):
        start, out = tmp_path / f"{bits} {method}", tmp_path / f"{bits} {method} refined"
        options: dict[str, Any] = {"progress": False}
        made = bitwright.quantize(
            DEMO,
            start,
            method,
            bits,
            calibration=ids,
            preset="fast",
            float_embeddings=True,
            **options,
        )  # type: ignore[arg-type]
        found = bitwright.refine_model(DEMO, start, out, ids, drift=False, **options)
        for layer, known in zip(found.layers[:3], made.layers, strict=False):
            assert layer.name == known.name
            assert layer.error_before == pytest.approx(known.error, rel=1e-4)
            assert layer.error < known.error
        assert all(layer.error_before is None for layer in made.layers)


def test_tokens_of_activations_are_those_of_the_longest_array(tmp_path: Path) -> None:
    from bitwright.statistics.activation_file import ActivationFile

    arrays = {"a": np.zeros((3, 5, 4), np.float32), "b": np.zeros((7, 9), np.float32)}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", b=arrays["b"], c=np.array([[1, 2]], dtype=object))
    np.savez(tmp_path / "c.npz")
    for name, count in (("a", 15), ("b", 7), ("c", 0)):
        with ActivationFile(tmp_path / f"{name}.npz") as file:
            assert file.token_count() == count
