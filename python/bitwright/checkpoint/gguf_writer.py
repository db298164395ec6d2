"""Writes a checkpoint's weights as one GGUF file, with configuration and tokenizer inside."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint.gguf_file import (
    FILE_TYPE_ALIASES,
    FILE_TYPES,
    TYPE_NAMES,
    Header,
    TensorInfo,
    overwrite_values,
    tensor_offsets,
    weights_per_block,
    write_header,
)
from bitwright.checkpoint.gguf_general import size_label
from bitwright.checkpoint.gguf_metadata import gguf_metadata
from bitwright.checkpoint.gguf_names import ROTATION_TENSORS, GgufNames
from bitwright.checkpoint.writer import ENTRY_BYTES, FileOptions, StoredTensor

HEADER_BYTES = 512  # of what is said of the file when its tensors are known


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
    options
        What the file is called, and says beside that.

    Raises
    ------
    UnsupportedModelError
        If llama.cpp does not know the model or its tokenizer.
    """

    suffix = ".gguf"
    dtypes: Mapping[np.dtype[Any], str] = TYPE_NAMES

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        metadata: Mapping[str, Any] | None = None,
        options: FileOptions | None = None,
    ) -> None:
        self._options = options or FileOptions()
        self.stem = self._options.stem
        self.part_bytes: int | None = self._options.part_bytes or 0
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
        part: int,
        tensors: Sequence[StoredTensor],
        data: BinaryIO,
        metadata: dict[str, str],
    ) -> None:
        """As `WeightFiles.write`."""
        infos = [TensorInfo(each.name, each.dtype, each.shape) for each in tensors]
        kind = self._options.type or ("F32" if self.part_bytes else None)  # or not known yet
        number = _file_type(infos) if kind is None else np.uint32(FILE_TYPES[kind])
        file_type = {"general.file_type": number}
        said = {**self._metadata, **file_type, **self._options.keys}
        if not self.part_bytes:  # or nobody knows yet
            said.setdefault("general.size_label", size_label(infos))
        if any(info.dtype.names for info in infos):
            said["general.quantized_by"] = f"bitwright {version('bitwright')}"
        if self.part_bytes:  # what is not known yet comes first, where it is found again
            said = _split(part, 1, 0) if part else {**_split(part, 1, 0), **file_type, **said}
        start = write_header(file, said, infos)
        offsets = tensor_offsets(infos)
        for tensor, end in zip(tensors, offsets[1:], strict=True):
            tensor.copy(data, file)
            file.write(bytes(start + end - file.tell()))

    def overhead(self, names: Iterable[str]) -> int:
        """As `WeightFiles.overhead`."""
        said = {**self._metadata, **self._options.keys}
        start = write_header(BytesIO(), said, [])
        return start + HEADER_BYTES + sum(len(name.encode()) + ENTRY_BYTES for name in names)

    def complete(self, files: Sequence[Path], tensors: Mapping[str, int], size: int) -> None:
        """As `WeightFiles.complete`: each of several files says which of how many it is."""
        if not self.part_bytes:
            return
        headers = []
        for path in files:
            with open(path, "rb") as file:
                headers.append(Header(file, path))
        infos = [info for header in headers for info, _ in header.tensors.values()]
        kind = _file_type(infos)
        for number, path in enumerate(files):
            self._overwrite(path, number, len(files), len(infos), kind)

    def reopen(self, file: Path, number: int) -> None:
        """As `WeightFiles.reopen`."""
        if self.part_bytes:
            self._overwrite(file, number, 1, 0, np.uint32(FILE_TYPES["F32"]))

    def _overwrite(self, path: Path, part: int, count: int, tensors: int, kind: np.uint32) -> None:
        said = {} if self._options.type else {"general.file_type": kind}
        with open(path, "r+b") as file:
            overwrite_values(file, {**_split(part, count, tensors), **said})


def _split(number: int, count: int, tensors: int) -> dict[str, Any]:
    """Return what llama.cpp looks for in each of several files."""
    return {
        "split.no": np.uint16(number),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(tensors),
    }


def _file_type(tensors: Sequence[TensorInfo]) -> np.uint32:
    """Return the type of most of the quantized weights, or of all if none is quantized."""
    weights: Counter[np.dtype[Any]] = Counter()
    for each in tensors:
        weights[each.dtype] += math.prod(each.shape) * weights_per_block(each.dtype)
    blocks = Counter({dtype: count for dtype, count in weights.items() if dtype.names})
    most = (blocks or weights).most_common(1)
    name = TYPE_NAMES[most[0][0]] if most else "F32"
    if name == "NVFP4":  # which llama-quantize does not write
        return np.uint32(39)
    known = {**FILE_TYPE_ALIASES, "MXFP4": "MXFP4_MOE"}
    return np.uint32(FILE_TYPES[known.get(name, name)])
