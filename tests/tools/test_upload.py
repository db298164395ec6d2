"""Outputs on a hub, which is a server on loopback."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as client
import pytest
import yaml
from hub_server import TOKEN, HubServer, client_of_server

import bitwright
from bitwright.cli.main import cli
from bitwright.errors import HubError

DEMO = bitwright.demo_folder()
# The hub's client itself, of large files without its own store.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with client_of_server(tmp_path, monkeypatch) as found:
        found.models["org/story", "main"] = DEMO
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def quantized(model: str | Path, out: Path) -> Path:
    bitwright.quantize(model, out, "rtn", progress=False)
    return out


def front(card: bytes) -> dict[str, object]:
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


def test_a_folder_as_it_is(hub: HubServer, tmp_path: Path) -> None:
    """What was made from a model of the hub names that truly."""
    out = quantized("org/story", tmp_path / "q")
    (out / ".notes").write_text("not for others")
    address = bitwright.upload(out, "me/story-4bit@trial")
    assert address.startswith(f"{hub.endpoint}/me/story-4bit/commit/")
    files = hub.uploaded["me/story-4bit"]
    assert set(files) == {path.name for path in out.iterdir()} - {".notes"}
    assert all((out / name).read_bytes() == content for name, content in files.items())
    assert front(files["README.md"])["base_model"] == "org/story"
    assert hub.branches == ["trial"]
    assert bitwright.upload(out, "me/story-4bit")  # which is there


@pytest.mark.parametrize("base", [None, "org/story"])
def test_the_original_is_true_or_not_told(hub: HubServer, tmp_path: Path, base: str | None) -> None:
    out = quantized(DEMO, tmp_path / "q")
    before = (out / "README.md").read_bytes()
    if base is None:
        with pytest.warns(bitwright.BitwrightWarning, match="the hub has no model 'demo_data'"):
            bitwright.upload(out, "me/q")
    else:
        bitwright.upload(out, "me/q", base_model=base)
    card = hub.uploaded["me/q"]["README.md"]
    assert front(card).get("base_model") == base
    assert card.decode().partition("\n---\n")[2] == before.decode().partition("\n---\n")[2]
    assert (out / "README.md").read_bytes() == before


def test_what_a_hub_refuses(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**given: str) -> str:
        with pytest.raises(HubError) as caught:
            bitwright.upload(DEMO, **{"name": "me/q", **given})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a name at the hub" in refused(name="q")
    assert "org/no: the hub has no such model" in refused(base_model="org/no")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not know the token. Log in" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "only from whom it knows. Log in" in refused()
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "HF_HUB_OFFLINE is set" in refused()
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", False)
    with pytest.raises(bitwright.CheckpointNotFoundError):
        bitwright.upload(tmp_path / "nothing", "me/q")
    assert not hub.uploaded


def test_commands(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        cli.main([*words], standalone_mode=False, obj=list(words))
        return capsys.readouterr().out

    made = ["quantize", "org/story", "--out", "q", "--method", "rtn", "--push-to", "me/first"]
    assert f"{hub.endpoint}/me/first/commit/" in run(*made)
    assert "config.json" in hub.uploaded["me/first"]
    assert run("upload", "q", "me/second").startswith(f"{hub.endpoint}/me/second/commit/")
    assert hub.uploaded["me/second"] == hub.uploaded["me/first"]


def test_who_may_not_is_told_before_anything_is_computed(hub: HubServer, tmp_path: Path) -> None:
    words = ["quantize", str(DEMO), "--out", "q", "--method", "rtn", "--push-to", "me/q"]
    done = subprocess.run(
        [sys.executable, "-m", "bitwright", *words],
        cwd=tmp_path,
        env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_wrong", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("bitwright: me/q: the hub does not know the token.")
    assert not (tmp_path / "q").exists()
