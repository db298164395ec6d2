"""The result of every method and the content of every format: a quantized matrix."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright import _kernels

Grid = Literal["affine", "zero_point", "symmetric"]
GRIDS: tuple[Grid, ...] = ("affine", "zero_point", "symmetric")
BITS = (2, 3, 4, 5, 6, 8)


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
        ``"affine"``, ``"zero_point"`` or ``"symmetric"`` (every zero is ``2**(bits - 1)``).
    group_index
        ``[in]`` int32, the group of each channel, for files whose groups are not consecutive.

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

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: expected one of {BITS}, got {self.bits}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid: expected one of {GRIDS}, got {self.grid!r}")
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
        if offsets is None or other is not None:
            raise ValueError(f"{name}: the {self.grid} grid has {name}, and only these")
        for label, array in (("scales", self.scales), (name, offsets)):
            if array.shape != groups:
                raise ValueError(f"{label}: expected shape {groups}, got {_describe(array)}")
        if self.group_index is not None and self.group_index.shape != (channels,):
            raise ValueError(
                f"group_index: expected [{channels}], got {_describe(self.group_index)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> float:
        """Bytes that the packed codes, scales and biases or zeros take in a file."""
        per_weight = stored_bits(self.bits, self.group_size, self.grid, self.scales.dtype)
        return self.codes.size * per_weight / 8

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights that the codes stand for.

        Returns
        -------
        NDArray
            ``[out, in]`` float32, the same bits on every processor.
        """
        weight = np.empty(self.shape, np.float32)
        _kernels.dequantize(
            self.codes,
            self.scales.astype(np.float32),
            None if self.zeros is None else self.zeros.astype(np.float32),
            None if self.biases is None else self.biases.astype(np.float32),
            self.group_index,
            weight,
        )
        return weight

    def as_affine(self) -> "QuantizedTensor":
        """Return a tensor with a symmetric grid as one with an affine grid, and the same weights."""
        if self.grid != "symmetric":
            raise ValueError(f"grid: expected symmetric, got {self.grid}")
        # A power of two times a scale is exact in the scale's dtype.
        biases = self.scales * self.scales.dtype.type(-(2 ** (self.bits - 1)))
        return replace(self, grid="affine", zeros=None, biases=biases)

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
    scale = 8 * np.dtype(scale_dtype).itemsize
    return bits + (scale + (scale if grid == "affine" else bits)) / group_size


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
