"""Floats of 8 and 4 bits under scales, decoded piece by piece as they are read: FP8, MXFP4 and NVFP4
checkpoints as float ones.

=========================  ===================================================================
stored                     by
=========================  ===================================================================
weight, weight_scale_inv   DeepSeek-V3, Qwen3-FP8: 8 bits, a scale for each block or tensor
weight, weight_scale       compressed-tensors, fbgemm, modelopt: 8 bits, a scale for each tensor,
                           row or group
…, weight_scale_2          modelopt's NVFP4: 4 bits, a scale of 8 bits for 16 channels, and one
                           that multiplies these
NAME_blocks, NAME_scales   gpt-oss' MXFP4 of stacked experts, which the model has transposed
=========================  ===================================================================

What compressed-tensors packs to 4 bits, and its floats of 8 bits under a scale for each tensor, row or
block of 128 by 128, are on grids that its format reads as they are.
"""

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint, GgufCheckpoint
from bitwright.checkpoint.reader import Made
from bitwright.checkpoint.shard import FLOATS_OF_8_BITS
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.formats.compressed_tensors import CompressedTensorsFormat, fp8_grid
from bitwright.formats.declared import Declared, declaration
from bitwright.grids.choice import FLOAT_DTYPES
from bitwright.models.config import float_config

METHODS = ("fp8", "fbgemm-fp8", "compressed-tensors", "modelopt", "modelopt-fp4", "mxfp4", None)
PIECE = 1 << 20  # values that are decoded at a time
BLOCK = (128, 128)  # of all tools that name none
_SCALES = ("_scale_inv", "_scale")
# Of activations, keys and values, which are not rounded here.
_OF_ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "input_global_scale", "input_zero_point"),
    *("activation_scale", "output_scale", "q_scale", "k_scale", "v_scale"),
)
_FLOAT4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_BYTES = np.arange(256)
_PAIRS = _FLOAT4[np.stack([_BYTES & 15, _BYTES >> 4], axis=1)]  # the low half is the first value
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def decode_scaled_floats(checkpoint: Checkpoint) -> None:
    """Replace floats under scales by what they stand for, which is computed when it is read.

    What config.json says of their quantization is removed from ``checkpoint.config``.

    Raises
    ------
    CheckpointError
        If a scale is absent, or shapes contradict each other.
    UnsupportedModelError
        If the weights were rotated before they were rounded.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return
    declared = declaration(checkpoint)
    if declared is not None and declared.method not in METHODS:
        return
    if declared is not None and _are_read(checkpoint, declared):
        return
    found = [each for name in checkpoint.names() if (each := _scaled(checkpoint, name, declared))]
    if not found and not (declared and declared.method in ("fp8", "fbgemm-fp8")):
        return
    parts = {part for each in found for part in each.parts}
    for name in checkpoint.names():
        is_weight = name.endswith((".weight", "_proj")) and len(checkpoint.shape(name)) > 1
        if is_weight and name not in parts and checkpoint.stored_dtype(name) in FLOATS_OF_8_BITS:
            raise CheckpointError(
                f"{checkpoint.file(name)}: tensor {shown(name)} is in 8 bits, but neither "
                f"{' nor '.join(shown(name + end) for end in _SCALES)} is stored. Fetch the files again"
            )
    if not found:
        return
    if declared is not None and declared.settings.get("transform_config"):
        rotations = declared.settings["transform_config"]
        if not isinstance(rotations, dict) or any(rotations.values()):
            raise UnsupportedModelError(
                f"{declared.named('transform_config')}, which is not computed. Start from the original "
                f"model"
            )
    made = [
        Made(each.parts, each.name, each.dtype, each.shape, _Reader(each).make) for each in found
    ]
    ignored = [name for name in checkpoint.names() if name.rpartition(".")[2] in _OF_ACTIVATIONS]
    made[0] = replace(made[0], parts=(*made[0].parts, *ignored))  # which are gone with them
    checkpoint.replace_all(made)
    # What is packed to 4 bits beside them is still described there.
    if not any(name.endswith(".weight_packed") for name in checkpoint.names()):
        checkpoint.config = float_config(checkpoint.config)


def _are_read(checkpoint: Checkpoint, declared: Declared) -> bool:
    """Tell whether all floats of 8 bits are on grids that compressed-tensors' format reads as they are."""
    groups = declared.settings.get("config_groups")
    if declared.method != CompressedTensorsFormat.name or not isinstance(groups, dict):
        return False
    schemes = [each.get("weights") for each in groups.values() if isinstance(each, dict)]
    if len(schemes) < len(groups) or not all(isinstance(each, dict) for each in schemes):
        return False
    if any(name.rpartition(".")[2] in _OF_ACTIVATIONS for name in checkpoint.names()):
        return False
    floats = [
        name
        for name in checkpoint.names()
        if checkpoint.stored_dtype(name) in FLOATS_OF_8_BITS and f"{name}_scale" in checkpoint
    ]
    return bool(floats) and all(
        name.endswith(".weight")
        and checkpoint.stored_dtype(name) == "F8_E4M3"
        and checkpoint.dtype(f"{name}_scale") in FLOAT_DTYPES
        and fp8_grid(checkpoint.shape(name), checkpoint.shape(f"{name}_scale")) is not None
        for name in floats
    )


@dataclass(frozen=True)
class _Scaled:
    """A tensor of codes ``[rows, columns]``, or a stack of such, and its scales.

    Parameters
    ----------
    name, shape
        Of what is decoded.
    codes, scales
        Names of tensors.
    block
        The rows and columns that a scale is for.
    factor
        Name of the scale of scales, if there is one.
    halves
        Whether a byte holds two values.
    transposed
        Whether what is decoded has the columns first.
    powers
        Whether the scales are powers of two.
    """

    name: str
    shape: tuple[int, ...]
    codes: str
    scales: str
    block: tuple[int, int]
    factor: str | None = None
    halves: bool = False
    transposed: bool = False
    powers: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that it is computed from."""
        return (self.codes, self.scales, *([] if self.factor is None else [self.factor]))

    @property
    def dtype(self) -> str:
        """The smallest that holds all values: of 4 bits under powers of two these have 16."""
        return "BF16" if self.halves and self.powers else "F32"


def _scaled(checkpoint: Checkpoint, name: str, declared: Declared | None) -> _Scaled | None:
    """Return what the tensor `name` is the codes of, if it is of any."""
    layer, _, part = name.rpartition(".")
    dtype, shape = checkpoint.stored_dtype(name), checkpoint.shape(name)
    if name.endswith("_blocks") and dtype == "U8":
        stem = name.removesuffix("_blocks")
        if f"{stem}_scales" not in checkpoint:
            raise CheckpointError(
                f"{checkpoint.file(name)}: tensor {shown(name)} holds blocks of 4 bits, but "
                f"{shown(stem + '_scales')} is not stored. Fetch the files again"
            )
        if len(shape) != 4 or checkpoint.shape(f"{stem}_scales") != shape[:3]:
            raise _contradiction(checkpoint, name, f"{stem}_scales")
        stack = (shape[0], shape[2] * shape[3] * 2, shape[1])
        size = (1, 2 * shape[3])
        return _Scaled(
            stem, stack, name, f"{stem}_scales", size, halves=True, transposed=True, powers=True
        )
    halves = dtype in ("U8", "I8") and part == "weight"
    if not halves and dtype not in FLOATS_OF_8_BITS:
        return None
    scales = next((name + end for end in _SCALES if name + end in checkpoint), None)
    if scales is None or len(shape) not in (2, 3):
        return None
    whole = (*shape[:-1], shape[-1] * (2 if halves else 1))
    whole_factor = f"{layer}.weight_scale_2"
    factor = whole_factor if whole_factor in checkpoint else None
    if factor is not None and len(shape) == 3:
        factor_size = int(np.prod(checkpoint.shape(factor)))
        if factor_size not in (1, shape[0]):
            raise _contradiction(checkpoint, name, factor)
    block = _block(whole, checkpoint.shape(scales), _declared_block(declared))
    if block is None:
        raise _contradiction(checkpoint, name, scales)
    powers = checkpoint.stored_dtype(scales) in ("U8", "F8_E8M0") and factor is None
    return _Scaled(name, whole, name, scales, block, factor, halves, powers=powers)


def _declared_block(declared: Declared | None) -> tuple[int, int] | None:
    """Return the rows and columns under one scale that config.json names."""
    if declared is None:
        return None
    said = declared.settings.get("weight_block_size")
    groups = declared.settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        said = said or (weights.get("block_structure") if isinstance(weights, dict) else None)
    if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
        return said[0], said[1]
    return None


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], declared: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns under one scale; None where the shapes do not say."""
    rows, columns = shape[-2:]
    if len(shape) == 3:
        if int(np.prod(scales)) in (1, shape[0]) and scales[:1] in ((), (1,), (shape[0],)):
            return rows, columns
        if len(scales) != 3 or scales[0] != shape[0]:
            return None
        scales = scales[1:]
    if int(np.prod(scales)) == 1:
        return rows, columns
    if scales == (rows,):
        return 1, columns
    if len(scales) != 2 or 0 in scales:
        return None
    exact = (1, columns // scales[1])
    for block in (declared, exact, BLOCK):
        if block is not None and 0 not in block:
            blocks = -(-rows // block[0]), -(-columns // block[1])
            if blocks == scales and (block != exact or columns % scales[1] == 0):
                return block
    return None


def _contradiction(checkpoint: Checkpoint, codes: str, scales: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.file(codes)}: tensor {shown(codes)} of shape {list(checkpoint.shape(codes))} and its "
        f"scales {shown(scales)} of shape {list(checkpoint.shape(scales))} contradict each other"
    )


@dataclass(frozen=True)
class _Reader:
    of: _Scaled

    def make(self, checkpoint: Checkpoint, ranges: tuple[slice, ...]) -> NDArray[Any]:
        """Return a part of what is decoded."""
        shape = self.of.shape
        places = [each.indices(size)[:2] for each, size in zip(ranges, shape, strict=False)]
        places += [(0, size) for size in shape[len(places) :]]
        sizes = tuple(max(last - first, 0) for first, last in places)
        out = np.empty(sizes, _BFLOAT16 if self.of.dtype == "BF16" else np.float32)
        if len(shape) == 2:
            self._fill(checkpoint, None, places[0], out)
            return out
        for place, index in enumerate(range(*places[0])):
            if self.of.transposed:
                whole = np.empty((shape[2], shape[1]), out.dtype)
                self._fill(checkpoint, index, (0, shape[2]), whole)
                out[place] = whole.T[slice(*places[1])]
            else:
                self._fill(checkpoint, index, places[1], out[place])
        return out

    def _fill(
        self, checkpoint: Checkpoint, index: int | None, rows: tuple[int, int], out: NDArray[Any]
    ) -> None:
        """Decode rows of a matrix, some at a time."""
        of, columns = self.of, out.shape[1]
        scales = self._scales(checkpoint, index)
        height, width = of.block
        step = max(1, PIECE // max(columns, 1))
        for first in range(*rows, step):
            last = min(first + step, rows[1])
            here = slice(first, last)
            ranges = (here,) if index is None else (slice(index, index + 1), here)
            codes = checkpoint.read_ranges(of.codes, ranges)
            if of.halves:
                values = _PAIRS[codes.reshape(last - first, -1).view(np.uint8)].reshape(-1, columns)
            else:
                values = codes.reshape(last - first, columns).astype(np.float32)
            chosen = scales[np.arange(first, last) // height]
            if width < columns:
                chosen = np.repeat(chosen, width, axis=1)[:, :columns]
            out[first - rows[0] : last - rows[0]] = values * chosen

    def _scales(self, checkpoint: Checkpoint, index: int | None) -> NDArray[np.float32]:
        """Return the scales of a matrix as a grid of rows and columns."""
        rows = self.of.shape[-1 if self.of.transposed else -2]
        scales = _of_matrix(checkpoint, self.of.scales, index)
        factor, place = np.float32(1), self.of.scales
        if self.of.factor is not None:
            factor = _of_matrix(checkpoint, self.of.factor, index).reshape(-1)[0]
            place = self.of.factor
        with np.errstate(all="ignore"):
            scales = scales * factor
        # A group of zeros may have the scale 0, but not all groups of a tensor.
        positive = scales >= 0 if self.of.factor is not None and factor > 0 else scales > 0
        wrong = ~(positive & np.isfinite(scales))
        if wrong.any():
            raise CheckpointError(
                f"{checkpoint.file(place)}: tensor {shown(place)}: {int(wrong.sum())} of its scales "
                f"are zero, negative, infinite or NaN, the first is {scales[wrong][0]}. Fetch the file "
                f"again"
            )
        return scales.reshape(-(-rows // self.of.block[0]), -1)


def _of_matrix(checkpoint: Checkpoint, name: str, index: int | None) -> NDArray[np.float32]:
    """Return scales as numbers, those of one matrix of a stack where there are any; bytes are powers of
    two."""
    shape = checkpoint.shape(name)
    if index is not None and shape and shape[0] > 1:
        array = checkpoint.read_ranges(name, (slice(index, index + 1),))
    else:
        array = checkpoint.read(name)
    if array.dtype == np.uint8:
        array = array.view(ml_dtypes.float8_e8m0fnu)
    return array.astype(np.float32)
