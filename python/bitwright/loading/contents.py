"""The contents of a folder, judged by its tensors: names, a separate head, and unused tensors."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from bitwright.checkpoint import Checkpoint, GgufCheckpoint
from bitwright.errors import CheckpointError, shown
from bitwright.models.architecture import Names
from bitwright.warned import warn

COMPARED_BYTES = 8 << 20  # of each of two matrices at a time
SHOWN_NAMES = 3
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")  # of a decoder, within it
_FIRST_LAYER = re.compile(r"(?:^|(?<=\.))layers\.0\.")
_MATRIX = ("weight", "qweight", "weight_packed", "B")
# Follow from config.json, or belong to what engines do beside the model.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|position_ids)$"
)
_KINDS = (
    (r"(^|\.)(mtp|nextn)\w*\.|\.(eh_proj|enorm|hnorm|shared_head)\.", "multi-token prediction"),
    (
        r"(^|\.)(vision|visual|audio|image|multi_modal|mm_)\w*\.|(^|\.)embed_(vision|audio)\.",
        "images or sound",
    ),
    (
        r"(^|\.)(score|classifier|classification_head|v_head|value_head|qa_outputs)\.",
        "a head that classifies",
    ),
    (r"lora_|\.modules_to_save\.", "an adapter that was not merged"),
    (r"scale(_inv|_2)?$|\.(scales|biases|qzeros|g_idx|absmax)$", "scales of a quantization"),
    (r"\.bias$", "biases that config.json denies"),
)
MORE_LAYERS = "layers beyond num_hidden_layers (multi-token prediction)"


def settle_names(checkpoint: Checkpoint, names: Names) -> None:
    """Rename the decoder's tensors to the names of its family, whatever prefix they are stored under.

    Raises
    ------
    CheckpointError
        If two decoders could be meant, or two tensors would have one name.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return
    stored, base = checkpoint.names(), names.embedding.removesuffix(_PARTS[0])
    prefixes = decoder_prefixes(stored)
    if base in prefixes or not prefixes:
        return
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{checkpoint.folder}: holds several decoders, {', '.join(map(shown, prefixes[:3]))}, and none "
            f"of them under {base}; keep the one that is meant"
        )
    (prefix,) = prefixes
    parts = tuple(f"{prefix}{part}." for part in _PARTS)
    renamed = {name: base + name[len(prefix) :] for name in stored if name.startswith(parts)}
    outer = prefix.removesuffix("model.") if f".{prefix}".endswith(".model.") else prefix
    for head in dict.fromkeys((f"{outer}lm_head.", "lm_head.", f"{prefix}lm_head.")):
        own = [name for name in stored if name.startswith(head)]
        if own:
            renamed |= {name: f"{names.head}.{name[len(head) :]}" for name in own}
            break
    if prefix.startswith("model.") and not base.startswith("model."):
        # Either all parts of a multimodal model share a prefix, or none does.
        others = (name for name in stored if name.startswith("model.") and name not in renamed)
        renamed |= {name: name.removeprefix("model.") for name in others}
    elif base.startswith("model.") and base != "model.":
        others = (name for name in stored if not name.startswith("model.") and name not in renamed)
        for name in others:
            if names.tower is not None and name.startswith("vision_tower."):
                renamed[name] = f"{names.tower}.{name.removeprefix('vision_tower.')}"
            elif re.search(_KINDS[1][0], name):
                renamed[name] = f"model.{name}"
    checkpoint.rename(renamed)
    checkpoint.config = _with_names(checkpoint.config, renamed)


def decoder_prefixes(stored: Collection[str]) -> list[str]:
    """Return what precedes ``layers`` and ``embed_tokens`` (or ``norm`` where a tied embedding is stored as
    the head) in the names of tensors."""
    known = set(stored)
    layers = {name[: match.start()] for name in known if (match := _FIRST_LAYER.search(name))}
    for end in ("embed_tokens", "norm"):
        found = [
            prefix
            for prefix in sorted(layers)
            if any(f"{prefix}{end}.{part}" in known for part in _MATRIX)
            and not re.search(_KINDS[0][0], prefix)
        ]
        if found:
            return found
    return []


def _with_names(config: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return config.json with the new names of layers where it speaks of their quantization."""
    layers = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in renamed.items()}

    def name(key: str, value: Any) -> str:
        # GPTQ and AWQ say by the option lm_head whether the head is quantized: that is no layer's name.
        is_option = "." not in key and isinstance(value, bool)
        return key if is_option else layers.get(key, key)

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name(key, each): changed(each) for key, each in value.items()}
        return value

    keys = ("quantization", "quantization_config")
    return {key: changed(value) if key in keys else value for key, value in config.items()}


def is_stored(checkpoint: Checkpoint, layer: str) -> bool:
    """Tell whether a matrix is stored, in float or packed."""
    return any(f"{layer}.{part}" in checkpoint for part in _MATRIX)


def has_own_head(checkpoint: Checkpoint, names: Names) -> bool:
    """Tell whether a head is stored that differs from the embedding in any value."""
    if isinstance(checkpoint, GgufCheckpoint):
        return False
    head, embedding = (_parts(checkpoint, name) for name in (names.head, names.embedding))
    if not (is_stored(checkpoint, names.head) and is_stored(checkpoint, names.embedding)):
        return False
    return head.keys() != embedding.keys() or not all(
        _equal(checkpoint, head[part], embedding[part]) for part in head
    )


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json for embedding and head that are two matrices."""
    changed = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict):
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def warn_of_head(checkpoint: Checkpoint, head: str) -> None:
    """Warn that the stored head is used, not the embedding."""
    warn(
        f"{checkpoint.folder}: config.json says that embedding and head are one matrix "
        f"(tie_word_embeddings), but {head}.weight is stored and differs; it is used, as transformers "
        f"does, and what is written says false"
    )


def _parts(checkpoint: Checkpoint, layer: str) -> dict[str, str]:
    """Return the tensors of a layer by the ends of their names; biases are none of the matrix."""
    prefix = f"{layer}."
    return {
        name.removeprefix(prefix): name
        for name in checkpoint.names()
        if name.startswith(prefix) and name != f"{layer}.bias"
    }


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Compare two tensors, some rows at a time; of the same dtype bit by bit."""
    shape, dtypes = checkpoint.shape(one), {checkpoint.dtype(name) for name in (one, other)}
    if shape != checkpoint.shape(other):
        return False
    if not shape:
        return bool(checkpoint.read(one) == checkpoint.read(other))
    widest = max(each.itemsize for each in dtypes)
    step = max(1, COMPARED_BYTES // max(1, int(np.prod(shape[1:])) * widest))
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        rows, others = (checkpoint.read_rows(name, first, last) for name in (one, other))
        if len(dtypes) == 1:
            rows, others = rows.view(np.uint8), others.view(np.uint8)
        else:
            rows, others = rows.astype(np.float64), others.astype(np.float64)
        if not np.array_equal(rows, others):
            return False
    return True


def kinds_of(names: Collection[str], block: str, blocks: int) -> list[str]:
    """Return the likely purpose of unused tensors, from their names."""
    layer = re.compile(re.escape(block).replace(r"\{\}", r"(\d+)") + r"\.")
    found: dict[str, None] = {}
    for name in names:
        match = layer.match(name)
        if match and int(match[1]) >= blocks:
            found[MORE_LAYERS] = None
            continue
        kinds = (kind for pattern, kind in _KINDS if re.search(pattern, name))
        found[next(kinds, "of unknown use")] = None
    return list(found)


def without_harmless(checkpoint: Checkpoint, names: Collection[str]) -> list[str]:
    """Return those of some tensors that could have changed what is computed: no buffer that follows from
    config.json, no bias of zeros."""
    return [
        name
        for name in names
        if not _HARMLESS.search(name)
        and not (name.endswith(".bias") and not checkpoint.read(name).astype(np.float32).any())
    ]


def warn_of_unused(checkpoint: Checkpoint, names: Collection[str], kinds: Collection[str]) -> None:
    """Name the unused tensors in one warning."""
    if not names:
        return
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN_NAMES} more" if len(ordered) > SHOWN_NAMES else ""
    warn(
        f"{checkpoint.folder}: nothing computes with {len(ordered)} of the tensors: "
        f"{', '.join(map(shown, ordered[:SHOWN_NAMES]))}{more}; they seem to be: {', '.join(kinds)}. They "
        f"are carried along as they are, but left out where the engine refuses names that it does not "
        f"know (mlx, gguf)"
    )
