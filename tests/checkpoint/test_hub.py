"""Models by their names at a hub, which is a server on loopback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as client
import pytest
from hub_server import TOKEN, HubServer, client_of_server, commit_of

import bitwright
from bitwright import CheckpointNotFoundError, UnsupportedModelError
from bitwright.checkpoint.hub import HubName, model_place, needed_files

DEMO = bitwright.demo_folder()
NAME = "org/story"
USED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the demo model and much that nobody needs, and a client with an empty cache."""
    repository = tmp_path / "repository"
    shutil.copytree(DEMO, repository)
    for name in ("pytorch_model.bin", "onnx/model.onnx", "original/a.pth", ".gitattributes"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_bytes(b"0")
    (repository / "model.fp16.safetensors").write_bytes(b"0")
    with client_of_server(tmp_path, monkeypatch) as found:
        found.models[NAME, "main"] = repository
        yield found


def place(hub: HubServer, tmp_path: Path, name: str = NAME) -> Path:
    commit = commit_of(hub.models[name, "main"])
    return tmp_path / f"cache/models--{name.replace('/', '--')}/snapshots/{commit}"


def fails(name: str, kind: type[Exception] = CheckpointNotFoundError) -> str:
    with pytest.raises(kind) as caught:
        model_place(name)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(name)
    return said


def test_what_is_needed_is_fetched_once(hub: HubServer, tmp_path: Path) -> None:
    model = bitwright.load_model(NAME)
    assert model.checkpoint.folder == place(hub, tmp_path)
    assert set(hub.fetched) >= USED
    assert not {"pytorch_model.bin", "model.fp16.safetensors", ".gitattributes"} & set(hub.fetched)
    assert not [each for each in hub.fetched if "/" in each]
    hub.fetched.clear()
    assert model_place(NAME) == model_place(f"hf://{NAME}") == place(hub, tmp_path)
    assert hub.fetched == []


def test_a_revision_is_that_one(hub: HubServer, tmp_path: Path) -> None:
    other = Path(shutil.copytree(DEMO, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    hub.models[NAME, "v1/test"] = other
    assert bitwright.load_model(f"{NAME}@v1/test").checkpoint.config["rms_norm_eps"] == 0.25
    assert (
        bitwright.load_model(f"{NAME}@{commit_of(other)}").checkpoint.config["rms_norm_eps"] == 0.25
    )
    assert bitwright.load_model(NAME).checkpoint.config["rms_norm_eps"] != 0.25


def test_the_shards_of_an_index_are_fetched(hub: HubServer) -> None:
    repository = hub.models[NAME, "main"]
    (repository / "model.safetensors").rename(repository / "model-00001-of-00001.safetensors")
    (repository / "consolidated.safetensors").write_bytes(b"0")
    names = bitwright.load_model(DEMO).checkpoint.names()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bitwright.load_model(NAME).checkpoint.names() == names
    assert "consolidated.safetensors" not in hub.fetched


def test_gguf_files_by_their_names(hub: HubServer, tmp_path: Path) -> None:
    for bits in (4, 8):
        out = tmp_path / f"q{bits}"
        bitwright.quantize(DEMO, out, "rtn", bits, format="gguf", progress=False)
        (tmp_path / "ggufs").mkdir(exist_ok=True)
        shutil.copy(out / "model.gguf", tmp_path / "ggufs" / f"story-{bits}.gguf")
    hub.models["org/ggufs", "main"] = tmp_path / "ggufs"
    said = fails("org/ggufs", UnsupportedModelError)
    assert said.endswith("add the one that is meant, as NAME:story-4.gguf")
    assert hub.fetched == []
    assert bitwright.load_model("org/ggufs:story-8.gguf").format is not None
    assert hub.fetched == ["story-8.gguf"]
    with pytest.raises(CheckpointNotFoundError, match="org/ggufs: has no file 'no.gguf'"):
        model_place("org/ggufs:no.gguf")
    (tmp_path / "ggufs" / "story-8.gguf").unlink()
    assert model_place("org/ggufs").name == "story-4.gguf"


def test_an_interrupted_download_goes_on(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.cut = "model.safetensors"
    assert model_place(NAME) == place(hub, tmp_path)
    assert hub.ranges
    fetched = place(hub, tmp_path) / "model.safetensors"
    assert fetched.read_bytes() == (DEMO / "model.safetensors").read_bytes()


def test_what_is_cached_serves_without_a_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_place(NAME)
    hub.failing = 503
    with pytest.warns(bitwright.BitwrightWarning, match="org/story: the hub does not answer"):
        assert model_place(NAME) == place(hub, tmp_path)
    assert "the hub answers 503" in fails("org/other")
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    assert model_place(NAME) == place(hub, tmp_path)
    assert "HF_HUB_OFFLINE is set, and the cache" in fails("org/other")


def test_unknown_private_and_gated_models(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no model of that name at the hub" in fails("org/other")
    assert "the hub has no such revision" in fails(f"{NAME}@v9")
    hub.gated.add(NAME)
    assert "is gated: accept its conditions" in fails(NAME)
    hub.gated, hub.private = set(), {NAME}
    assert "If it is private, log in" in fails(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert bitwright.load_model(NAME).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    "pickle", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt"]
)
def test_pickles_are_refused_before_they_are_fetched(
    hub: HubServer, tmp_path: Path, pickle: str
) -> None:
    folder = tmp_path / "pickles"
    folder.mkdir()
    shutil.copy(DEMO / "config.json", folder)
    (folder / pickle).write_bytes(b"0")
    hub.models["org/old", "main"] = folder
    with pytest.raises(UnsupportedModelError) as caught:
        model_place("org/old@main")
    said = str(caught.value)
    assert "python -c" in said
    assert "from_pretrained('org/old', revision='main'" in said
    assert hub.fetched == []


def test_what_lies_here_counts_more(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    shutil.copytree(DEMO, tmp_path / NAME)
    assert model_place(NAME) == Path(NAME)
    said = fails("org/stori")
    assert "Is org/story meant?" in said
    assert said.endswith("To take the model of that name at the hub, write hf://org/stori")
    assert hub.fetched == []
    assert model_place(f"hf://{NAME}") == place(hub, tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("hf://org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        ("org/name@v1:a/b.gguf", HubName("org/name", "v1", "a/b.gguf")),
        ("a/b/c", None),
        ("./org/name", None),
        ("org/name:x.txt", None),
        ("org", None),
        ("../name", None),
    ],
)
def test_names(text: str, name: HubName | None) -> None:
    assert HubName.of(text) == name


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a-1.safetensors", "a-2.safetensors", "x.onnx"], ["a-1.safetensors", "a-2.safetensors"]),
        (["model.gguf", "imatrix.dat", "notes.md"], ["model.gguf", "notes.md"]),
        (
            ["model.safetensors", "model.gguf", "a/tokenizer.json"],
            ["a/tokenizer.json", "model.safetensors"],
        ),
    ],
)
def test_needed_files(names: list[str], wanted: list[str]) -> None:
    assert needed_files(dict.fromkeys(names, 1))[0] == wanted


def test_large_files_that_travel_are_left(hub: HubServer) -> None:
    assert needed_files({"model.safetensors": 1 << 40, "film.mp4": 1 << 30})[0] == [
        "model.safetensors"
    ]


def test_the_command_takes_names(hub: HubServer, tmp_path: Path) -> None:
    """In a process of its own, with the client's own variables; the card names the original truly."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    words = ["quantize", NAME, "--out", "q", "--method", "rtn"]
    done = subprocess.run(
        [sys.executable, "-m", "bitwright", *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr
    card = (tmp_path / "q" / "README.md").read_text()
    assert f"\nbase_model: {NAME}\n" in card
    assert f"bitwright quantize {NAME} --out q --method rtn" in card
