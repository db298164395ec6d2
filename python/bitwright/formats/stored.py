"""The layout in which a folder's tensors are packed, whatever its config.json says."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitwright.checkpoint import Checkpoint, GgufCheckpoint
from bitwright.checkpoint.reader import read_json_object
from bitwright.checkpoint.shard import FLOATS_OF_8_BITS
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.files.links import check_own
from bitwright.models.config import MODEL_DTYPES, QUANTIZATION_KEYS, SEPARATE_FILES, float_config
from bitwright.warned import warn

_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size"}
_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scales")
_PACKED_PARTS = (*(f".{part}" for part in _SCALES), ".qweight", ".qzeros", ".weight_packed", ".B")
_OTHERS = {  # endings of names that only one tool writes
    "weight.absmax": "bitsandbytes",
    "weight.quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "W_q": "hqq",
    "trellis": "exl3",
    "q_weight": "exl2",
}


def settle_quantization(checkpoint: Checkpoint) -> str | None:
    """Make ``checkpoint.config`` agree with its tensors about quantization.

    Settings of older tools are taken from their files, and those that float tensors contradict are
    removed.

    Returns
    -------
    str or None
        What the tensors are packed as: the name of a format or another tool; None for floats, and
        where nobody knows.

    Raises
    ------
    CheckpointError
        If the tensors are packed, but nothing says how.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return "gguf"
    found = packing(checkpoint)
    config = checkpoint.config
    declared = _declarations(config)
    if not declared:
        name = next((n for n in SEPARATE_FILES if (checkpoint.folder / n).is_file()), None)
        if name is not None and found is None and _all_floats(checkpoint):
            _warn_of_leftover(checkpoint, name)
        elif name is not None and found in ("gptq", "awq", "marlin"):
            check_own(checkpoint.folder / name, checkpoint.folder)
            checkpoint.config = {
                **float_config(config),
                "quantization_config": _as_in_config(
                    found, read_json_object(checkpoint.folder / name)
                ),
            }
        elif found is not None and found != "mlx":
            tensor = _packed_tensor(checkpoint, found)
            raise UnsupportedModelError(
                f"{checkpoint.folder}: tensor {shown(tensor)} is packed as {found}, but neither "
                f'config.json ("quantization_config") nor {" nor ".join(SEPARATE_FILES)} says how. Add '
                f"what the tool that made it has written, or start from the original"
            )
    elif found is None and _all_floats(checkpoint):
        _warn_of_leftover(checkpoint, f'config.json ("{declared[0]}")')
        checkpoint.config = float_config(config)
    return found


def _declarations(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of config.json, or of its text part, that describe quantization."""
    text = config.get("text_config")
    parts = (("", config), ("text_config.", text if isinstance(text, dict) else {}))
    return [f"{name}{key}" for name, part in parts for key in QUANTIZATION_KEYS if part.get(key)]


def packing(checkpoint: Checkpoint) -> str | None:
    """Return the layout of the tensors; None for floats, and for unknown layouts."""
    for name in checkpoint.names():
        if kind := _packed_as(checkpoint, name):
            return kind
    return None


def check_packing(checkpoint: Checkpoint, declared: str, found: str | None) -> None:
    """Raise CheckpointError if config.json declares another format than the tensors are packed as."""
    if found == "fp8" and declared == "compressed-tensors":
        return  # which has more than one layout
    if found is not None and found != declared:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json declares the {declared} format, but tensor "
            f"{shown(_packed_tensor(checkpoint, found))} is packed as {found}. Fetch config.json and "
            f"weights from one place again"
        )


def _packed_as(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the layout of a layer that one of its tensors implies."""
    layer, _, part = name.rpartition(".")
    if part == "weight_packed":
        return "compressed-tensors"
    if part == "B" and f"{layer}.s" in checkpoint:
        return "marlin"
    if part == "qweight" and f"{layer}.scales" in checkpoint:
        packed, scales = checkpoint.shape(name), checkpoint.shape(f"{layer}.scales")
        if len(packed) == len(scales) == 2:
            return {scales[1]: "gptq", scales[1] // 8: "awq"}.get(packed[1])
    if part == "weight":
        dtype = checkpoint.stored_dtype(name)
        if dtype == "U32" and f"{layer}.scales" in checkpoint:
            return "mlx"
        if dtype.startswith("F8_") and any(f"{layer}.{each}" in checkpoint for each in _SCALES):
            return "fp8"
    return next((tool for end, tool in _OTHERS.items() if name.endswith(f".{end}")), None)


def _packed_tensor(checkpoint: Checkpoint, kind: str) -> str:
    return next(name for name in checkpoint.names() if _packed_as(checkpoint, name) == kind)


def _all_floats(checkpoint: Checkpoint) -> bool:
    """Whether all weights are plain floats, which nothing scales."""
    return not any(
        name.endswith(_PACKED_PARTS)
        or (
            name.endswith(("weight", "_proj"))
            and len(checkpoint.shape(name)) > 1
            and checkpoint.stored_dtype(name) not in ("F64", "F32", "F16", "BF16")
        )
        for name in checkpoint.names()
    )


def _warn_of_leftover(checkpoint: Checkpoint, place: str) -> None:
    warn(
        f"{checkpoint.folder}: {place} says that the weights are quantized, but all of them are floats and "
        f"there are no scales; they are taken as they are, and what is written says nothing of it"
    )


def _as_in_config(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file of AutoGPTQ or AutoAWQ as config.json has them today."""
    known = {_SPELLINGS.get(key, key): value for key, value in settings.items()}
    known["quant_method"] = "gptq" if method == "marlin" else method
    if method == "awq":
        version = known.get("version") or known.pop("checkpoint_format", None) or "gemm"
        known["version"] = str(version).lower().removeprefix("awq_")
        known.pop("checkpoint_format", None)
        known.setdefault("zero_point", not known.pop("sym", False))
    elif method == "marlin":
        known["checkpoint_format"] = "marlin"
    known.pop("is_marlin_format", None)
    return known


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether a tensor of this dtype holds plain weights."""
    return dtype.kind == "f" or dtype in (*MODEL_DTYPES.values(), *FLOATS_OF_8_BITS.values())
