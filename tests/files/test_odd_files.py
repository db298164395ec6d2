"""Pipes, devices and endless files in the place of each file that commands read: refused by name."""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hostile import files
from strangers import FEW, GGUF, READ, SIDE, TEXT, Run, link, put, quick, run

import bitwright
from bitwright.checkpoint.gguf_file import TensorInfo, write_header
from bitwright.checkpoint.holes import hole_in_safetensors
from bitwright.distill.targets import DwqTargets
from bitwright.errors import CalibrationError
from bitwright.files.text_file import read_bytes

__all__ = ["quick", "run"]  # fixtures
PASSED_ON = ("LICENSE", "modules.json", "own/layers/attention.py", "README.md")
HUGE = 1 << 40
AT_ONCE = 3  # seconds, of which most go by before the file is looked at


def pipe(path: Path) -> None:
    """Behind a link, as strangers may have it."""
    os.mkfifo(path.with_name(f"{path.name}.pipe"))
    link(path, f"{path.name}.pipe")


def device(path: Path) -> None:
    link(path, "/dev/zero")


def endless(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE)


ODD = [pipe, device, endless]
# Each file, the command that reads it, and whether the command does without it.
QUANTIZE = ("quantize", "@model", "--out", "OUT", "--method", "rtn")
CHATS = ("evaluate", "@model", "--evaluation", "@chats.jsonl", *FEW)
TARGETS = (
    "dwq",
    "@packed",
    "--reference",
    "@model",
    "--out",
    "OUT",
    "--targets",
    "@targets",
    "--calibration",
    "@ids.npy",
    "--tokens",
    "64",
)
STATISTICS = (*QUANTIZE[:-1], "gptq", "--statistics", "@statistics", "--preset", "fast")
CALIBRATED = ("quantize", "@model", "--out", "OUT", *FEW, "--calibration")
SALIENT = (
    "salient",
    "@model",
    "--out",
    "OUT",
    "--activations",
    "@a.npz",
)
DYNAMIC = ("dynamic", "@model", "--out", "OUT", "--calibration", TEXT, *FEW, "--target-bpw", "4.5")
DWQ = ("dwq", "@model", "--out", "OUT", "--calibration", TEXT, "--length", "16")
IDS = (
    "dwq",
    "@packed",
    "--reference",
    "@model",
    *DWQ[2:4],
    "--calibration",
    "@ids.npy",
    "--tokens",
    "64",
)
GGUF_MADE = ("convert", "@gguf/model.gguf", "--out", "OUT", "--format", "float")
CASES: list[tuple[str, tuple[str, ...], bool]] = [
    ("model/config.json", ("inspect", "@model"), False),
    ("model/config.json", QUANTIZE, False),
    ("model/model.safetensors", ("inspect", "@model"), False),
    ("model/model.safetensors", QUANTIZE, False),
    ("shards/model.safetensors.index.json", ("inspect", "@shards"), False),
    ("shards/model-00002-of-00003.safetensors", ("inspect", "@shards"), False),
    ("gguf/model.gguf", ("inspect", "@gguf/model.gguf"), False),
    ("gguf/model.gguf", ("inspect", "@gguf"), False),
    ("gguf/config.json", GGUF_MADE, True),
    ("old/quantize_config.json", ("inspect", "@old"), False),
    ("model/tokenizer.json", ("evaluate", "@model", "--evaluation", TEXT, *FEW), False),
    ("model/tokenizer.json", (*QUANTIZE, *GGUF), False),
    ("model/tokenizer.json", QUANTIZE, True),
    ("model/tokenizer.json", IDS, True),
    ("model/tokenizer_config.json", CHATS, True),
    ("model/special_tokens_map.json", CHATS, True),
    ("model/chat_template.jinja", CHATS, True),
    ("model/additional_chat_templates/rag.jinja", CHATS, True),
    ("model/generation_config.json", (*QUANTIZE, *GGUF), True),
    *((f"model/{name}", QUANTIZE, True) for name in PASSED_ON),
    ("text.txt", (*CALIBRATED, "@text.txt"), False),
    ("chats.jsonl", (*CALIBRATED, "@chats.jsonl"), False),
    ("ids.npy", (*CALIBRATED, "@ids.npy"), False),
    ("text.txt", ("evaluate", "@model", "--evaluation", "@text.txt", *FEW), False),
    ("text.txt", ("sensitivities", "@model", "--out", "OUT", "--calibration", "@text.txt", *FEW), False),
    ("text.txt", ("statistics", "collect", "@model", "--out", "OUT", "--calibration", "@text.txt"), False),
    ("text.txt", ("refine", "@packed", "--reference", "@model", "--out", "OUT", "--calibration",
                  "@text.txt"), False),
    ("text.txt", (*DWQ, "--student-calibration", "@text.txt"), False),
    ("ids.npy", (*DWQ, "--student-calibration", "@ids.npy"), False),
    ("text.txt", (*TARGETS, "--validation", "@text.txt"), False),
    ("text.txt", (*SALIENT[:-1], "@b.npz", "--calibration", "@text.txt"), False),
    ("text.txt", (*DYNAMIC, "--evaluation", "@text.txt"), False),
    ("recipe.json", (*QUANTIZE, "--recipe", "@recipe.json"), False),
    ("recipe.json", (*DYNAMIC, "--recipe", "@recipe.json"), False),
    ("s.json", (*DYNAMIC, "--sensitivities", "@s.json"), False),
    ("s.json", ("sensitivities", "@model", "--out", "@s.json", "--calibration", TEXT, *FEW), False),
    ("plot.svg", ("sensitivities", "@model", "--out", "OUT", "--calibration", TEXT, *FEW, "--plot",
                  "@plot.svg"), False),
    ("plot.svg", (*TARGETS, "--plot", "@plot.svg"), False),
    ("statistics/MANIFEST", STATISTICS, False),
    ("statistics/FILE", STATISTICS, False),
    ("statistics/MANIFEST", ("statistics", "merge", "@statistics", "--out", "OUT"), False),
    ("statistics/FILE", ("statistics", "merge", "@statistics", "--out", "OUT"), False),
    ("targets/MANIFEST", TARGETS, False),
    ("targets/FILE", TARGETS, True),
    ("a.npz", SALIENT, False),
]  # fmt: skip


@cache
def kept() -> TemporaryDirectory[str]:
    """Sound files of every kind, made once."""
    scratch = TemporaryDirectory(prefix="sound-")
    place = Path(scratch.name)
    template = {"additional_chat_templates/rag.jinja": "{{ messages[0].content }}"}
    model = put(place / "model", {**files.wide(), **SIDE, **READ, **template})
    put(place / "shards", files.shards()["three files"])
    bitwright.quantize(model, place / "packed", "rtn", progress=False)
    bitwright.quantize(
        model, place / "gguf", "rtn", 8, 32, "gguf", grid="symmetric", progress=False
    )
    old = place / "old"
    bitwright.quantize(model, old, "rtn", 4, 128, "gptq", progress=False)
    config = json.loads((old / "config.json").read_text())
    (old / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (old / "config.json").write_text(json.dumps(config))
    ids = np.arange(256, dtype=np.int32).reshape(16, 16)
    np.save(place / "ids.npy", ids)
    chat = {"messages": [{"role": "user", "content": "Once upon a time there was a fox. " * 9}]}
    put(place, {"text.txt": Path(TEXT).read_text(), "chats.jsonl": f"{json.dumps(chat)}\n" * 9})
    bitwright.collect_statistics(model, place / "statistics", ids, progress=False)
    bitwright.compute_dwq_targets(model, ids, place / "targets", k=16)
    bitwright.collect_activations(model, place / "a.npz", ids)
    known = bitwright.estimate_sensitivities(model, ids, out=place / "s.json")
    bitwright.Recipe(dict.fromkeys(known.per_million, (4, 64)), 4.5, 4.5).save(
        place / "recipe.json"
    )
    bitwright.plot_sensitivities(known, place / "plot.svg")
    return scratch


def in_place(place: Path, word: str) -> Path:
    folder = place / word.partition("/")[0]
    match word.rpartition("/")[2]:
        case "MANIFEST":
            return next(folder.glob("*.json"))
        case "FILE":
            return next(folder.glob("*.safetensors"))
    return place / word


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    ("file", "command", "spared"), CASES, ids=[f"{file} {command[0]}" for file, command, _ in CASES]
)
def test_odd_files(
    tmp_path: Path,
    run: Run,
    odd: Callable[[Path], None],
    file: str,
    command: tuple[str, ...],
    spared: bool,
) -> None:
    place, out = tmp_path / "given", tmp_path / "out"
    known = {each.name for each in Path(kept().name).iterdir()}
    place.mkdir()
    for name in known:
        if any(word.lstrip("@").startswith(name) for word in (file, *command)):
            source = Path(kept().name) / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place / name)
    path = in_place(place, file)
    path.unlink()
    odd(path)
    words = [str(place / word[1:]) if word[0] == "@" else word for word in command]
    words = [word.replace("OUT", str(out)) for word in words]
    # Nobody's links, so that a device is met as such.
    follow = ("--links",) if odd is device and command[:2] != ("statistics", "merge") else ()
    begun = time.monotonic()
    code, lines, said = run(*words, *follow)
    taken = time.monotonic() - begun
    errors = [line for line in lines if not line.startswith("bitwright: warning: ")]
    assert len(errors) == code, said
    assert all(map(str.isprintable, lines))
    if code:
        assert str(path) in errors[0] or str(path.parent) in errors[0], said
        assert not os.path.lexists(out)
        assert taken < AT_ONCE, said
    else:
        assert spared, said
    if odd is endless and command == QUANTIZE and spared and path.name != "README.md":
        assert path.name in said, said


def grown(
    path: Path, name: str, shape: tuple[int, ...], written: int = 0, dtype: str = "F32"
) -> None:
    """Add a tensor to a safetensors file, of which only so many bytes are written; the rest is a hole."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header, held = json.loads(file.read(length)), size - 8 - length
        data = file.read(min(held, 1 << 23))
        end = held + int(dtype[-2:]) // 8 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [held, end]}
        text = json.dumps(header).encode()
        file.seek(0)
        file.truncate()
        file.write(len(text).to_bytes(8, "little") + text + data + b"a" * written)
        file.truncate(8 + len(text) + end)


def emptied(path: Path) -> None:
    """Have no more of a file than its header, with tensors of a terabyte."""
    with path.open("wb") as file:
        wide = TensorInfo("token_embd.weight", np.dtype("<f4"), (HUGE >> 12, 1 << 10))
        start = write_header(file, {"general.architecture": "llama"}, [wide])
        file.truncate(start + wide.nbytes)


@pytest.mark.parametrize("command", ["inspect", "quantize", "convert", "evaluate"])
@pytest.mark.parametrize(
    ("file", "written"),
    [("model/model.safetensors", 0), ("model/model.safetensors", 1 << 20),
     ("shards/model-00002-of-00003.safetensors", 0), ("gguf/model.gguf", 0)],
)  # fmt: skip
def test_tensors_in_holes(tmp_path: Path, run: Run, command: str, file: str, written: int) -> None:
    """A sound file that says it holds a terabyte and does not is refused by the name of the tensor."""
    folder = tmp_path / "given"
    shutil.copytree(Path(kept().name) / file.partition("/")[0], folder)
    path = folder / file.partition("/")[2]
    name = "token_embd.weight" if path.suffix == ".gguf" else "model.extra.weight"
    if path.suffix == ".gguf":
        emptied(path)
    else:
        grown(path, name, (HUGE >> 12, 1 << 10), written)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"][name] = path.name
        index.write_text(json.dumps(content))
    out = ("--out", tmp_path / "out")
    words = {
        "inspect": (),
        "quantize": (*out, "--method", "rtn", "--format", "gptq"),
        "convert": (*out, "--format", "float"),
        "evaluate": ("--evaluation", TEXT, *FEW),
    }
    code, lines, said = run(command, folder, *words[command])
    assert (code, len(lines)) == (1, 1), said
    assert f"{path}: has next to nothing of tensor '{name}', which lies in a hole" in lines[0]
    assert not (tmp_path / "out").exists()


def test_statistics_in_holes(tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(Path(kept().name) / "statistics", tmp_path / "statistics"))
    manifest, path = (
        in_place(tmp_path, "statistics/MANIFEST"),
        in_place(tmp_path, "statistics/FILE"),
    )
    content, channels = json.loads(manifest.read_text()), 1 << 19
    name, stage = next(iter(content["files"][path.name].items()))
    content["files"] = {path.name: {name: {**stage, "channels": channels}}}
    content["tensors"] = {}
    manifest.write_text(json.dumps(content))
    means = {"dtype": "F64", "shape": [channels], "data_offsets": [0, 8 * channels]}
    header = json.dumps({f"{name}.mean_abs": means}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 * channels))
    grown(path, f"{name}.gram", (channels, channels))
    code, lines, said = run("statistics", "merge", folder, "--out", tmp_path / "out")
    assert (code, len(lines)) == (1, 1), said
    assert f"{path}: has next to nothing of tensor '{name}.gram'" in lines[0]


def test_targets_in_holes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(kept().name) / "targets", tmp_path / "targets"))
    manifest, path = in_place(tmp_path, "targets/MANIFEST"), in_place(tmp_path, "targets/FILE")
    content, samples = json.loads(manifest.read_text()), 1 << 24
    length, k = content["length"], content["k"]
    manifest.write_text(json.dumps({**content, "samples": samples, "shard_samples": samples}))
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    for name, dtype, shape in (
        ("ids", "U16", (samples, length, k)),
        ("log_probabilities", "F16", (samples, length, k)),
        ("rest", "F32", (samples, length)),
        ("tokens", "I32", (samples, length)),
    ):
        grown(path, name, shape, dtype=dtype)
    with pytest.raises(
        bitwright.TargetsError, match=f"{path}: has next to nothing of tensor 'ids'"
    ):
        DwqTargets(folder)


@pytest.mark.parametrize("change", ["none", "less", "held", "unknown"])
def test_holes_that_harm_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Zeros that a copy has left out, tensors that are there, and file systems that tell of no holes."""
    path = Path(shutil.copyfile(Path(kept().name) / "model/model.safetensors", tmp_path / "m"))
    shape = (1 << 16, 1 << 10) if change == "less" else (1 << 20, 1 << 9)
    grown(path, "x", shape)
    if change == "none":
        assert "tensor 'x'" in str(hole_in_safetensors(path))
        return
    if change == "held":
        monkeypatch.setattr("bitwright.checkpoint.holes.LEAST_HELD", 1 << 40)
    if change == "unknown":

        def lseek(*_: int) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "lseek", lseek)
    assert hole_in_safetensors(path) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_files_that_do_not_tell_their_size() -> None:
    """Those of /proc are regular and empty by their size, and reading some of them waits for ever."""
    assert Path("/proc/self/status").read_bytes()
    assert read_bytes(Path("/proc/self/status"), 1 << 20) == b""
    with pytest.raises(CalibrationError, match="is not a regular file"):
        read_bytes(Path("/dev/zero"), 1 << 20)
