"""What a stranger's folder links to does not get into anything that is written or said."""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import files
from shared_data import TESTS
from strangers import COMMANDS, GGUF, READ, SECONDS, SIDE, Run, given, link, put, quick, run
from tokenizers import Tokenizer

import bitwright
from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.side_files import SideFiles
from bitwright.errors import CalibrationError, CheckpointError
from bitwright.files.links import follow_links, leads_out
from bitwright.warned import BitwrightWarning

__all__ = ["quick", "run"]  # fixtures
SECRET = "xyzzy4711"
SHA = "0123456789abcdef" * 4
TINY = TESTS / "data" / "tiny" / "mistral"
SEEDS = 3


def tiny(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    return folder


# where links lead


def test_what_leads_out(tmp_path: Path) -> None:
    """Links within the folder do not, however they get there; all others do, however they are made."""
    model, outside = put(tmp_path / "model", {"a": "a", "own/b": "b"}), tmp_path / "outside"
    put(outside, {"c": "c", "folder/d": "d"})
    (outside / "back").symlink_to(model / "a")
    (outside / "again").symlink_to("folder/d")
    (tmp_path / "by_link").symlink_to(model)
    inside = {
        "within": "own/b",
        "up": "../model/a",
        "through": outside / "back",
        "itself": "itself",
    }
    out = {
        "absolute": outside / "c",
        "relative": "../outside/c",
        "chain": "absolute",
        "longer": outside / "again",
        "folder": outside / "folder",
        "nowhere": outside / "absent",
        "own/deep": "../../outside/c",
        "device": "/dev/zero",
        "process": "/proc/self/environ",
    }
    for name, target in {**inside, **out}.items():
        link(model / name, target)
    for folder in (model, tmp_path / "by_link", Path(os.path.relpath(model))):
        assert not any(leads_out(folder / name, folder) for name in ("a", "own/b", *inside))
        assert all(leads_out(folder / name, folder) for name in (*out, "folder/d", "../outside/c"))


def cached(hub: Path, name: str = "models--a--b") -> Path:
    """Return a snapshot in a cache as the hub's client makes it."""
    snapshot = hub / name / "snapshots" / "4f2c"
    for number, path in enumerate(sorted(TINY.iterdir())):
        blob = hub / name / "blobs" / (f"{number:x}" * 64)[:64]
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link(snapshot / path.name, f"../../blobs/{blob.name}")
    put(hub / name / "blobs", {"5" * 40: "You may.", SHA: "layers = 1"})
    link(snapshot / "LICENSE", "../../blobs/" + "5" * 40)
    link(snapshot / "own" / "layers.py", "../../../blobs/" + SHA)
    return snapshot


def plain(tmp_path: Path) -> Path:
    return cached(tmp_path / "hub")


def on_another_disk(tmp_path: Path) -> Path:
    cached(tmp_path / "disk" / "hub")
    return (
        link(tmp_path / "home", tmp_path / "disk") / "hub" / "models--a--b" / "snapshots" / "4f2c"
    )


def one_model_on_another_disk(tmp_path: Path) -> Path:
    """Where it has another name."""
    cached(tmp_path / "disk", "moved")
    return link(tmp_path / "hub" / "models--a--b", tmp_path / "disk/moved") / "snapshots" / "4f2c"


def link_to_a_snapshot(tmp_path: Path) -> Path:
    return link(tmp_path / "model", cached(tmp_path / "hub"))


def local_folder_with_links(tmp_path: Path) -> Path:
    """As older clients make it for --local-dir: large files are links into the cache."""
    local = tmp_path / "local"
    for path in cached(tmp_path / "hub").rglob("*"):
        if path.is_file():
            link(
                local / path.relative_to(tmp_path / "hub/models--a--b/snapshots/4f2c"),
                path.resolve(),
            )
    return local


def local_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(cached(tmp_path / "hub"), tmp_path / "local"))


LAYOUTS = [
    plain,
    on_another_disk,
    one_model_on_another_disk,
    link_to_a_snapshot,
    local_folder_with_links,
    local_folder,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", [(), ("--no-links",), ("--links",)])
def test_the_hubs_caches(
    tmp_path: Path, run: Run, layout: Callable[[Path], Path], option: tuple[str, ...]
) -> None:
    """Everything travels, without a warning, and links are followed into them whatever is asked for."""
    model, out = layout(tmp_path), tmp_path / "out"
    command = ("quantize", model, "--out", out, "--method", "rtn", "--group-size", "32", *option)
    assert run(*command)[:2] == (0, [])
    assert (out / "LICENSE").read_text() == "You may."
    assert (out / "own" / "layers.py").read_text() == "layers = 1"
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize(
    "name", ["models--a--b/blobs/LICENSE", f"models--a--b/{SHA}", f"blobs/{SHA}"]
)
def test_what_is_no_cache(tmp_path: Path, name: str) -> None:
    """A name alone makes none, nor does a blob that is a link itself."""
    model = tmp_path / "model"
    put(tmp_path, {name: SECRET, "secret": SECRET})
    assert leads_out(link(model / "LICENSE", tmp_path / name), model)
    snapshot = cached(tmp_path / "hub")
    link(tmp_path / "hub" / "models--a--b" / "blobs" / SHA, tmp_path / "secret")
    assert leads_out(snapshot / "own" / "layers.py", snapshot)
    other = tmp_path / "snapshots" / "4f2c"
    put(tmp_path / "blobs", {"1": SECRET})
    assert leads_out(link(other / "LICENSE", "../../blobs/1"), other)


def test_the_packages_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some installers make a link of each of a package's files."""
    model = tmp_path / "site-packages" / "bitwright" / "demo_data"
    for path in cached(tmp_path / "cache", "moved").iterdir():
        if path.is_file():
            link(model / path.name, path.resolve())
    with pytest.raises(CheckpointError, match="leads out"):
        Checkpoint(model)
    monkeypatch.setattr("bitwright.files.links.PACKAGE", model.parent)
    with follow_links(False), Checkpoint(model) as checkpoint:
        assert SideFiles(checkpoint.folder).missed == []
        assert "LICENSE" in SideFiles(checkpoint.folder).names


def test_settings_of_older_tools(tmp_path: Path, run: Run) -> None:
    """What they say of packed tensors comes from the folder, or from nowhere."""
    model = put(tmp_path / "model", files.packed()["gptq"])
    config = json.loads((model / "config.json").read_text())
    settings = json.dumps(config.pop("quantization_config"))
    put(tmp_path, {"model/config.json": json.dumps(config), "settings.json": settings})
    link(model / "quantize_config.json", tmp_path / "settings.json")
    code, lines, _ = run("inspect", model)
    assert (code, len(lines)) == (1, 1)
    assert f"{model}/quantize_config.json: leads out of its folder" in lines[0]
    assert run("inspect", model, "--links")[:2] == (0, [])


# what is done about them


def test_side_files_that_lead_out_are_named(tmp_path: Path, run: Run) -> None:
    """One line, in the report, too; the rest is copied."""
    model = put(tiny(tmp_path / "model"), SIDE)
    put(tmp_path / "outside", {"private": SECRET, "folder/x.py": SECRET})
    out = ["LICENSE", "modeling_own.py", "own/layers/attention.py", "tokenizer.json"]
    for name in out:
        link(model / name, tmp_path / "outside" / "private")
    with pytest.warns(BitwrightWarning) as given:
        report = bitwright.quantize(model, tmp_path / "q", "rtn", group_size=32, progress=False)
    assert [str(each.message) for each in given] == list(report.warnings)
    assert len(given) == 1
    assert "4 files or folders are not copied to the output (links out of" in report.warnings[0]
    assert all(f"'{name}'" in report.warnings[0] for name in out)
    copied = {path.relative_to(tmp_path / "q").as_posix() for path in (tmp_path / "q").rglob("*")}
    assert copied >= SIDE.keys() - set(out)
    assert not copied & set(out)
    command = ("quantize", model, "--method", "rtn", "--group-size", "32", "--out")
    code, lines, _ = run(*command, tmp_path / "all", "--links")
    assert (code, lines) == (0, [])
    assert all((tmp_path / "all" / name).read_text() == SECRET for name in out)
    code, lines, _ = run(*command, tmp_path / "none", "--no-links")
    assert (code, len(lines)) == (1, 1)
    assert f"{model}: 4 links lead out of it ('LICENSE', " in lines[0]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"],
)
def test_weights_may_lie_anywhere(tmp_path: Path, run: Run, name: str) -> None:
    """They and their index, unless links are refused."""
    several = name != "model.safetensors"
    model = (
        put(tmp_path / "model", files.shards()["three files"])
        if several
        else tiny(tmp_path / "model")
    )
    place = tmp_path / "elsewhere" / "weights"
    place.parent.mkdir()
    (model / name).rename(place)
    link(model / name, link(tmp_path / "chain", place))
    assert run("inspect", model)[:2] == (0, [])
    code, lines, _ = run("inspect", model, "--no-links")
    assert (code, len(lines)) == (1, 1)
    assert f"1 links lead out of it ('{name}')" in lines[0]
    with follow_links(False), pytest.raises(CheckpointError, match="1 links lead out"):
        Checkpoint(model)
    place.unlink()
    assert run("inspect", model)[0] == 1


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "own/w.safetensors", ".."])
@pytest.mark.parametrize("option", [(), ("--links",)])
def test_an_index_names_no_other_places(
    tmp_path: Path, run: Run, name: str, option: tuple[str, ...]
) -> None:
    model = put(tmp_path / "model", files.shards()["three files"])
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = name
    index.write_text(json.dumps(content))
    code, lines, _ = run("inspect", model, *option)
    assert (code, len(lines)) == (1, 1)
    assert "which is not the name of a file in this folder" in lines[0]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", *READ])
def test_what_is_read_is_refused_by_name(tmp_path: Path, run: Run, name: str) -> None:
    """Unless it is one's own; a card is only missed."""
    model = put(tmp_path / "model", {**files.wide(), **READ})
    put(tmp_path, {"elsewhere": (model / name).read_text()})
    link(model / name, tmp_path / "elsewhere")
    command = ("quantize", model, "--method", "rtn", *GGUF, "--out")
    code, lines, _ = run(*command, tmp_path / "out")
    assert len(lines) == 1
    if name == "README.md":
        assert code == 0
        assert "license: mit" not in (tmp_path / "out" / name).read_text()
        assert "not copied to the output (links out of the folder" in lines[0]
    else:
        assert code == 1
        assert f"{model / name}: leads out of its folder" in lines[0]
        assert "--links" in lines[0]
        assert not (tmp_path / "out").exists()
    code, lines, _ = run(*command, tmp_path / "all", "--links")
    assert (code, lines) == (0, [])


def test_tokenizers_and_templates_of_text(tmp_path: Path) -> None:
    """A folder that is given as the tokenizer is a stranger's, a file that is given one's own."""
    folder = put(tmp_path / "model", files.tokenizers()["in a file"])
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    link(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(CalibrationError, match=r"tokenizer\.json: leads out"):
        bitwright.load_tokens(folder / "text.txt", tokenizer=folder, length=4)
    known = bitwright.load_tokens(
        folder / "text.txt", tokenizer=folder / "tokenizer.json", length=4
    )
    with follow_links(True):
        again = bitwright.load_tokens(folder / "text.txt", tokenizer=folder, length=4)
    assert np.array_equal(known, again)
    (tmp_path / "tokenizer.json").replace(folder / "tokenizer.json")
    put(tmp_path, {"t/rag.jinja": SECRET, "template": SECRET})
    for name in (
        "additional_chat_templates",
        "additional_chat_templates/x.jinja",
        "chat_template.jinja",
    ):
        target = "t" if name.endswith("s") else "template"
        place = link(folder / name, tmp_path / target)
        with pytest.raises(CalibrationError, match=rf"{re.escape(str(place))}: leads out"):
            bitwright.load_tokens(folder / "chats.jsonl", tokenizer=folder, length=4)
        place.unlink()
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)


def test_gguf_files_that_are_links(tmp_path: Path, run: Run) -> None:
    """A file may be a link; what lies beside the link belongs to it only if it lies there."""
    made = files.gguf()["with config"]
    outside = put(tmp_path / "outside", {**made, "generation_config.json": f'{{"a": "{SECRET}"}}'})
    folder = tmp_path / "given"
    model = link(folder / "model.gguf", outside / "model.gguf")
    assert run("inspect", model)[:2] == (0, [])
    assert run("inspect", folder)[:2] == (0, [])
    link(folder / "generation_config.json", outside / "generation_config.json")
    convert = ("convert", model, "--format", "float", "--out")
    code, lines, _ = run(*convert, tmp_path / "out")
    assert (code, len(lines)) == (0, 1)
    assert "1 files or folders are not copied" in lines[0]
    assert not (tmp_path / "out" / "generation_config.json").exists()
    link(folder / "config.json", outside / "config.json")
    code, lines, _ = run(*convert, tmp_path / "out2")
    assert (code, len(lines)) == (0, 2)
    assert f"{folder}/config.json: leads out of its folder, so it is not looked at" in lines[0]
    assert run(*convert, tmp_path / "out3", "--links")[:2] == (0, [])
    for name in ("generation_config.json", "config.json", "model.gguf"):
        code, lines, _ = run(*convert, tmp_path / "none", "--no-links")
        assert (code, len(lines)) == (1, 1)
        assert f"{folder}: " in lines[0]
        assert "lead out of it ('model.gguf'" in lines[0]
        if name != "model.gguf":
            (folder / name).unlink()
    shutil.copy(outside / "model.gguf", link(model, outside / "copy"))
    model.unlink()
    (outside / "copy").rename(model)
    assert run(*convert, tmp_path / "out4", "--no-links")[:2] == (0, [])


def linked(path: Path, outside: Path) -> None:
    outside.mkdir(exist_ok=True)
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


@pytest.mark.parametrize("command", ["quantize", "merge", "dwq"])
def test_statistics_and_targets(tmp_path: Path, run: Run, command: str) -> None:
    """What tells of them is not taken from elsewhere; their arrays are, unless links are refused."""
    model, ids = put(tmp_path / "model", files.wide()), np.arange(96).reshape(6, 16)
    np.save(tmp_path / "ids.npy", ids)
    folder, out = tmp_path / "given", ("--out", tmp_path / "out")
    if command == "dwq":
        bitwright.quantize(model, tmp_path / "packed", "rtn", progress=False)
        bitwright.compute_dwq_targets(model, ids, folder, k=16)
        words: tuple[str | Path, ...] = (
            "dwq",
            tmp_path / "packed",
            "--reference",
            model,
        )
        words += (
            "--targets",
            folder,
            "--calibration",
            tmp_path / "ids.npy",
            "--tokens",
            "32",
            *out,
        )
        words += ("--validation-samples", "2")
    else:
        bitwright.collect_statistics(model, folder, ids, progress=False)
        merge = ("statistics", "merge", folder, *out)
        words = merge if command == "merge" else ("quantize", model, "--statistics", folder, *out)
    elsewhere = tmp_path / "elsewhere"
    manifest, arrays = next(folder.glob("*.json")), next(folder.glob("*.safetensors"))
    linked(arrays, elsewhere)
    code, lines, said = run(*words, "--no-links")
    assert (code, len(lines)) == (1, 1), said
    assert f"{folder}: 1 links lead out of it ('{arrays.name}')" in lines[0]
    assert not (tmp_path / "out").exists()
    linked(manifest, elsewhere)
    code, lines, said = run(*words)
    assert (code, len(lines)) == (1, 1), said
    assert f"{manifest}: leads out of its folder" in lines[0]
    assert "--links" in lines[0]
    assert not (tmp_path / "out").exists()
    assert run(*words, "--links")[0] == 0
    shutil.rmtree(tmp_path / "out")
    (elsewhere / manifest.name).replace(manifest)
    assert run(*words)[0] == 0


# everything at once

COPYING = ("rounded", "gptq", "gguf", "dynamic", "salient", "convert", "to gguf")


def stolen(outside: Path, model: Path) -> Path:
    """Other people's files, of every kind that a model has; each holds the secret and is sound."""
    config = json.loads((model / "config.json").read_text())
    known = Tokenizer.from_file(str(model / "tokenizer.json"))
    content = json.loads(known.to_str())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 511, "content": SECRET})
    return put(
        outside,
        {
            "config.json": json.dumps({**config, "architectures": [SECRET], "secret": SECRET}),
            "tokenizer.json": json.dumps(content),
            "tokenizer_config.json": json.dumps({"bos_token": SECRET, "secret": SECRET}),
            "special_tokens_map.json": json.dumps({"bos_token": SECRET}),
            "generation_config.json": json.dumps({"secret": SECRET}),
            "chat_template.jinja": SECRET,
            "README.md": f"---\nlicense: {SECRET}\nbase_model: {SECRET}/{SECRET}\n---\n{SECRET}\n",
            "modules.json": json.dumps([{"path": SECRET}]),
            "list.json": json.dumps([SECRET]),
            "text": f"password: {SECRET}\n" * 9,
            f"{SECRET}.jinja": SECRET,
            "folder/attention.py": SECRET,
            "folder/tool_use.jinja": SECRET,
        },
    )


def attacked(chance: random.Random, model: Path, outside: Path) -> set[str]:
    """Put up to four strange things into a model's folder; return the names of links out of it."""
    leading: set[str] = set()
    names = [*SIDE, *READ, "config.json", "tokenizer.json", "tokenizer_config.json", "COPYING", "own",
             "own/layers", "additional_chat_templates", "additional_chat_templates/rag.jinja", "a/b/c.py",
             "quantize_config.json", "adapter_config.json", "model.safetensors.index.json",
             "model.safetensors"]  # fmt: skip
    for number in range(chance.randint(1, 4)):
        name = chance.choice(names)
        if any(parent.is_symlink() for parent in (model / name).parents if parent != model.parent):
            continue
        kind = chance.choice(
            ["link", "link", "link", "fifo", "zeros", "sparse", "secret", "itself"]
        )
        same = outside / name
        target = same if same.is_file() and kind == "link" else outside / "text"
        if name in ("own", "own/layers", "additional_chat_templates"):
            target = outside / "folder"
        elif kind == "secret":
            target = outside / chance.choice(["list.json", "text", f"{SECRET}.jinja"])
        place = link(model / name, target)
        if kind in ("fifo", "sparse", "zeros", "itself"):
            place.unlink()
            odd = place if chance.random() < 0.5 else outside / f"{kind}-{number}"
            if kind == "fifo":
                os.mkfifo(odd)
            elif kind == "sparse":
                odd.touch()
                os.truncate(odd, 1 << 40)
            elif kind == "zeros":
                link(odd, "/dev/zero")
            else:
                link(odd, odd)
            if odd != place:
                link(place, odd)
        else:
            leading.add(name)
            form = chance.randrange(4)
            if form == 1:
                link(place, os.path.relpath(target, place.parent))
            elif form == 2:
                link(
                    place,
                    link(outside / f"chain-{number}", link(outside / f"next-{number}", target)),
                )
            elif form == 3 and target.is_file():
                link(model / f"by-{number}", target.parent)
                link(place, model / f"by-{number}" / target.name)
    return leading


def assert_no_secret(folder: Path, said: str) -> None:
    assert SECRET not in said
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("command", COMMANDS)
def test_sound_folders_pass(tmp_path: Path, run: Run, command: str) -> None:
    """What is attacked below works here, and asked not to follow links, too."""
    models = {"MODEL": put(tmp_path / "m", {**files.wide(), **SIDE, **READ}),
              "PACKED": put(tmp_path / "p", {**files.packed()["mlx"], **SIDE, **READ})}  # fmt: skip
    arguments = given(COMMANDS[command], models, tmp_path / "out")
    assert run(*arguments, "--no-links")[:2] == (0, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_from_outside_is_told(tmp_path: Path, run: Run, command: str) -> None:
    for seed in range(int(os.environ.get("SEEDS", SEEDS))):
        chance = random.Random(f"{command} {seed}")
        place = tmp_path / str(seed)
        sound = {"MODEL": files.wide(), "PACKED": files.packed()["mlx"]}
        models = {name: put(place / name, {**each, **SIDE, **READ}) for name, each in sound.items()}
        outside = stolen(place / "outside", models["MODEL"])
        victim = chance.choice([name for name in models if name in COMMANDS[command]])
        leading = attacked(chance, models[victim], outside)
        out = place / "out"
        arguments = given(COMMANDS[command], models, out)
        begun = time.monotonic()
        code, lines, said = run(*arguments)
        assert time.monotonic() - begun < SECONDS
        assert_no_secret(out, said)
        assert code in (0, 1), (seed, said)
        errors = [line for line in lines if not line.startswith("bitwright: warning: ")]
        assert len(errors) == code, (seed, said)
        assert all(map(str.isprintable, lines))
        if code == 1:
            assert str(models[victim]) in errors[0], (seed, said)
            assert not (out / "q").exists()
        elif command in COPYING:
            for name in leading & {*SIDE, "COPYING", "a/b/c.py"}:
                if os.path.realpath(models[victim] / name).startswith(str(outside)):
                    assert f"'{name}'" in said, (seed, name, said)
        code, lines, said = run(*given(COMMANDS[command], models, place / "none"), "--no-links")
        assert_no_secret(place / "none", said)
        if leading:
            assert code == 1
            assert f"{models[victim]}: " in lines[-1]
            assert "out of it (" in lines[-1]
