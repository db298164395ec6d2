"""Text from a model: what is chosen, when it ends, and how it is shown."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

import bitwright
from bitwright.generation.sampling import Sampler
from bitwright.generation.stream import TextStream

DEMO = bitwright.demo_folder()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitwright", *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    folder = tmp_path / "chatty"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_the_likeliest_tokens_of_the_whole_model() -> None:
    model, pieces = bitwright.load_model(DEMO), list[str]()
    said = bitwright.generate(DEMO, "Once upon a time", max_tokens=6, on_text=pieces.append)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode("Once upon a time").ids
    for token in said.tokens:
        assert int(model.logits([ids])[0, -1].argmax()) == token
        ids.append(token)
    assert "".join(pieces) == said.text
    assert said.prompt_tokens + len(said.tokens) == len(ids)


def test_the_seed_decides() -> None:
    def text(seed: int) -> str:
        given = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.95, "top_k": 100}
        return bitwright.generate(DEMO, "One day", seed=seed, **given).text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(3)}) > 1


def test_chances() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))

    def shares(**given: float) -> list[float]:
        sampler = Sampler(temperature=1.0, seed=3, **given)
        counts = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=4)
        return [round(float(each), 3) for each in counts / 4000]

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.9), [0.526, 0.316, 0.158, 0], atol=0.03)
    assert Sampler(0).choose(logits) == 0
    cold = Sampler(0.01, seed=1)
    assert {cold.choose(logits) for _ in range(50)} == {0}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_numbers_out_of_range(given: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        bitwright.generate(DEMO, "a", **given)


def test_characters_are_whole() -> None:
    text = "né €😀 x"
    alphabet = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteFallback()
    stream = TextStream(tokenizer, [])
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.rest() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)


def test_the_end_of_a_text(tmp_path: Path) -> None:
    said = bitwright.generate(DEMO, "Once upon a time", max_tokens=5)
    for name, content in (
        ("generation_config.json", {"eos_token_id": [said.tokens[2], 3]}),
        ("generation_config.json", {"eos_token_id": said.tokens[2]}),
    ):
        folder = tmp_path / "model"
        shutil.copytree(DEMO, folder, dirs_exist_ok=True)
        (folder / name).write_text(json.dumps(content))
        ended = bitwright.generate(folder, "Once upon a time", max_tokens=5)
        first = said.tokens.index(said.tokens[2])
        assert ended.ended
        assert ended.tokens == said.tokens[:first]


def test_prompts_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, but the model knows 256 pos"):
        bitwright.generate(DEMO, "word " * 3000)
    with pytest.raises(bitwright.CalibrationError, match=r"^prompt: has no tokens; write"):
        bitwright.generate(DEMO, "")


def test_a_chat_remembers(chatty: Path) -> None:
    chat = bitwright.Chat(chatty, "Be brief.")
    first = chat.say("Hello", max_tokens=4)
    second = chat.say("And?", max_tokens=4)
    assert [each["role"] for each in chat.messages] == ["system", *["user", "assistant"] * 2]
    whole = f"<system>Be brief.\n<user>Hello\n<assistant>{first.text}\n<user>And?\n<assistant>"
    assert bitwright.generate(chatty, whole, max_tokens=4, bos=False).text == second.text


def test_generate_as_a_command() -> None:
    done = run("generate", str(DEMO), "--prompt", "Once upon a time", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    expected = bitwright.generate(DEMO, "Once upon a time", max_tokens=8)
    assert done.stdout == expected.text + "\n"
    assert "tokens/s" in done.stderr
    words = ("--against", str(DEMO), "--json", "--max-tokens", "4")
    done = run("generate", str(DEMO), "--prompt", "Once", *words)
    found = json.loads(done.stdout)
    assert found["text"] == found["against"]["text"]


def test_chat_as_a_command(chatty: Path) -> None:
    done = run("chat", str(chatty), "--max-tokens", "4", text="Hello\nAnd?\n")
    assert done.returncode == 0, done.stderr
    chat = bitwright.Chat(chatty)
    assert done.stdout == "".join(f"{chat.say(each, 4).text}\n" for each in ("Hello", "And?"))
    done = run("chat", str(DEMO), text="Hello\n")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no chat template" in done.stderr
