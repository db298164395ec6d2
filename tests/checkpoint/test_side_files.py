"""Everything that belongs to a model travels with it, whatever writes it, and nothing else does."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import TESTS

import bitwright
from bitwright.checkpoint import Checkpoint, CheckpointWriter, copy_side_files
from bitwright.checkpoint.side_files import SideFiles, side_files
from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.errors import CheckpointError, OutputError
from bitwright.formats.stored import SEPARATE_FILES
from bitwright.warned import BitwrightWarning

TINY = TESTS / "data" / "tiny"
TOKENS = np.arange(256, dtype=np.int32).reshape(4, 64) % 90

CODE = [
    "configuration_own.py",
    "modeling_own.py",
    "own/__init__.py",
    "own/layers/attention.py",
    "requirements.txt",
    "tokenization_own.py",
]
SENSES = [
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "spk_dict.npy",
    "video_preprocessor_config.json",
]
WORDS = [
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "cl100k.tiktoken",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.bpe",
    "vocab.txt",
]
SENTENCES = ["1_Pooling/config.json", "config_sentence_transformers.json", "modules.json"]
KINDS = {"code": CODE, "senses": SENSES, "words": WORDS, "sentences": SENTENCES}
LEFT = [
    ".gitattributes",
    ".cache/huggingface/download/config.json.metadata",
    ".git/config",
    "README.md",
    "README_zh.md",
    "checkpoint-500/trainer_state.json",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "global_step1/x.json",
    "imatrix.dat",
    "model.ckpt",
    "model.onnx_data",
    "model.safetensors.index.json.index.json",
    "onnx/config.json",
    "onnx/model.onnx",
    "optimizer.pt",
    "original/params.json",
    "original/consolidated.safetensors",
    "own/__pycache__/layers.cpython-311.pyc",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "quant_config.json",
    "quant_log.csv",
    "quantize_config.json",
    "rng_state_0.pth",
    "rust_model.ot",
    "runs/events.out.tfevents.1",
    "tf_model.h5",
    "tokens.npz",
    "trainer_state.json",
    "training_args.bin",
    "model.Q4_K_M.gguf",
]

# Settings of a quantization beside weights in float are warned of.
LEFT_OF_A_FLOAT_MODEL = [name for name in LEFT if name not in SEPARATE_FILES]


def put(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    if "modules.json" in names:
        (folder / "modules.json").write_text('[{"path": "", "type": "T"}, {"path": "1_Pooling"}]')


def source(folder: Path, names: list[str], model: str = "mistral") -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / model / name, folder / name)
    put(folder, names)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )


def copied(folder: Path, out: Path, **options: Any) -> list[str]:
    with Checkpoint(folder) as known, CheckpointWriter(out, source=folder, **options) as writer:
        for name in known.names():
            writer.add(name, known.read(name))
        writer.write_json("config.json", known.config)
        return copy_side_files(known, writer)


@pytest.mark.parametrize("kind", KINDS)
def test_small_files_travel_and_others_do_not(tmp_path: Path, kind: str) -> None:
    folder = source(tmp_path / "source", [*KINDS[kind], *LEFT])
    if kind == "words":
        (folder / "tokenizer.model").chmod(0o444)
    os.mkfifo(folder / "pipe.json")
    (folder / "nowhere.json").symlink_to(folder / "absent")
    (folder / "itself.json").symlink_to(folder / "itself.json")
    assert copied(folder, tmp_path / "out") == sorted(KINDS[kind])
    assert names_in(tmp_path / "out") == sorted([*KINDS[kind], "config.json", "model.safetensors"])
    for name in KINDS[kind]:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def quantized(model: Path, out: Path) -> None:
    bitwright.quantize(model, out, "rtn", 4, 32, "mlx", progress=False)


def refined(model: Path, out: Path) -> None:
    quantized(model, out.with_name("q"))
    bitwright.refine_model(model, out.with_name("q"), out, TOKENS, progress=False)


def trained(model: Path, out: Path) -> None:
    quantized(model, out.with_name("q"))
    bitwright.dwq_quantize(model, out.with_name("q"), out, TOKENS, tokens=256, progress=False)


def mixed(model: Path, out: Path) -> None:
    bitwright.dynamic_quantize(
        model, out, 4.5, [(3, 32), (4, 32), (5, 32)], "rtn", "mlx", TOKENS, progress=False
    )


def best(model: Path, out: Path) -> None:
    bitwright.quantize_best(model, out, bits=4, group_size=32, calibration=TOKENS, progress=False)


def converted(model: Path, out: Path) -> None:
    quantized(model, out.with_name("q"))
    bitwright.convert(out.with_name("q"), out, "float", progress=False)


def salient(model: Path, out: Path) -> None:
    activations = out.with_name("activations.npz")
    bitwright.collect_activations(model, activations, TOKENS)
    bitwright.awq_quantize_model(model, out, activations, 32, verbose=False)


WRITERS = [quantized, converted, refined, trained, mixed, best, salient]


@pytest.mark.parametrize("write", WRITERS)
def test_all_writers_take_everything_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setattr("bitwright.presets.best.TRAINED_TOKENS", 256)
    everything = sorted(name for names in KINDS.values() for name in names)
    folder = source(tmp_path / "source", [*everything, *LEFT_OF_A_FLOAT_MODEL])
    write(folder, tmp_path / "out")
    written = set(names_in(tmp_path / "out"))
    assert written - set(everything) <= {
        "config.json",
        "model.safetensors",
        "README.md",
        "report.json",
        "dwq.json",
    }
    assert written >= set(everything)
    for name in everything:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("format", ["gptq", "awq", "gguf"])
def test_all_formats_take_everything_along(tmp_path: Path, format: Any) -> None:
    folder = tmp_path / "source"
    shutil.copytree(bitwright.demo_folder(), folder)
    put(folder, [*CODE, *LEFT_OF_A_FLOAT_MODEL])
    bits = {"bits": 4, "group_size": 64} if format != "gguf" else {"bits": 8, "grid": "symmetric"}
    bitwright.quantize(folder, tmp_path / "out", "rtn", format=format, progress=False, **bits)
    demo = [*names_in(bitwright.demo_folder()), "README.md", "report.json"]
    weights = "model.gguf" if format == "gguf" else "model.safetensors"
    expected = {*CODE, *demo, weights} - ({"model.safetensors"} - {weights})
    assert names_in(tmp_path / "out") == sorted(expected)


@pytest.mark.parametrize("reference", ["modeling_own.Own", "some/repo--modeling_own.Own"])
def test_references_to_code_stay(tmp_path: Path, reference: str) -> None:
    folder = source(tmp_path / "source", CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": reference}
    (folder / "config.json").write_text(json.dumps(config))
    quantized(folder, tmp_path / "out")
    bitwright.convert(tmp_path / "out", tmp_path / "float", "float", progress=False)
    for out in ("out", "float"):
        written = json.loads((tmp_path / out / "config.json").read_text())
        assert written["auto_map"] == config["auto_map"]
        assert (tmp_path / out / "modeling_own.py").is_file()


def test_the_hub_clients_cache(tmp_path: Path) -> None:
    """There, all files are links out of the folder."""
    names = [*CODE, *WORDS, "config.json", "model.safetensors"]
    whole = source(tmp_path / "whole", [*CODE, *WORDS])
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    for number, name in enumerate(names):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    quantized(snapshot, tmp_path / "out")
    assert names_in(tmp_path / "out") == sorted([*names, "README.md", "report.json"])
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_weights_of_modules_travel(tmp_path: Path, suffix: str) -> None:
    weights = f"2_Dense/model.{suffix}"
    folder = source(tmp_path / "source", [*SENTENCES, weights, "2_Dense/config.json"])
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    quantized(folder, tmp_path / "out")
    assert (tmp_path / "out" / weights).read_text() == weights
    assert bitwright.load_model(tmp_path / "out").quantized_layers()


@pytest.mark.parametrize("content", ["{", "3", "[3, null]", '[{"path": 3}]', "[" * 100_000, '"a"'])
def test_damaged_modules(tmp_path: Path, content: str) -> None:
    folder = source(tmp_path / "source", [])
    (folder / "modules.json").write_text(content)
    assert copied(folder, tmp_path / "out") == ["modules.json"]


def large(folder: Path) -> str:
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate((64 << 20) + 1)
    return "larger than 64 MiB.*: 'tokenizer.json'"


def unreadable(folder: Path) -> str:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "merges.txt").write_text("")
    (folder / "merges.txt").chmod(0)
    return "cannot be read.*: 'merges.txt'"


def weights(folder: Path) -> str:
    put(folder, ["speech-lora/adapter_model.safetensors"])
    return "other weights.*: 'speech-lora/adapter_model.safetensors'"


def adapter(folder: Path) -> str:
    put(folder, ["adapter_config.json", "adapter_model.safetensors"])
    return "an adapter, .*: 'adapter_config.json'"


def link(folder: Path) -> str:
    (folder / "code").symlink_to("/usr")
    return "a link to another folder.*: 'code'"


def circle(folder: Path) -> str:
    (folder / "code").symlink_to(folder)
    return "a link to another folder.*: 'code'"


def deep(folder: Path) -> str:
    put(folder, ["1/2/3/4/5/6/7.py"])
    return "more than 5 folders deep.*: '1/2/3/4/5/6'"


def many(folder: Path) -> str:
    (folder / "code").mkdir()
    for number in range(1010):
        (folder / "code" / f"{number:04}.py").touch()
    return "11 files or folders .*behind the first 1000 files.*: 'code/0999.py', 'code/1000.py'"


def crowded(folder: Path) -> str:
    for number in range(1003):
        (folder / f"{number:04}").mkdir()
    return "3 files or folders .*in more than 1000 folders.*: '1000', '1001', '1002'"


def strange(folder: Path) -> str:
    (folder / "a\x1b[31m").symlink_to("/usr")
    return r"a link to another folder.*: 'a\\x1b\[31m'"


def heavy(folder: Path) -> str:
    for number in range(9):
        with open(folder / f"{number}.json", "wb") as file:
            file.truncate(60 << 20)
    return "behind the first 1000 files or 512 MiB.*: '8.json'"


@pytest.mark.parametrize(
    "change",
    [large, unreadable, weights, adapter, link, circle, deep, many, crowded, strange, heavy],
)
def test_what_may_be_missed_is_named(tmp_path: Path, change: Callable[[Path], str]) -> None:
    folder = source(tmp_path / "source", ["vocab.txt"])
    known = SideFiles(folder).names
    assert known == ["vocab.txt"]
    match = change(folder)
    with pytest.warns(BitwrightWarning, match=match) as given, Checkpoint(folder) as checkpoint:
        names = side_files(checkpoint)
    assert len(given) == 1
    assert str(given[0].message).isprintable()
    assert len(names) <= 1000
    assert sum((folder / name).stat().st_size for name in names) <= 512 << 20
    assert not any(name.startswith(("code/..", "/")) for name in names)


def test_files_around_a_gguf_file(tmp_path: Path) -> None:
    """Beside one that is alone are other people's files; by a config.json of its model they are its own."""
    folder = tmp_path / "downloads"
    options: dict[str, Any] = {"format": "gguf", "bits": 8, "grid": "symmetric"}
    bitwright.quantize(bitwright.demo_folder(), folder, "rtn", progress=False, **options)
    put(folder, ["thesis.txt", "own/code.py"])
    bitwright.convert(folder / "model.gguf", folder / "own" / "out", "float", progress=False)
    written = names_in(folder / "own" / "out")
    assert {"thesis.txt", "own/code.py", "tokenizer.json"} <= set(written)
    bitwright.convert(
        folder / "model.gguf", folder / "own" / "out", "float", progress=False, overwrite=True
    )
    assert names_in(folder / "own" / "out") == written
    shutil.rmtree(folder / "own" / "out")
    (folder / "config.json").unlink()
    bitwright.convert(folder / "model.gguf", tmp_path / "alone", "float", progress=False)
    kept = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert names_in(tmp_path / "alone") == sorted(
        ["README.md", "config.json", "model.safetensors", "report.json", *kept]
    )
    (tmp_path / "lone").mkdir()
    shutil.copy(folder / "model.gguf", tmp_path / "lone")
    bitwright.convert(tmp_path / "lone" / "model.gguf", tmp_path / "none", "float", progress=False)
    assert names_in(tmp_path / "none") == [
        "README.md",
        "config.json",
        "model.safetensors",
        "report.json",
    ]


def test_an_output_with_folders_is_overwritten(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", [*CODE, *SENSES])
    for _ in range(2):
        bitwright.quantize(
            folder, tmp_path / "out", "rtn", 4, 32, "mlx", progress=False, overwrite=True
        )
    before = names_in(tmp_path / "out")
    assert {*CODE, *SENSES} < set(before)


@pytest.mark.parametrize("name", ["own/thesis.txt", "notes/1.txt", "own/layers/.git/config"])
def test_other_peoples_folders_are_not(tmp_path: Path, name: str) -> None:
    folder = source(tmp_path / "source", CODE)
    quantized(folder, tmp_path / "out")
    put(tmp_path / "out", [name])
    before = names_in(tmp_path / "out")
    with pytest.raises(OutputError, match="holds a folder, .*so it is not overwritten"):
        bitwright.quantize(
            folder, tmp_path / "out", "rtn", 4, 32, "mlx", progress=False, overwrite=True
        )
    assert names_in(tmp_path / "out") == before


def test_a_run_killed_at_its_end_goes_on(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", [*CODE, *SENSES])
    out = tmp_path / "out"
    with Checkpoint(folder) as known, WorkFolder(out) as work:
        first = CheckpointWriter(out, work=work).__enter__()
        for name in known.names():
            first.add(name, known.read(name))
        state = first.state()
        copy_side_files(known, first)
        with CheckpointWriter(out, work=work) as second:
            second.restore(state)
            second.write_json("config.json", known.config)
            copy_side_files(known, second)
    assert set(names_in(out)) == {*CODE, *SENSES, "config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "a//b", "a/.", "a/", "a\\b/c", ""])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError), CheckpointWriter(tmp_path / "out") as writer:
        writer.add_file(tmp_path / "file", name)
    assert names_in(tmp_path) == ["file"]


def test_a_file_that_cannot_be_copied(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", CODE)
    for name in ("own", "own/x/model.safetensors", "own/x"):
        writer = CheckpointWriter(tmp_path / "out")

        def copy(into: CheckpointWriter, name: str) -> None:
            with into:
                into.add_file(folder / "modeling_own.py", "own/x")
                into.add_file(folder / "modeling_own.py", name)

        with pytest.raises((OutputError, CheckpointError), match="own"):
            copy(writer, name)
        assert not (tmp_path / "out").exists()
