"""Reading token by token gives what reading all at once gives, in every kind of block."""

from pathlib import Path

import numpy as np
import pytest
from shared_data import TINY

import bitwright
from bitwright.generation.session import ContextError, Session

DEMO = bitwright.demo_folder()
KINDS = [
    *("llama", "gemma2", "gemma3", "mistral", "phi3", "qwen3", "olmo2", "cohere2"),
    *("deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_5", "qwen3_next"),
    *("lfm2", "bamba", "granitemoehybrid", "gemma4"),
]
FOLDERS = [each for each in TINY if each.name.split("-")[0] in KINDS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda each: each.name)
def test_a_cache_changes_no_logits(folder: Path) -> None:
    model = bitwright.load_model(folder)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 24)
    expected = model.logits(ids[None])[0]
    session = Session(model)
    found = [session.logits(session.read([int(each) for each in ids[:9]]))]
    found += [session.logits(session.read([int(each)])) for each in ids[9:17]]
    mark = session.mark()
    session.read([1, 2, 3])
    session.back(mark)
    found.append(session.logits(session.read([int(each) for each in ids[17:]])))
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-5 * max(1, largest))


def test_most_kinds_of_blocks_are_there() -> None:
    assert len(FOLDERS) >= 12


def test_longer_than_a_piece_and_than_the_room_at_first() -> None:
    model = bitwright.load_model(DEMO)
    ids = [int(each) for each in np.random.default_rng(1).integers(0, 512, 256)]
    session = Session(model)
    got = np.concatenate([session.logits(session.read(part)) for part in (ids[:200], ids[200:])])
    np.testing.assert_allclose(got, model.logits([ids])[0], atol=2e-4)


def test_what_is_known_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session, read = Session(bitwright.load_model(DEMO)), []
    plain = session.read
    monkeypatch.setattr(session, "read", lambda ids: (read.append(list(ids)), plain(ids))[1])
    first = session.goes_on_to([5, 6, 7])
    session.goes_on_to([5, 6, 8, 9])
    again = session.goes_on_to([5, 6, 7])
    assert read == [[5, 6, 7], [8, 9], [7]]
    np.testing.assert_allclose(first, again, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_models(bits: int, tmp_path: Path) -> None:
    out = tmp_path / "q"
    bitwright.quantize(DEMO, out, "rtn", bits, 64, embedding_bits=8, progress=False)
    model = bitwright.load_model(out)
    session = Session(model)
    got = [session.logits(session.read(part)) for part in ([3, 4, 5], [6], [7])]
    expected = model.logits([[3, 4, 5, 6, 7]])[0]
    np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "given"),
    [
        ("gguf", {"bits": "Q5_0"}),
        ("gptq", {"bits": 4}),
        ("awq", {"bits": 4}),
        ("compressed-tensors", {"bits": "mxfp4"}),
    ],
)
def test_formats(format: str, given: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "q"
    bitwright.quantize(DEMO, out, "rtn", format=format, progress=False, **given)
    model = bitwright.load_model(out)
    session = Session(model)
    got = [session.logits(session.read(part)) for part in ([3, 4, 5], [6], [7])]
    expected = model.logits([[3, 4, 5, 6, 7]])[0]
    np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-4)


def test_longrope_turns_at_its_original_length() -> None:
    model = bitwright.load_model(next(each for each in TINY if each.name == "phi3-longrope"))
    turn = model.config.rope.original_max_position_embeddings or 0
    assert 2 < turn < model.positions
    session = Session(model)
    ids = [int(each) for each in np.random.default_rng(0).integers(0, 90, turn + 2)]
    session.read(ids[: turn - 1])
    for place in range(turn - 1, turn + 2):
        got = session.next_logits([ids[place]])
        expected = model.logits([ids[: place + 1]])[0, -1]
        np.testing.assert_allclose(got, expected, atol=2e-4)
    got = session.goes_on_to(ids[: turn - 1])
    np.testing.assert_allclose(got, model.logits([ids[: turn - 1]])[0, -1], atol=2e-4)


def test_a_text_longer_than_the_context() -> None:
    session = Session(bitwright.load_model(DEMO))
    with pytest.raises(ContextError, match=r"1000 tokens are more than the \d+ that the model"):
        session.read([1] * 1000)
