"""Files of layer inputs: an .npz with one array ``[samples, length, in]`` per layer."""

import json
import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import (
    MAGIC_PREFIX,
    read_array,
    read_array_header_1_0,
    read_array_header_2_0,
    read_magic,
)
from numpy.typing import NDArray

from bitwright.arrays import require_finite
from bitwright.checkpoint.fingerprint import digest
from bitwright.errors import CalibrationError, shown
from bitwright.models.operations import Float32

SHOWN_NAMES = 5
ENDS = ("", ".weight")  # of the names of arrays, after those of layers


MOST_EXPANSION = 16  # of a compressed array when it is read; activations shrink by less than half


_HEADERS = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}


class ActivationFile:
    """An .npz of activations, read layer by layer.

    Parameters
    ----------
    path
        Arrays ``[tokens, in]`` or ``[batch, length, in]`` by full layer name, with or without ``.weight``.
        Layers that share their input may share the array of one of them.

    Raises
    ------
    CalibrationError
        If there is no such file, or it is not an .npz.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.path.isfile(self.path):  # opening a pipe would wait for someone to write to it
            raise CalibrationError(f"{self.path}: cannot be read (there is no such file)")
        try:
            with self.path.open("rb") as file:
                alone = file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX
            if alone:
                raise CalibrationError(
                    f"{self.path}: is a single array; expected an .npz, one per layer"
                )
            self._archive = zipfile.ZipFile(self.path)
        except OSError as error:
            raise CalibrationError(f"{self.path}: cannot be read ({error.strerror})") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise CalibrationError(
                f"{self.path}: is not an .npz of numeric arrays ({error})"
            ) from error
        self._entries = {
            each.filename.removesuffix(".npy"): each for each in self._archive.infolist()
        }

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def __enter__(self) -> "ActivationFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fingerprint(self) -> str:
        """Return the fingerprint of the file: its list of arrays, with a checksum of each, which reading an
        array verifies."""
        arrays = [[name, each.CRC, each.file_size] for name, each in self._entries.items()]
        return digest(json.dumps(arrays).encode())

    def token_count(self) -> int:
        """Return how many tokens the file was made of: those of its longest array, as experts see few."""
        counts = [0]
        for entry in self._entries.values():
            with suppress(Exception):  # as in `tokens`; what cannot be read is refused there
                shape, dtype, start = self._header(entry)
                if math.prod(shape) * dtype.itemsize == entry.file_size - start:
                    counts.append(math.prod(shape[:-1]))
        return max(counts)

    def largest_bytes(self) -> int:
        """Return what the largest array takes in float32, with itself where it is stored otherwise."""
        sizes = [0]
        for entry in self._entries.values():
            with suppress(Exception):  # as in `tokens`
                shape, dtype, _ = self._header(entry)
                other = 0 if dtype == np.float32 else dtype.itemsize
                sizes.append(math.prod(shape) * (4 + other))
        return max(sizes)

    def _header(self, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Return an array's shape and dtype, and where its values begin."""
        with self._archive.open(entry) as file:
            version = read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"version {version}")
            shape, _, dtype = _HEADERS[version](file)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
            return shape, dtype, file.tell()

    def tokens(self, layers: Iterable[str], channels: int) -> Float32:
        """Return the inputs ``[tokens, channels]`` of the first of `layers` that the file has.

        Raises
        ------
        CalibrationError
            If none is there, or the array is pickled, damaged, or of the wrong width.
        NonFiniteError
            If a value is NaN or infinite.
        """
        layers = tuple(layers)
        name = self._name(layers)
        try:
            array = self._read(self._entries[name])
        except Exception as error:  # as in `load_tokens`: headers are parsed as Python
            raise self._damaged(name, error) from error
        self._check(name, array.dtype, array.shape, layers[0], channels)
        with np.errstate(all="ignore"):  # of NaN and what overflows, which are refused below
            tokens = np.ascontiguousarray(array.reshape(-1, channels), np.float32)
            some = tokens.any()
        if not some:
            raise CalibrationError(f"{self.path}: array {name} is empty or all zero")
        require_finite(tokens, f"{self.path}: array {name}")
        return tokens

    def has(self, layer: str) -> bool:
        """Tell whether the file has the inputs of a layer."""
        return any(f"{layer}{end}" in self._entries for end in ENDS)

    def require(self, layers: Sequence[str], channels: int) -> None:
        """Raise CalibrationError unless the file has the inputs of one of `layers`, as its header tells."""
        name = self._name(layers)
        try:
            shape, dtype, _ = self._header(self._entries[name])
        except Exception as error:
            raise self._damaged(name, error) from error
        self._check(name, dtype, shape, layers[0], channels)

    def _name(self, layers: Sequence[str]) -> str:
        """Return the array that has the inputs of the first of `layers` that the file has."""
        known = self._entries
        name = next((f"{n}{end}" for n in layers for end in ENDS if f"{n}{end}" in known), "")
        if not name:
            present = ", ".join(map(shown, [*known][:SHOWN_NAMES]))
            more = f" and {len(known) - SHOWN_NAMES} more" if len(known) > SHOWN_NAMES else ""
            raise CalibrationError(
                f"{self.path}: has no activations of layer {layers[0]}; it has {present or 'none'}{more}"
            )
        return name

    def _damaged(self, name: str, error: Exception) -> CalibrationError:
        return CalibrationError(
            f"{self.path}: array {name} is pickled or damaged, and is not read ({shown(str(error))})"
        )

    def _check(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], layer: str, channels: int
    ) -> None:
        if dtype.kind != "f" or len(shape) not in (2, 3) or shape[-1] != channels:
            raise CalibrationError(
                f"{self.path}: array {name} is {dtype} of shape {list(shape)}; layer {layer} needs "
                f"floats [batch, length, {channels}]"
            )

    def _read(self, entry: zipfile.ZipInfo) -> NDArray[Any]:
        most = MOST_EXPANSION * min(entry.compress_size, self.path.stat().st_size)
        shape, dtype, start = self._header(entry)
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != entry.file_size - start:
            raise ValueError(f"{size} bytes of {entry.file_size}")
        if size > most:
            raise ValueError(f"{size} bytes, packed into {entry.compress_size}")
        with self._archive.open(entry) as file:
            array: NDArray[Any] = read_array(file, allow_pickle=False)
        return array
