"""The special tokens that a tokenizer puts before every text: BOS, several, or none."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer


def first_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before a text when it encodes it with special tokens.

    The post-processor in tokenizer.json decides, as in transformers from version 5 on:
    ``add_bos_token`` in tokenizer_config.json only counts where there is no tokenizer.json. What is
    put behind a text is left out.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        Any.

    Returns
    -------
    tuple of int
        Empty where nothing is put first.

    Examples
    --------
    >>> from tokenizers import models, processors
    >>> tokenizer = Tokenizer(models.BPE())
    >>> tokenizer.post_processor = processors.TemplateProcessing(
    ...     single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    ... )
    >>> first_tokens(tokenizer)
    (1,)
    """
    processor = tokenizer.post_processor
    return () if processor is None else _first(json.loads(processor.__getstate__()))


def _first(processor: Mapping[str, Any]) -> tuple[int, ...]:
    match processor["type"]:
        case "Sequence":
            # Where more than one adds tokens, the library leaves out those of the later ones.
            return next(filter(None, map(_first, processor["processors"])), ())
        case "TemplateProcessing":
            ids: list[int] = []
            for piece in processor["single"]:
                if "SpecialToken" not in piece:
                    return tuple(ids)
                ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            return ()  # a template without a place for the text
        case "BertProcessing" | "RobertaProcessing":
            return (int(processor["cls"][1]),)
    return ()
