"""The ways to store quantized tensors in a checkpoint folder."""

from bitwright.checkpoint import Checkpoint
from bitwright.errors import UnsupportedModelError, shown
from bitwright.formats.awq import AwqFormat
from bitwright.formats.compressed_tensors import CompressedTensorsFormat
from bitwright.formats.declared import declaration
from bitwright.formats.format import Format, FormatName, GroupSize, Precision
from bitwright.formats.gguf import GgufFormat
from bitwright.formats.gptq import GptqFormat
from bitwright.formats.marlin import MarlinFormat
from bitwright.formats.mlx import MlxFormat

FORMATS: dict[FormatName, type[Format]] = {
    "mlx": MlxFormat,
    "marlin": MarlinFormat,  # before gptq, which refuses the marlin layout of AutoGPTQ
    "gptq": GptqFormat,
    "awq": AwqFormat,
    "compressed-tensors": CompressedTensorsFormat,
    "gguf": GgufFormat,
}

__all__ = ["FORMATS", "Format", "FormatName", "GroupSize", "Precision", "detect_format"]


def detect_format(checkpoint: Checkpoint) -> Format | None:
    """Return the reader for a checkpoint's quantized tensors, None where all are in float.

    Raises
    ------
    UnsupportedModelError
        If config.json declares a quantization that is not read.
    """
    for kind in FORMATS.values():
        if found := kind.detect(checkpoint):
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
