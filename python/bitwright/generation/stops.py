"""The tokens that end a text."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitwright.loading.model import Model
from bitwright.text.template_files import json_object, special_tokens


def stop_tokens(model: Model, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a text: those of generation_config.json, or else of config.json, and the
    tokenizer's end-of-sequence token."""
    folder = Path(model.checkpoint.folder)
    tokens: set[int] = set()
    if folder.is_dir():
        tokens |= _ids(json_object(folder / "generation_config.json"))
        named = special_tokens(folder).get("eos_token")
        own = tokenizer.token_to_id(named) if isinstance(named, str) else None
        tokens |= set() if own is None else {own}
    if not tokens:
        config = model.checkpoint.config
        section = config.get("text_config")
        tokens = _ids(config) or (_ids(section) if isinstance(section, dict) else set())
    return frozenset(tokens)


def _ids(config: dict[str, Any]) -> set[int]:
    found = config.get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return {each for each in listed if isinstance(each, int) and not isinstance(each, bool)}
