"""Matrices of a model in memory as they are stored, and products with a few tokens' states."""

from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.errors import NonFiniteError
from bitwright.grids.tensor import QuantizedTensor
from bitwright.loading.model import Model
from bitwright.models.operations import Float32


class StoredMatrix(Protocol):
    """A weight ``[out, in]`` that is multiplied by without being decoded as a whole."""

    shape: tuple[int, int]

    def product(
        self, states: Float32, bias: Float32 | None, out: Float32, add: bool = False
    ) -> None:
        """Write the product with states ``[tokens, in]`` into `out` ``[tokens, out]``, or add it there."""
        ...

    def rows(self, ids: NDArray[np.int32]) -> Float32:
        """Return some rows in float32."""
        ...


class FloatMatrix:
    """A matrix in floats of 16 or 32 bits."""

    def __init__(self, weight: NDArray[Any]) -> None:
        self.weight = weight
        self.shape = weight.shape[0], weight.shape[1]

    def product(
        self, states: Float32, bias: Float32 | None, out: Float32, add: bool = False
    ) -> None:
        """See `StoredMatrix`."""
        _kernels.stored_linear(states, self.weight, bias, out, add)

    def rows(self, ids: NDArray[np.int32]) -> Float32:
        """See `StoredMatrix`."""
        return np.ascontiguousarray(self.weight[ids], np.float32)


class PackedMatrix:
    """A quantized matrix: its codes packed, its scales and what goes with them in the fewest bits.

    Parameters
    ----------
    tensor
        Whose groups are of one size, see `packs`.
    """

    def __init__(self, tensor: QuantizedTensor) -> None:
        codes, blocks = tensor.codes, tensor.superblocks
        self._order: NDArray[np.intp] | None = None
        if tensor.group_index is not None:
            self._order = np.argsort(tensor.group_index, kind="stable")
            codes = codes[:, self._order]
        self._points = tensor.points
        self._numbers: list[NDArray[Any] | None]
        if blocks is None:
            offsets = tensor.zeros if tensor.grid == "zero_point" else tensor.biases
            self._numbers = [_narrow(tensor.scales), _narrow(offsets), None, None]
        else:
            self._numbers = [blocks.scale_codes, blocks.min_codes, blocks.d, blocks.dmin]
        self._numbers = [
            None if each is None else np.ascontiguousarray(each) for each in self._numbers
        ]
        self._zero = float(1 << (tensor.bits - 1)) if tensor.grid == "symmetric" else 0.0
        self.shape, self._bits, self._divisor = tensor.shape, tensor.bits, float(tensor.divisor)
        self._planes = _kernels.pack_planes(np.ascontiguousarray(codes), tensor.bits)
        self._kernel = self._of(slice(None))

    @staticmethod
    def packs(tensor: QuantizedTensor) -> bool:
        """Tell whether the groups of a tensor are all of one size, so that its channels can be ordered by
        them."""
        index = tensor.group_index
        if index is None:
            return True
        counts = np.bincount(index, minlength=tensor.scales.shape[1])
        return bool((counts == tensor.group_size).all())

    def product(
        self, states: Float32, bias: Float32 | None, out: Float32, add: bool = False
    ) -> None:
        """See `StoredMatrix`."""
        if self._order is not None:
            states = np.ascontiguousarray(states[:, self._order])
        _kernels.packed_linear(states, self._kernel, bias, out, add)

    def rows(self, ids: NDArray[np.int32]) -> Float32:
        """See `StoredMatrix`."""
        decoded = np.empty((len(ids), self.shape[1]), np.float32)
        _kernels.decode_packed(self._of(ids), decoded)
        if self._order is None:
            return decoded
        ordered = np.empty_like(decoded)
        ordered[:, self._order] = decoded
        return ordered

    def _of(self, rows: Any) -> _kernels.PackedMatrix:
        scales, *others = self._numbers
        offsets, superscales, supermins = (None if each is None else each[rows] for each in others)
        return _kernels.PackedMatrix(
            self._planes[rows],
            self.shape[1],
            self._bits,
            np.asarray(scales)[rows],
            offsets,
            superscales,
            supermins,
            self._points,
            self._zero,
            self._divisor,
        )


def stored_matrix(
    model: Model, name: str, shape: tuple[int, int], is_quantized: bool
) -> StoredMatrix:
    """Read a matrix of a model, by its name, as it is stored.

    Raises
    ------
    CheckpointError
        If it is absent or has another shape.
    NonFiniteError
        If a value is NaN or infinite.
    """
    if is_quantized:
        tensor = model.stored(name, shape)
        if PackedMatrix.packs(tensor):
            return PackedMatrix(tensor)
        return FloatMatrix(model.weight(name, shape))
    return FloatMatrix(model.floats(name, shape))


def _narrow(array: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return numbers in 16 bits where these hold them exactly."""
    halves = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
    if array is None or array.dtype in (*halves, np.uint8):
        return array
    array = array.astype(np.float32, copy=False)  # of scales in 8 bits, too
    for dtype in halves:
        with np.errstate(over="ignore"):
            small = array.astype(dtype)
        if np.array_equal(small.astype(np.float32), array):
            return small
    return array


def require_finite_logits(logits: Float32, model: Model) -> None:
    """Raise NonFiniteError where a model says nothing."""
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            f"{model.checkpoint.folder}: the logits are not finite; check the weights with "
            f"bitwright evaluate"
        )
