"""Writes a checkpoint's weights as one GGUF file, with configuration and tokenizer inside."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.gguf_file import (
    TYPE_NAMES,
    TensorInfo,
    tensor_offsets,
    weights_per_block,
    write_header,
)
from bitwright.checkpoint.gguf_metadata import gguf_metadata
from bitwright.checkpoint.gguf_names import ROTATION_TENSORS, GgufNames
from bitwright.checkpoint.writer import StoredTensor

# llama.cpp's number for a file, by the type of most of its quantized weights (llama_ftype).
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10},
    **{
        "Q3_K": 12,
        "Q4_K": 15,
        "Q5_K": 17,
        "Q6_K": 18,
        "IQ4_NL": 25,
        "IQ4_XS": 30,
        "MXFP4": 38,
        "NVFP4": 39,
        "BF16": 32,
    },
}


class GgufFiles:
    """One GGUF file, as `WeightFiles`.

    Parameters
    ----------
    config
        config.json.
    folder
        Where the tokenizer is.
    metadata
        Metadata of a GGUF file of this model, in place of config and tokenizer.

    Raises
    ------
    UnsupportedModelError
        If llama.cpp does not know the model or its tokenizer.
    """

    suffix = ".gguf"
    splits = False
    dtypes: Mapping[np.dtype[Any], str] = TYPE_NAMES

    def __init__(
        self, config: Mapping[str, Any], folder: Path, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self._names = GgufNames(config, folder / "config.json")
        self._metadata = metadata or gguf_metadata(dict(config), folder, FILE_TYPES["F32"])

    def stored(self, name: str, array: NDArray[Any]) -> tuple[str, NDArray[Any]] | None:
        """As `WeightFiles.stored`."""
        if name in ROTATION_TENSORS:
            return name, array
        if name.endswith("rotary_emb.inv_freq"):  # which follows from the configuration
            return None
        return self._names.to_gguf(name, array)

    def more(self) -> Iterable[tuple[str, NDArray[Any]]]:
        """As `WeightFiles.more`: what rotations are divided by."""
        return self._names.extra_tensors().items()

    def write(
        self,
        file: BinaryIO,
        tensors: Sequence[StoredTensor],
        data: BinaryIO,
        metadata: dict[str, str],
    ) -> None:
        """As `WeightFiles.write`."""
        infos = [TensorInfo(each.name, each.dtype, each.shape) for each in tensors]
        start = write_header(
            file, {**self._metadata, "general.file_type": _file_type(tensors)}, infos
        )
        offsets = tensor_offsets(infos)
        for tensor, end in zip(tensors, offsets[1:], strict=True):
            tensor.copy(data, file)
            file.write(bytes(start + end - file.tell()))


def _file_type(tensors: Sequence[StoredTensor]) -> np.uint32:
    """Return the type of most of the quantized weights, or of all if none is quantized."""
    weights: Counter[np.dtype[Any]] = Counter()
    for each in tensors:
        weights[each.dtype] += math.prod(each.shape) * weights_per_block(each.dtype)
    blocks = Counter({dtype: count for dtype, count in weights.items() if dtype.names})
    most = (blocks or weights).most_common(1)
    return np.uint32(FILE_TYPES[TYPE_NAMES[most[0][0]] if most else "F32"])
