"""Logits and hidden states against what transformers computes."""

import numpy as np
import pytest
from shared_data import SHARED, TESTS, needs_shared

import bitwright

TINY = sorted((TESTS / "data" / "tiny").glob("llama-*"))


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
