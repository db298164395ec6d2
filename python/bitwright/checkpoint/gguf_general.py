"""What a GGUF file says of a model in general, as llama.cpp's converter takes it from other files."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.checkpoint.front_matter import front_matter
from bitwright.checkpoint.gguf_file import TensorInfo, weights_per_block
from bitwright.checkpoint.reader import read_json_object
from bitwright.files.links import check_own

# Keys of generation_config.json, and the ends of those of GGUF; integers there are int32.
_SAMPLING = {
    "sequence": "sequence",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "temperature": "temp",
    "penalty_last_n": "penalty_last_n",
    "repetition_penalty": "penalty_repeat",
    "penalty_repeat": "penalty_repeat",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
_INTEGERS = ("top_k", "penalty_last_n", "mirostat")
_LICENCE = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
}
_LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}
_SOURCES = {"base_model": ("base_model", "base_models"), "dataset": ("datasets", "dataset")}


def general_metadata(folder: Path) -> dict[str, Any]:
    """Describe a model by what its model card and its generation_config.json say.

    Parameters
    ----------
    folder : pathlib.Path
        Where these are, if there are any.

    Returns
    -------
    dict
        Keys that begin with ``general.``; the name is the folder's where the card has none.

    Raises
    ------
    CheckpointError
        If generation_config.json is damaged.
    """
    card = front_matter(folder)
    name = next((card[key][0] for key in ("name", "model_name") if key in card), None)
    values: dict[str, Any] = {"general.name": name or _title(folder.resolve().name)}
    values |= _sampling(folder)
    values |= {
        f"general.{key}": ",".join(card[entry]) for entry, key in _LICENCE.items() if entry in card
    }
    for kind, names in _SOURCES.items():
        found = next((card[key] for key in names if key in card), [])
        values |= _sources(kind, found)
    for key, names in _LISTS.items():
        listed = [each for name in names for each in card.get(name, ())]
        values |= {f"general.{key}": listed} if listed else {}
    return values


def size_label(tensors: Iterable[TensorInfo]) -> str:
    """Say how large a model is, as llama.cpp does: weights that every token passes and one expert's, and
    how many experts there are.

    Examples
    --------
    >>> size_label([TensorInfo("token_embd.weight", np.dtype("<f4"), (512, 256))])
    '131K'
    """
    shared = one = total = 0
    counts = []
    for each in tensors:
        weights = math.prod(each.shape) * weights_per_block(each.dtype)
        total += weights
        if "_exps." in each.name and len(each.shape) == 3:
            one += weights // each.shape[0]
            counts.append(each.shape[0])
        else:
            shared += weights
    if not counts:
        return _rounded(total)
    return f"{sum(counts) // len(counts)}x{_rounded(shared + one)}"


def _rounded(count: int) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count > unit or letter == "K":
            scaled = count / unit
            digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
            return f"{scaled:.{digits}f}{letter}"
    raise AssertionError


def _sampling(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    check_own(path, folder)
    if not path.is_file():
        return {}
    said: Mapping[str, Any] = read_json_object(path)
    values: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value = said.get(key)
        if name == "sequence" and isinstance(value, str):
            values[f"general.sampling.{name}"] = value
        elif name in _INTEGERS and type(value) is int and abs(value) < 1 << 31:
            values[f"general.sampling.{name}"] = np.int32(value)
        elif name not in (*_INTEGERS, "sequence") and _is_number(value):
            values[f"general.sampling.{name}"] = float(said[key])
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e30


def _sources(kind: str, names: list[str]) -> dict[str, Any]:
    """Describe what a model was made from, by addresses or names at the hub."""
    values: dict[str, Any] = {f"general.{kind}.count": len(names)} if names else {}
    for number, name in enumerate(names):
        prefix = f"general.{kind}.{number}."
        hub = re.fullmatch(r"(?:https?://huggingface\.co/)?([^/\s:]+)/([^/\s:]+)", name)
        if hub:
            values[f"{prefix}name"] = _title(hub[2])
            values[f"{prefix}organization"] = _title(hub[1])
            values[f"{prefix}repo_url"] = f"https://huggingface.co/{hub[1]}/{hub[2]}"
        elif "://" in name:
            values[f"{prefix}repo_url"] = name
        else:
            values[f"{prefix}name"] = _title(name)
    return values


def _title(name: str) -> str:
    """Write the name of a repository as people do: small words with a capital, others as they are."""
    words = name.replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not re.fullmatch(r"v\d+(\.\d+)*|\d.*", word) else word
        for word in words
    )
