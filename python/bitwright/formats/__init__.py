"""The formats in which quantized tensors are stored in a checkpoint."""

import importlib
import pkgutil

from bitwright.checkpoint import Checkpoint
from bitwright.errors import UnsupportedModelError, shown
from bitwright.formats.declared import declaration
from bitwright.formats.format import Format, FormatName, GroupSize, Precision
from bitwright.formats.stored import check_packing, settle_quantization

FORMATS: dict[FormatName, type[Format]] = {
    kind.name: kind
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    for kind in getattr(importlib.import_module(f"{__name__}.{module.name}"), "FORMATS", ())
}
"""The formats by name; each file of this folder lists its own under FORMATS."""

__all__ = ["FORMATS", "Format", "FormatName", "GroupSize", "Precision", "detect_format"]


def detect_format(checkpoint: Checkpoint) -> Format | None:
    """Return the reader for a checkpoint's quantized tensors, None where all are in float.

    What the tensors are decides: a quantization that config.json claims for floats is not believed, and
    removed from ``checkpoint.config``.

    Raises
    ------
    CheckpointError
        If config.json declares another format than the tensors have.
    UnsupportedModelError
        If the weights are quantized in a way that is not read.
    """
    stored = settle_quantization(checkpoint)
    for kind in FORMATS.values():
        if found := kind.detect(checkpoint):
            check_packing(checkpoint, found.name, stored)
            return found
    said = declaration(checkpoint)
    other = checkpoint.config.get("quantization_config") or checkpoint.config.get("quantization")
    if said or other:
        method = said.method if said else other
        raise UnsupportedModelError(
            f"{checkpoint.folder / 'config.json'}: the weights are quantized by {shown(method)}; "
            f"quantized checkpoints are read in the formats {', '.join(FORMATS)}"
        )
    return None
