"""Grids whose points are a table: GGUF's IQ4 types, and floating-point numbers of 4 and 8 bits."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Ties = Literal["up", "small", "even"]
EVERY_CODE = 256  # what kernels look codes up in


@dataclass(frozen=True)
class TableGrid:
    """A grid ``w = scale * points[code]``.

    Parameters
    ----------
    points
        In rising order, 16 or 256; where there is a negative zero, it comes before the positive one. Where
        the ends stand twice, the outer ones are NaN's codes, which no weight takes.
    scale_dtype
        That scales are stored in; None where the file decides.
    group_size
        Its only one; None where there is no such limit.
    ties
        Which of two points that are as near a weight takes: the upper one, that nearer to zero, or that
        whose place from zero on is even.
    either_sign
        Whether scales may be negative.
    scale_codes
        The least and the largest code of a group's scale, where scales are codes times a float16 for 256
        weights; then there are superblocks.
    fitted
        Whether scales are searched for even by plain rounding.
    divided
        Whether all scales of a tensor are divided by one float32 of its own.
    """

    points: tuple[float, ...]
    scale_dtype: np.dtype[Any] | None
    group_size: int | None
    ties: Ties = "even"
    either_sign: bool = False
    scale_codes: tuple[int, int] | None = None
    fitted: bool = False
    divided: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.points).bit_length() - 1

    @property
    def span(self) -> float:
        """How many scales lie between the ends."""
        return self.points[-1] - self.points[0]

    @property
    def has_nan(self) -> bool:
        """Whether the first and the last code are NaN in files."""
        return self.points[-1] == self.points[-2]

    @cached_property
    def by_code(self) -> NDArray[np.float32]:
        """What each code stands for, in float32, as kernels take it; codes out of range are NaN."""
        values = np.full(EVERY_CODE, np.nan, np.float32)
        values[: len(self.points)] = self.points
        return values

    @cached_property
    def bounds(self) -> NDArray[np.float32]:
        """Above which number each point gives way to the next, ties included."""
        points = np.array(self.points, np.float32)
        bounds: NDArray[np.float32] = (points[:-1] + points[1:]) * np.float32(0.5)
        middle = len(points) // 2
        from_zero = np.where(points < 0, middle - 1 - np.arange(len(points)), 0)
        from_zero = np.where(
            np.arange(len(points)) >= middle, np.arange(len(points)) - middle, from_zero
        )
        goes_up = {
            "up": np.ones(len(bounds), np.bool_),
            "small": bounds <= 0,
            "even": (from_zero[1:] % 2 == 0) | (bounds == 0),
        }[self.ties]
        below = np.nextafter(bounds, np.float32(-np.inf))
        bounds = np.where(goes_up, below, bounds).astype(np.float32)
        if self.has_nan:
            bounds[0], bounds[-1] = -np.inf, np.inf
        if self.ties == "small" and points[middle - 1] == 0:  # negative zeros are never chosen
            bounds[middle - 1] = bounds[middle - 2]
        return bounds

    @cached_property
    def floats(self) -> NDArray[np.uint8]:
        """The bits of the float that each code stands for: a sign, and the place from zero on."""
        codes, half = np.arange(EVERY_CODE, dtype=np.uint8), len(self.points) // 2
        return np.where(codes < half, 2 * half - 1 - codes, codes - half).astype(np.uint8)

    @cached_property
    def codes_of_floats(self) -> NDArray[np.uint8]:
        """The code of each float's bits."""
        codes = np.zeros(EVERY_CODE, np.uint8)
        count = len(self.points)
        codes[self.floats[:count]] = np.arange(count, dtype=np.uint8)
        return codes

    def plain_scales(self, largest: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scales that plain rounding takes where these are few, as MLX does: the least power of
        two that clips nothing, or the E4M3 number nearest to what just spans the largest magnitude."""
        spanning = largest / np.float32(self.points[-1])
        if self.scale_dtype == E8M0:
            mantissa, exponent = np.frexp(spanning)
            power = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent), -127, 127)
            scales: NDArray[np.float32] = np.ldexp(np.float32(1), power).astype(np.float32)
        else:
            scales = np.minimum(spanning, MOST_E4M3).astype(E4M3).astype(np.float32)
        return scales


def _signed(magnitudes: NDArray[Any]) -> tuple[float, ...]:
    """Return magnitudes from 0 on with both signs, zero too."""
    sizes = [float(each) for each in magnitudes]
    return (*(-each for each in reversed(sizes)), *sizes)


FLOAT16 = np.dtype(np.float16)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
MOST_E4M3 = np.float32(448)
E2M1_POINTS = _signed(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]))
E4M3_POINTS = _signed(np.append(np.arange(127, dtype=np.uint8).view(E4M3), MOST_E4M3))
_IQ4_POINTS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

TABLES: dict[str, TableGrid] = {
    "iq4_nl": TableGrid(_IQ4_POINTS, FLOAT16, 32, "up", either_sign=True, fitted=True),
    "iq4_xs": TableGrid(
        _IQ4_POINTS, None, 32, "up", either_sign=True, scale_codes=(-32, 31), fitted=True
    ),
    "mxfp4": TableGrid(E2M1_POINTS, E8M0, 32, "small"),
    "mxfp8": TableGrid(E4M3_POINTS, E8M0, 32),
    "nvfp4": TableGrid(E2M1_POINTS, E4M3, 16, "small"),
    "nvfp4_divided": TableGrid(E2M1_POINTS, E4M3, 16, "even", divided=True),
}


def has_superblocks(grid: str) -> bool:
    """Tell whether a grid's scales are codes times one float16 for 256 weights."""
    return grid == "k" or (grid in TABLES and TABLES[grid].scale_codes is not None)


def fits_whole_rows(grid: str) -> bool:
    """Tell whether the scales of a grid's groups cannot be fitted each by itself."""
    return has_superblocks(grid) or (grid in TABLES and TABLES[grid].divided)


def divisor_for(grid: str, weight: NDArray[Any]) -> float:
    """Return what the scales of a tensor are divided by: then the largest is the largest E4M3 number."""
    if grid not in TABLES or not TABLES[grid].divided:
        return 1.0
    largest = np.float32(np.abs(weight).max())
    product = MOST_E4M3 * np.float32(TABLES[grid].points[-1])
    with np.errstate(over="ignore", divide="ignore"):
        divisor = product / largest
    return float(divisor) if np.isfinite(divisor) and divisor > 0 else 1.0


def stored_scales(grid: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a grid's scales in a file whose other grids have `dtype`."""
    table = TABLES.get(grid)
    return dtype if table is None or table.scale_dtype is None else table.scale_dtype


def has_own_scales(grid: str) -> bool:
    """Tell whether a grid decides how its scales are stored."""
    return has_superblocks(grid) or (grid in TABLES and TABLES[grid].scale_dtype is not None)
