"""Logits and hidden states against what transformers computes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from shared_data import SHARED, TESTS, needs_shared

import bitwright
from bitwright.models import rope

TINY = sorted((TESTS / "data").glob("llama-*"))


@pytest.mark.parametrize("folder", TINY, ids=lambda folder: folder.name)
def test_logits_equal_transformers(folder: Path) -> None:
    expected = np.load(folder / "expected.npz")
    logits = bitwright.load_model(folder).logits(expected["input_ids"])
    assert logits.dtype == np.float32
    assert np.abs(logits - expected["logits"]).max() < 2e-4


def assert_equals_expected(name: str) -> None:
    folder = SHARED / "models" / "arch" / name
    expected = np.load(folder / "expected.npz")
    model = bitwright.load_model(folder)
    for index, hidden in enumerate(model.hidden_states(expected["input_ids"])):
        assert np.abs(hidden - expected[f"hidden_{index}"]).max() < 2e-4
    assert np.abs(model.logits(expected["input_ids"]) - expected["logits"]).max() < 2e-4


@needs_shared
def test_shared_llama() -> None:
    assert_equals_expected("llama")


@needs_shared
def test_shared_llama_with_scaled_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference was computed by a model cast to bfloat16 as a whole, its rotary frequencies with it; a
    model that transformers loads keeps them in float32 (tests/data/llama-llama3). So this one case
    rounds them first."""
    exact = rope.rope_frequencies

    def rounded(*arguments: object) -> object:
        frequencies, factor = exact(*arguments)  # type: ignore[arg-type]
        return frequencies.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64), factor

    monkeypatch.setattr(rope, "rope_frequencies", rounded)
    assert_equals_expected("llama-rope-scaled")


@needs_shared
def test_story_is_tied_through_its_head() -> None:
    model = bitwright.load_model(SHARED / "models" / "story")
    assert model.tied
    assert model.embedding_name == "lm_head"
    result = bitwright.evaluate(model, SHARED / "text" / "story_eval.npy")
    assert result.perplexity == pytest.approx(16.35, abs=0.01)


def test_long_inputs_equal_short_ones() -> None:
    """A token's logits do not depend on what follows it, nor on the batch it is in."""
    model = bitwright.load_model(TINY[0])
    ids = np.random.default_rng(0).integers(0, 96, (3, 100))
    whole = model.logits(ids)
    for length in (1, 2, 63, 64, 65):
        part = model.logits(ids[1:2, :length])
        np.testing.assert_allclose(part[0], whole[1, :length], atol=2e-5)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([[0.5]], TypeError),
        ([1, 2], ValueError),
        ([[]], TypeError),
        ([[-1]], ValueError),
        ([[96]], ValueError),
    ],
)
def test_wrong_ids_are_named(ids: list[object], error: type[Exception]) -> None:
    with pytest.raises(error, match="input_ids"):
        bitwright.load_model(TINY[0]).logits(ids)  # type: ignore[arg-type]
