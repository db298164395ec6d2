"""Saved models give the same perplexity in the real clients as in `bitwright evaluate`."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import client_python, run_client
from shared_data import SHARED, TESTS, needs_shared
from tokenizers import Tokenizer, models, processors

import bitwright
from bitwright.text.first_tokens import first_tokens

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow

DEMO = bitwright.demo_folder()
GPTQ = {"format": "gptq", "group_size": 64}
AWQ = {"format": "awq", "group_size": 64}
COMPRESSED = {"format": "compressed-tensors", "scale_dtype": "float32"}


def check_loads(client: str, models: list[Path], tokens: Any, rel: float = 1e-3) -> None:
    """A client loads all of them at once: most of its time goes into starting."""
    scripts = {"mlx": "mlx_perplexity.py", "llamacpp": "llamacpp_perplexity.py"}
    script = scripts.get(client, "gptqmodel_perplexity.py")
    place = models[0].with_name("tokens.npy")
    np.save(place, tokens)
    files = [model / "model.gguf" if client == "llamacpp" else model for model in models]
    printed = run_client(client, script, place, *files).splitlines()
    theirs = [json.loads(line)["perplexity"] for line in printed if line.startswith("{")]
    ours = [bitwright.evaluate(model, tokens).perplexity for model in models]
    assert theirs == pytest.approx(ours, rel=rel)


def check(
    tmp_path: Path,
    client: str,
    model: Path,
    calibration: Any,
    tokens: Any,
    *kinds: dict[str, Any],
) -> None:
    models = [tmp_path / str(number) for number in range(len(kinds))]
    for out, options in zip(models, kinds, strict=True):
        # What is in the codes does not matter to who reads them.
        options = {"preset": "fast", "calibration": calibration, "progress": False, **options}
        bitwright.quantize(model, out, **options)
    # llama.cpp rounds the inputs of quantized layers to 8 bits.
    check_loads(client, models, tokens, 2e-3 if client == "llamacpp" else 1e-3)


DEMO_KINDS: dict[str, list[dict[str, Any]]] = {
    "mlx": [
        {"bits": 3},
        {"bits": 2, "group_size": 32, "method": "rtn"},
        {"bits": 5, "embedding_bits": 8, "overrides": {"*.down_proj": {"bits": 6}}},
        {"bits": 4, "exclude": ["*.0.*"], "scale_dtype": "float32"},
        {"method": "awq", "bits": 3},
        {"method": "salient"},
        {"grid": "mxfp8"},
        {
            "grid": "nvfp4",
            "overrides": {"*.down_proj": "mxfp8", "*.o_proj": "5:64"},
            "exclude": ["*.q_proj"],
        },
    ],
    "gptqmodel": [
        {"bits": 4, **GPTQ},
        {"bits": 3, **GPTQ, "grid": "zero_point"},
        {"bits": 8, **GPTQ, "group_size": None, "exclude": ["*.o_proj"]},
        {"bits": 2, **GPTQ, "group_size": 32},
        {"method": "awq", **AWQ},
        {"method": "awq+gptq", **AWQ, "exclude": ["*.0.*", "*.o_proj"]},
        {"method": "salient", **AWQ, "group_size": 32},
        {"bits": 4, **COMPRESSED, "exclude": ["*.0.*"]},
        {"bits": 4, **COMPRESSED, "grid": "zero_point", "group_size": 32},
        {"bits": 8, **COMPRESSED, "group_size": None},
        {"grid": "fp8", **COMPRESSED, "exclude": ["*.0.*"]},
        {"grid": "fp8:tensor", **COMPRESSED},
        {"format": "gguf", "bits": 5, "grid": "affine"},
    ],
    "llamacpp": [
        {"format": "gguf", "bits": 4, "embedding_bits": 8},
        {"format": "gguf", "bits": 5, "grid": "symmetric", "exclude": ["*.0.*"]},
    ],
}


@pytest.mark.parametrize("client", DEMO_KINDS)
def test_demo_model(tmp_path: Path, client: str) -> None:
    tokens = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=DEMO, length=128, samples=16)
    calibration = bitwright.load_tokens(DEMO / "calibration.txt", tokenizer=DEMO, length=128)
    check(tmp_path, client, DEMO, calibration[:16], tokens, *DEMO_KINDS[client])


@needs_shared
@pytest.mark.parametrize(
    ("client", "kinds"),
    [
        ("mlx", [{"bits": 3}, {"method": "awq", "bits": 3}]),
        (
            "gptqmodel",
            [
                {"bits": 4, **GPTQ},
                {"method": "awq", **AWQ},
                {"method": "rtn", "format": "gguf", "bits": 3},
            ],
        ),
        (
            "llamacpp",
            [
                {"method": "rtn", "format": "gguf", "bits": 4, "embedding_bits": 6},
                {"method": "rtn", "format": "gguf", "bits": 2},
                {"format": "gguf", "grid": "iq4_xs", "embedding_bits": 4},
                {"method": "rtn", "format": "gguf", "grid": "iq4_nl"},
            ],
        ),
    ],
)
def test_small_model(tmp_path: Path, client: str, kinds: list[dict[str, Any]]) -> None:
    calibration = np.load(SHARED / "text" / "small_calibration.npy")[:4]
    tokens = np.load(SHARED / "text" / "small_eval.npy")[:1]  # clients are slow here
    check(tmp_path, client, SHARED / "models" / "small", calibration, tokens, *kinds)


@pytest.mark.parametrize(
    ("client", "format", "target", "candidates"),
    [
        ("mlx", "mlx", 4.5, [(3, 64), (4, 32), (5, 64)]),
        ("gptqmodel", "gptq", 4.3125, [(4, 64)]),  # transformers reads one precision
    ],
)
def test_trained_dynamic_model(
    tmp_path: Path,
    client: str,
    format: Any,
    target: float,
    candidates: list[tuple[int, int | None]],
) -> None:
    """From the original to dynamic precision to trained scales, as the clients read it."""
    text = DEMO / "calibration.txt"
    options: dict[str, Any] = {"length": 64, "progress": False}
    bitwright.dynamic_quantize(
        DEMO, tmp_path / "student", target, candidates, "rtn", format, text, **options
    )
    report = bitwright.dwq_quantize(
        DEMO, tmp_path / "student", tmp_path / "out", text, tokens=5000, **options
    )
    assert report.kl_after < report.kl_before
    tokens = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=DEMO, length=128, samples=8)
    check_loads(client, [tmp_path / "out"], tokens)


@needs_shared
@pytest.mark.parametrize(
    "name", ["qwen3_moe", "mixtral", "qwen2_moe", "phi3", "gemma", "gemma3_text", "qwen3", "qwen2"]
)
def test_families_load_in_mlx(tmp_path: Path, name: str) -> None:
    """Experts are stacked, fused tensors and config.json are what mlx-lm wants. (Its gemma2 has no windows,
    and its deepseek_v2 stops without rope_scaling.)"""
    folder = SHARED / "models" / "arch" / name
    tokens = np.random.default_rng(0).integers(0, 320, (8, 48)).astype(np.int32)
    kind = {"group_size": 32, "scale_dtype": "float32"}
    check(tmp_path, "mlx", folder, tokens, tokens, kind)


@needs_shared
def test_story_model_loads_in_mlx(tmp_path: Path) -> None:
    calibration = np.load(SHARED / "text" / "story_calibration.npy")[:16]
    tokens = np.load(SHARED / "text" / "story_eval.npy")[:16]
    check(tmp_path, "mlx", SHARED / "models" / "story", calibration, tokens, {"bits": 4})


@pytest.mark.parametrize(
    ("client", "options", "target"),
    [
        ("mlx", AWQ, "mlx"),
        ("gptqmodel", {"format": "gguf", "grid": "symmetric"}, "compressed-tensors"),
        ("gptqmodel", {**GPTQ, "grid": "zero_point"}, "awq"),
        ("llamacpp", {"format": "mlx", "embedding_bits": 4, "scale_dtype": "float16"}, "gguf"),
    ],
)
def test_converted_models(
    tmp_path: Path, client: str, options: dict[str, Any], target: Any
) -> None:
    tokens = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=DEMO, length=128, samples=16)
    bitwright.quantize(DEMO, tmp_path / "from", "rtn", progress=False, **options)
    report = bitwright.convert(tmp_path / "from", tmp_path / "out", target, progress=False)
    assert not report.lossy
    check_loads(client, [tmp_path / "out"], tokens, 2e-3 if client == "llamacpp" else 1e-3)


@pytest.mark.parametrize("name", ["story", "small"])
@needs_shared
def test_llama_cpp_computes_what_we_do(tmp_path: Path, name: str) -> None:
    """On weights in float32 it rounds nothing: those of a model in float, and of k grids."""
    tokens = np.load(SHARED / "text" / f"{name}_eval.npy")[:1]
    model = SHARED / "models" / name
    if name == "small":
        bitwright.quantize(model, tmp_path / "k", "rtn", 3, format="gguf", progress=False)
        model = tmp_path / "k"
    bitwright.convert(model, tmp_path / "float", "float", dtype="float32", progress=False)
    bitwright.convert(tmp_path / "float", tmp_path / "out", "gguf", progress=False)
    check_loads("llamacpp", [tmp_path / "out"], tokens, 1e-5)


@pytest.mark.parametrize("name", ["granite", "olmo2", "smollm3", "starcoder2", "glm4"])
def test_families_in_llama_cpp(tmp_path: Path, name: str) -> None:
    """It computes the same from float32, but for a table of float16 that it has for GELU."""
    source = shutil.copytree(TESTS / "data" / "tiny" / name, tmp_path / "source")
    content = json.loads((DEMO / "tokenizer.json").read_text())
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    vocab = content["model"]["vocab"]
    kept = {key: vocab[key] for key in vocab if vocab[key] < size}
    content["model"] |= {"vocab": kept, "merges": []}
    (source / "tokenizer.json").write_text(json.dumps(content))
    bitwright.convert(source, tmp_path / "out", "gguf", dtype="float32", progress=False)
    tokens = np.random.default_rng(0).integers(3, size, (3, 20)).astype(np.int32)
    check_loads("llamacpp", [tmp_path / "out"], tokens, 5e-4)


def test_adapter_where_transformers_is_installed() -> None:
    """Two files of tests skip without torch, which the environment of a client has."""
    try:
        python = client_python("gptqmodel")
    except subprocess.CalledProcessError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(f"the client gptqmodel cannot be installed here: {error}")
    files = ["tests/adapter/test_adapter.py", "tests/models/test_torch_gradients.py"]
    paths = [str(Path(bitwright.__file__).parents[1]), sysconfig.get_path("purelib")]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(("name", "text"), [("story", "story_eval"), ("demo", ""), ("small", "")])
def test_windows_of_llama_cpp(tmp_path: Path, name: str, text: str) -> None:
    """Models that get a token of the beginning, and one that does not: llama-perplexity's figures."""
    if name != "demo" and not SHARED.is_dir():
        pytest.skip(f"needs the test data in {SHARED}")
    model = DEMO if name == "demo" else SHARED / "models" / name
    source = SHARED / "text" / f"{text}.txt" if text else DEMO / "evaluation.txt"
    (tmp_path / "text.txt").write_text(source.read_text(encoding="utf-8")[:4000] + "\n\n")
    bitwright.convert(model, tmp_path / "float", "float", dtype="float32", progress=False)
    bitwright.convert(tmp_path / "float", tmp_path / "out", "gguf", progress=False)
    gguf, length = tmp_path / "out" / "model.gguf", 97
    printed = run_client(
        "llamacpp", "llamacpp_windows.py", tmp_path / "text.txt", str(length), gguf
    )
    theirs = json.loads(printed.splitlines()[-1])
    for each in (model, gguf):
        ours = bitwright.evaluate(
            each, tmp_path / "text.txt", length=length, windows="llama.cpp", reference=model
        )
        assert ours.perplexity == pytest.approx(theirs["perplexity"], abs=1e-3)
        assert ours.reference_perplexity == pytest.approx(theirs["perplexity"], abs=1e-3)
        assert ours.tokens == theirs["windows"] * length
        assert bool(ours.first_tokens) == theirs["adds_bos"] == (name != "demo")


def test_first_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """transformers 5.23: tokenizer.json alone decides, whatever add_bos_token says beside it."""
    folders, expected = [], []
    for kind, first in (("none", []), ("bos", [2]), ("two", [5, 2]), ("bytes, bos", [2])):
        for added in (None, True, False):
            folder = tmp_path / f"{kind} {added}"
            made = tokenizer_with(folder, kind, {} if added is None else {"add_bos_token": added})
            assert list(first_tokens(made)) == first
            folders.append(folder)
            expected.append([*first, 0, 1])
    printed = run_client("gptqmodel", "transformers_tokenizers.py", *folders)
    assert json.loads(printed.splitlines()[-1]) == expected


def tokenizer_with(folder: Path, kind: str, more: dict[str, Any]) -> Tokenizer:
    words = {"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<unk>": 4, "[g]": 5}
    made = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    made.add_special_tokens(["<s>", "</s>", "<unk>", "[g]"])
    known = [("<s>", 2), ("[g]", 5)]
    templates = {"bos": "<s> $A", "two": "[g] <s> $A", "bytes, bos": "<s> $A"}
    if kind in templates:
        template = processors.TemplateProcessing(
            single=templates[kind], pair="$A $B", special_tokens=known
        )
        parts = [processors.ByteLevel(), template] if "," in kind else [template]
        made.post_processor = processors.Sequence(parts) if len(parts) > 1 else template
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | more))
    return made
