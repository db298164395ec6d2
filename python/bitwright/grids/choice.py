"""The checked arguments of a method, and a kernel's result as a `QuantizedTensor`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bitwright import _kernels
from bitwright.grids.tables import (
    E4M3,
    E8M0,
    FP8,
    MOST_E4M3,
    TABLES,
    TableGrid,
    divisor_for,
    has_own_scales,
    has_superblocks,
)
from bitwright.grids.tensor import BITS, GRIDS, K_GRIDS, SUPERBLOCK, Grid

SPACING_AT_ONE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
FLOAT_DTYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
)


def smallest_scale(dtype: np.dtype[Any]) -> float:
    """Return the smallest number above zero that a dtype of scales holds, a subnormal one."""
    few = {E8M0.name: 2.0**-127, E4M3.name: 2.0**-9}
    known = {"float16": 2.0**-24, "bfloat16": 2.0**-133, **few}
    return known.get(np.dtype(dtype).name, 2.0**-149)


def rounded_scales(scales: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return scales in their dtype; none that is not zero becomes zero, which would empty its group."""
    if dtype in (E4M3, E8M0):  # which have no other numbers
        most = MOST_E4M3 if dtype == E4M3 else np.float32(2.0**127)
        inside = np.clip(scales, np.float32(smallest_scale(dtype)), most)
        return np.where(scales == 0, scales, inside).astype(dtype)
    stored = scales.astype(dtype)
    emptied = (stored == 0) & (scales != 0)
    if not emptied.any():
        return stored
    least = np.copysign(np.float32(smallest_scale(dtype)), scales).astype(dtype)
    return np.where(emptied, least, stored)


def kernel_grid(
    bits: int,
    group_size: int,
    grid: Grid,
    scale_dtype: np.dtype[Any],
    search: bool = False,
    divisor: float = 1.0,
) -> _kernels.Grid:
    """Return a grid of groups by themselves as kernels take it."""
    table: TableGrid | None = TABLES.get(grid)
    if table is None:
        return _kernels.Grid(bits, group_size, grid, scale_dtype.name, search)
    count = 1 << table.point_bits
    points, bounds = table.by_code[:count], table.bounds
    if len(table.points) < count:  # the last one fills the rest, which no weight takes
        points = np.minimum(np.nan_to_num(points, nan=np.inf), points[len(table.points) - 1])
        bounds = np.pad(bounds, (0, count - len(table.points)), constant_values=np.inf)
    return _kernels.Grid(
        table.point_bits,
        group_size,
        "table",
        scale_dtype.name,
        search,
        points,
        bounds,
        table.either_sign,
        divisor,
    )


@dataclass(frozen=True)
class GridChoice:
    """The grid that a method quantizes to, checked against the weight it is for.

    `group_size` is at most the number of input channels; ``None`` and −1 stand for the whole row.
    """

    bits: int
    group_size: int
    grid: Grid
    scale_dtype: np.dtype[Any]
    search: bool
    divisor: float = 1.0

    @classmethod
    def check(
        cls,
        weight: NDArray[Any],
        bits: int = 4,
        group_size: int | None = 64,
        grid: Grid = "affine",
        scale_dtype: DTypeLike | None = None,
        search: bool = False,
    ) -> "GridChoice":
        """Check the arguments of a method; ValueError or TypeError names the one that is wrong."""
        if not isinstance(weight, np.ndarray):
            raise TypeError(f"weight: expected a NumPy array, got {type(weight).__name__}")
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight: expected float32, float16 or bfloat16, got {weight.dtype}")
        if weight.ndim != 2 or weight.size == 0:
            raise ValueError(f"weight: expected shape [out, in], got {list(weight.shape)}")
        if bits not in BITS and grid not in TABLES:
            raise ValueError(f"bits: expected one of {BITS}, got {bits}")
        known = (*GRIDS, "k", *TABLES)
        if grid not in known:
            raise ValueError(f"grid: expected one of {known}, got {grid!r}")
        channels = weight.shape[1]
        if grid in TABLES:
            bits, group_size, scale_dtype = cls._of_table(
                grid, bits, group_size, scale_dtype or weight.dtype, channels
            )
        if grid == "k":
            if bits not in K_GRIDS or channels % SUPERBLOCK:
                raise ValueError(
                    f"grid: k has {', '.join(map(str, K_GRIDS))} bits and rows of multiples of "
                    f"{SUPERBLOCK} weights, not {bits} bits and {channels}"
                )
            size = K_GRIDS[bits].group_size
            if group_size not in (None, size):
                raise ValueError(
                    f"group_size: k grids of {bits} bits have {size}, not {group_size}; leave it out (None)"
                )
            group_size, scale_dtype = size, np.float32  # products of float16 and integers
        size = channels if group_size in (None, -1) else int(group_size or 0)
        if size < 1 or channels % size:
            raise ValueError(
                f"group_size: {group_size} does not divide the {channels} input channels of weight"
            )
        dtype = weight.dtype if scale_dtype is None else np.dtype(scale_dtype)
        if dtype not in FLOAT_DTYPES and not has_own_scales(grid):
            raise ValueError(
                f"scale_dtype: expected float32, float16 or bfloat16, got {scale_dtype}"
            )
        return cls(bits, size, grid, dtype, search, divisor_for(grid, weight))

    @property
    def base(self) -> Grid:
        """The grid of each group by itself."""
        return K_GRIDS[self.bits].grid if self.grid == "k" else self.grid

    @property
    def steps(self) -> float:
        """How many scales of a group lie between its least and its largest weight."""
        table = TABLES.get(self.grid)
        return 2**self.bits - 1 if table is None else table.span

    @property
    def scale_codes(self) -> tuple[int, int] | None:
        """The least and the largest code of a group's scale, where that is a code itself."""
        if self.grid == "k":
            return K_GRIDS[self.bits].scale_codes
        table = TABLES.get(self.grid)
        return None if table is None else table.scale_codes

    @property
    def kernel_grid(self) -> _kernels.Grid:
        """The grid of each group by itself, as kernels take it."""
        return kernel_grid(
            self.bits, self.group_size, self.base, self.scale_dtype, self.search, self.divisor
        )

    @staticmethod
    def _of_table(
        grid: Grid,
        bits: int,
        group_size: int | None,
        scale_dtype: DTypeLike,
        channels: int,
    ) -> tuple[int, int | None, DTypeLike]:
        """Return bits, group size and dtype of a table's scales."""
        table = TABLES[grid]
        if bits != table.bits:
            raise ValueError(f"bits: {grid} has {table.bits}, not {bits}")
        if group_size not in (None, table.group_size or -1, table.group_size or channels):
            raise ValueError(
                f"group_size: {grid} has {table.group_size or 'whole rows'}, not {group_size}; leave it "
                "out (None)"
            )
        if has_superblocks(grid):
            if channels % SUPERBLOCK:
                raise ValueError(
                    f"grid: {grid} has rows of multiples of {SUPERBLOCK} weights, not {channels}"
                )
            scale_dtype = np.float32  # products of float16 and integers
        return table.bits, table.group_size, table.scale_dtype or scale_dtype

    def fields(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
    ) -> dict[str, Any]:
        """Return the fields of a `QuantizedTensor`; scales and biases are already exact in their dtype."""
        affine = self.base == "affine"
        stored = self._stored(scales)
        if not (np.isfinite(stored.astype(np.float32)).all() and np.isfinite(offsets).all()):
            raise ValueError(
                f"scale_dtype: the weights of a group span more than {self.scale_dtype} can hold; "
                "use bfloat16 or float32"
            )
        return {
            "codes": codes,
            "scales": stored,
            "biases": offsets.astype(self.scale_dtype) if affine else None,
            "zeros": None if affine or self.base in TABLES else offsets.astype(np.uint8),
            "bits": self.bits,
            "group_size": self.group_size,
            "grid": self.base,
            "divisor": self.divisor,
        }

    def _stored(self, scales: NDArray[np.float32]) -> NDArray[Any]:
        if self.scale_dtype == E8M0:  # which has no zero: groups of zeros are zeros with any scale
            scales = np.where(scales == 0, np.float32(1), scales)
        elif self.base in FP8:  # by which engines divide; compressed-tensors takes this number
            least = SPACING_AT_ONE[self.scale_dtype.name]
            scales = np.where(scales == 0, np.float32(least), scales)
        return (scales * np.float32(self.divisor)).astype(self.scale_dtype)


def check_importance(
    importance: ArrayLike | Sequence[float] | None, channels: int
) -> NDArray[np.float32]:
    """Return `importance` as float32 ``[channels]``, ones for None; ValueError if it is not that."""
    if importance is None:
        return np.ones(channels, np.float32)
    array = np.ascontiguousarray(importance, np.float32)
    if array.shape != (channels,) or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(
            f"importance: expected {channels} finite values that are not negative, "
            f"got shape {list(array.shape)}"
        )
    return array
