"""The result of every method and the content of every format: a quantized matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright import _kernels
from bitwright.grids.tables import TABLES, TableGrid

Grid = Literal[
    "affine",
    "zero_point",
    "symmetric",
    "k",
    "iq4_nl",
    "iq4_xs",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "nvfp4_divided",
]
GRIDS: tuple[Grid, ...] = (
    "affine",
    "zero_point",
    "symmetric",
)  # "k" is one of these with superblocks; the others are TABLES
BITS = (2, 3, 4, 5, 6, 8)
SUPERBLOCK = 256  # weights that share the scale of their scales


@dataclass(frozen=True)
class KGrid:
    """The layout of a "k" grid, by its bits: GGUF's Q2_K to Q6_K.

    `scale_codes` are the least and the largest code that a group's scale may have.
    """

    group_size: int
    grid: Grid
    scale_codes: tuple[int, int]

    @property
    def stored_bits(self) -> float:
        """Bits per weight stored beside the codes."""
        low, high = self.scale_codes
        parts = 2 if self.grid == "affine" else 1
        return parts * ((high - low).bit_length() / self.group_size + 16 / SUPERBLOCK)


K_GRIDS = {
    2: KGrid(16, "affine", (0, 15)),
    3: KGrid(16, "symmetric", (-32, 31)),
    4: KGrid(32, "affine", (0, 63)),
    5: KGrid(32, "affine", (0, 63)),
    6: KGrid(16, "symmetric", (-128, 127)),
}


@dataclass(frozen=True, eq=False)
class SuperBlocks:
    """The scales and mins of a "k" grid, which are codes themselves: of group g in superblock k, scale
    ``d[k] * scale_codes[g]`` and bias ``-dmin[k] * min_codes[g]``.

    Parameters
    ----------
    d, dmin
        ``[out, in / 256]`` float16; `dmin` None where the grid is symmetric.
    scale_codes, min_codes
        ``[out, groups]`` int8 and uint8.
    """

    d: NDArray[np.float16]
    scale_codes: NDArray[np.int8]
    dmin: NDArray[np.float16] | None = None
    min_codes: NDArray[np.uint8] | None = None

    def scales(self) -> NDArray[np.float32]:
        """Return the scale of each group, exactly."""
        return _times(self.d, self.scale_codes)

    def biases(self) -> NDArray[np.float32] | None:
        """Return the bias of each group, exactly; None where the grid is symmetric."""
        if self.dmin is None or self.min_codes is None:
            return None
        return -_times(self.dmin, self.min_codes)

    def rows(self, index: Any) -> "SuperBlocks":
        """Return those of some output rows."""
        return SuperBlocks(
            self.d[index],
            self.scale_codes[index],
            None if self.dmin is None else self.dmin[index],
            None if self.min_codes is None else self.min_codes[index],
        )

    @classmethod
    def joined(cls, parts: Sequence["SuperBlocks"], axis: int = 0) -> "SuperBlocks":
        """Return those of several, see `QuantizedTensor.joined`."""

        def joined(arrays: Sequence[NDArray[Any] | None]) -> Any:
            known = [array for array in arrays if array is not None]
            return np.concatenate(known, axis) if known else None

        return cls(
            joined([part.d for part in parts]),
            joined([part.scale_codes for part in parts]),
            joined([part.dmin for part in parts]),
            joined([part.min_codes for part in parts]),
        )

    def replaced(self, where: NDArray[np.bool_], other: "SuperBlocks") -> "SuperBlocks":
        """Return these with some rows ``[out]``, or superblocks ``[out, in / 256]``, taken from others."""
        chosen = where.reshape(len(where), -1)

        def mixed(mine: NDArray[Any] | None, theirs: NDArray[Any] | None) -> Any:
            if mine is None or theirs is None:
                return None
            return np.where(_widened(chosen, mine.shape[1]), theirs, mine)

        return SuperBlocks(
            mixed(self.d, other.d),
            mixed(self.scale_codes, other.scale_codes),
            mixed(self.dmin, other.dmin),
            mixed(self.min_codes, other.min_codes),
        )


def _times(d: NDArray[np.float16], codes: NDArray[Any]) -> NDArray[np.float32]:
    return _widened(d.astype(np.float32), codes.shape[1]) * codes.astype(np.float32)


def _widened(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Repeat each column until there are `width`."""
    return np.repeat(values, width // values.shape[1], axis=1)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight matrix as codes on a grid per group of input channels.

    Parameters
    ----------
    codes
        ``[out, in]`` uint8, each below ``2**bits``.
    scales
        ``[out, groups]`` float32, float16 or bfloat16, the dtype that is stored.
    biases
        ``[out, groups]``, dtype of `scales`; the affine grid ``w = scale * code + bias`` only.
    zeros
        ``[out, groups]`` uint8; the integer grids ``w = scale * (code - zero)`` only.
    bits
        2, 3, 4, 5, 6 or 8.
    group_size
        Consecutive input channels that share a scale; equal to ``in`` for one scale a row.
    grid
        ``"affine"``, ``"zero_point"`` or ``"symmetric"`` (every zero is ``2**(bits - 1)``); or one of
        `TABLES`, ``w = scale * points[code]``, which has neither biases nor zeros.
    group_index
        ``[in]`` int32, the group of each channel, for files whose groups are not consecutive.
    superblocks
        Of "k" and "iq4_xs" grids: what `scales` and `biases` (float32 then) are the products of.
    divisor
        Of all scales, where the grid has one ("nvfp4_divided").

    Raises
    ------
    ValueError
        If shapes, dtypes or values contradict each other.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    >>> tensor = bitwright.quantize_rtn(weight, bits=8, group_size=32)
    >>> bool(np.abs(tensor.dequantize() - weight).max() < 0.02)
    True
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    biases: NDArray[Any] | None
    zeros: NDArray[np.uint8] | None
    bits: int
    group_size: int
    grid: Grid
    group_index: NDArray[np.int32] | None = None
    superblocks: SuperBlocks | None = None
    divisor: float = 1.0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, got {self.bits}")
        if self.grid not in GRIDS and self.table is None:
            raise ValueError(f"grid: expected one of {(*GRIDS, *TABLES)}, got {self.grid!r}")
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8:
            raise ValueError(f"codes: expected uint8 [out, in], got {_describe(self.codes)}")
        out, channels = self.codes.shape
        if self.group_size < 1 or channels % self.group_size:
            raise ValueError(
                f"group_size: {self.group_size} does not divide the {channels} input channels"
            )
        groups = (out, channels // self.group_size)
        offsets, other = (
            (self.biases, self.zeros) if self.grid == "affine" else (self.zeros, self.biases)
        )
        name = "biases" if self.grid == "affine" else "zeros"
        if self.table is not None:
            self._check_table(self.table)
        elif offsets is None or other is not None:
            raise ValueError(f"{name}: the {self.grid} grid has {name}, and only these")
        for label, array in (("scales", self.scales), (name, offsets)):
            if array is not None and array.shape != groups:
                raise ValueError(f"{label}: expected shape {groups}, got {_describe(array)}")
        if self.group_index is not None and self.group_index.shape != (channels,):
            raise ValueError(
                f"group_index: expected [{channels}], got {_describe(self.group_index)}"
            )
        if self.superblocks is not None:
            biases = self.superblocks.biases()
            alike = np.array_equal(self.scales, self.superblocks.scales(), equal_nan=True)
            if not alike or (
                biases is not None
                and not np.array_equal(np.asarray(offsets), biases, equal_nan=True)
            ):
                raise ValueError("superblocks: scales and biases are not their products")

    def _check_table(self, table: TableGrid) -> None:
        if self.biases is not None or self.zeros is not None:
            raise ValueError(f"zeros: the {self.grid} grid has neither zeros nor biases")
        if not (self.divisor > 0 and np.isfinite(self.divisor)):
            raise ValueError(f"divisor: expected a positive number, got {self.divisor}")
        if self.bits != table.bits or table.group_size not in (None, self.group_size):
            raise ValueError(
                f"grid: {self.grid} has {table.bits} bits in groups of {table.group_size}, not "
                f"{self.bits} in groups of {self.group_size}"
            )

    @property
    def table(self) -> TableGrid | None:
        """The table that its codes stand for, if it is one."""
        return TABLES.get(self.grid)

    @property
    def points(self) -> NDArray[np.float32] | None:
        """What each code stands for, as kernels take it; None where that is no table."""
        return None if self.table is None else self.table.by_code

    @property
    def stored_grid(self) -> Grid:
        """The grid with what its scales are made of: "k" for one of `GRIDS` with superblocks."""
        return "k" if self.superblocks is not None and self.table is None else self.grid

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> float:
        """Bytes that the packed codes, scales and biases or zeros take in a file."""
        per_weight = stored_bits(self.bits, self.group_size, self.stored_grid, self.scales.dtype)
        return self.codes.size * per_weight / 8

    def dequantize(self, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Return the weights that the codes stand for.

        Parameters
        ----------
        first, last
            Of which rows; the last is not one of them. All by default.

        Returns
        -------
        NDArray
            ``[out, in]`` float32, the same bits on every processor.
        """
        rows = slice(first, last)
        weight = np.empty(self.codes[rows].shape, np.float32)
        _kernels.dequantize(
            self.codes[rows],
            self._real_scales(rows),
            None if self.zeros is None else self.zeros[rows].astype(np.float32),
            None if self.biases is None else self.biases[rows].astype(np.float32),
            self.group_index,
            weight,
            self.points,
        )
        return weight

    def _real_scales(self, rows: Any = slice(None)) -> NDArray[np.float32]:
        scales: NDArray[np.float32] = self.scales[rows].astype(np.float32)
        return scales if self.divisor == 1 else scales / np.float32(self.divisor)

    def grids(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scales and biases or zeros in float32, as kernels take them; copies."""
        if self.table is not None:
            return self._real_scales(), np.zeros(self.scales.shape, np.float32)
        offsets = self.zeros if self.biases is None else self.biases
        return self.scales.astype(np.float32), np.asarray(offsets).astype(np.float32)

    def as_affine(self) -> "QuantizedTensor":
        """Return a tensor with a symmetric grid as one with an affine grid, and the same weights."""
        if self.grid != "symmetric":
            raise ValueError(f"grid: expected symmetric, got {self.grid}")
        # A power of two times a scale is exact in the scale's dtype.
        biases = self.scales * self.scales.dtype.type(-(2 ** (self.bits - 1)))
        return replace(self, grid="affine", zeros=None, biases=biases)

    @classmethod
    def joined(cls, parts: Sequence["QuantizedTensor"], axis: int = 0) -> "QuantizedTensor":
        """Return one tensor of the rows of several of one kind, or with axis 1 of their channels."""
        first = parts[0]

        def joined(name: str) -> Any:
            if getattr(first, name) is None:
                return None
            return np.concatenate([getattr(part, name) for part in parts], axis)

        blocks = [part.superblocks for part in parts if part.superblocks is not None]
        return replace(
            first,
            codes=joined("codes"),
            scales=joined("scales"),
            biases=joined("biases"),
            zeros=joined("zeros"),
            superblocks=SuperBlocks.joined(blocks, axis) if blocks else None,
        )

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Return the tensor of output rows ``start`` to ``stop``, as views."""
        return QuantizedTensor(
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            biases=None if self.biases is None else self.biases[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
            bits=self.bits,
            group_size=self.group_size,
            grid=self.grid,
            group_index=self.group_index,
            superblocks=self.superblocks and self.superblocks.rows(slice(start, stop)),
            divisor=self.divisor,
        )


def dequantize(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """Return the weights that a tensor's codes stand for.

    Parameters
    ----------
    tensor
        From `quantize_rtn`, `quantize_gptq`, or a checkpoint.

    Returns
    -------
    NDArray
        ``[out, in]`` float32, the same bits on every processor.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> tensor = bitwright.quantize_rtn(np.ones((1, 32), np.float32), group_size=32)
    >>> float(bitwright.dequantize(tensor)[0, 0])
    1.0
    """
    return tensor.dequantize()


def stored_bits(bits: int, group_size: int, grid: Grid, scale_dtype: DTypeLike) -> float:
    """Return the bits per weight that codes, scales and biases or zeros take."""
    if grid == "k":
        return bits + K_GRIDS[bits].stored_bits
    table = TABLES.get(grid)
    if table is not None:
        return table.bits + _stored_scale_bits(table, scale_dtype) / (
            table.group_size or group_size
        )
    scale = 8 * np.dtype(scale_dtype).itemsize
    return bits + (scale + (scale if grid == "affine" else bits)) / group_size


def _stored_scale_bits(table: TableGrid, scale_dtype: DTypeLike) -> float:
    """Return the bits that the scale of a group takes, with its share of a superblock's."""
    if table.scale_codes is not None and table.group_size is not None:
        low, high = table.scale_codes
        return (high - low).bit_length() + 16 * table.group_size / SUPERBLOCK
    return 8 * np.dtype(table.scale_dtype or scale_dtype).itemsize


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Pack codes into 32-bit words, each row one little-endian stream of bits (MLX's order).

    Parameters
    ----------
    codes
        ``[rows, n]`` uint8, C-contiguous, below ``2**bits``; ``n * bits`` must be a multiple of 32.
    bits
        2, 3, 4, 5, 6 or 8.

    Returns
    -------
    NDArray
        ``[rows, n * bits / 32]`` uint32.

    Raises
    ------
    TypeError, ValueError
        If an argument has another dtype, layout or range.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> bitwright.pack(np.array([[1, 2, 3, 0, 0, 0, 0, 15]], np.uint8), 4)
    array([[4026532641]], dtype=uint32)
    """
    return _kernels.pack(codes, bits)


def unpack(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Unpack what `pack` packed.

    Parameters
    ----------
    words
        ``[rows, w]`` uint32, C-contiguous; ``w * 32`` must be a multiple of `bits`.
    bits
        2, 3, 4, 5, 6 or 8.

    Returns
    -------
    NDArray
        ``[rows, w * 32 / bits]`` uint8.

    Raises
    ------
    TypeError, ValueError
        If an argument has another dtype, layout or range.

    Examples
    --------
    >>> import numpy as np, bitwright
    >>> codes = np.arange(32, dtype=np.uint8)[None] % 8
    >>> bool((bitwright.unpack(bitwright.pack(codes, 3), 3) == codes).all())
    True
    """
    return _kernels.unpack(words, bits)


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"
