"""Quantized layers whose scales and biases, or zeros, are trained."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.errors import UnsupportedModelError
from bitwright.formats.gguf import BLOCK
from bitwright.grids.choice import rounded_scales
from bitwright.grids.tables import over_rows, row_starts, shares_rows
from bitwright.grids.tensor import QuantizedTensor, SuperBlocks
from bitwright.loading.model import Model
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.operations import Float, Float32

Zeros = Literal["fixed", "project"]
ZEROS: tuple[Zeros, ...] = ("fixed", "project")
PACE = np.float32(16)
SCALES = (".scales", ".weight_scale", ".s")  # one number for each group; of gguf there are none


class TrainedTensor:
    """The scales and biases, or zeros, of a `QuantizedTensor` as parameters.

    With c̄ the middle code, w = s (c − c̄) + m. Trained are s and m, both in units of the group's first
    |s|: s by a relative change, m in steps of c̄ / 2, about the spread of the codes, so that equal changes
    of both move the weights equally far. A learning rate counts `PACE` times, so that the usual 1e-4 to
    1e-3 are the right ones for runs of some 50 to 500 steps. The forward pass uses what would be stored;
    gradients pass the rounding as if it were not there.

    Parameters
    ----------
    tensor
        Where it starts. Its codes stay.
    zeros
        Of an integer grid: ``"fixed"``, or ``"project"`` to train them as if they were real and round them.
    """

    def __init__(self, tensor: QuantizedTensor, zeros: Zeros = "fixed") -> None:
        self.start = tensor
        self.dtype = tensor.scales.dtype
        self.middle = np.float32((2**tensor.bits - 1) / 2)
        self.scales = tensor.scales.astype(np.float32)
        self.units = PACE * np.abs(self.scales)
        self.offsets = None if tensor.biases is None else tensor.biases.astype(np.float32)
        self.moves_zeros = tensor.zeros is not None and zeros == "project"
        rows = 2 if self.offsets is not None or self.moves_zeros else 1
        self.parameters = np.zeros((rows, *tensor.scales.shape), np.float32)
        # Σ code · dw and Σ dw of every group.
        self.sums = np.zeros((2, *tensor.scales.shape), np.float32)
        channels = np.arange(tensor.shape[1], dtype=np.int32)
        self.group_of = (
            channels // np.int32(tensor.group_size)
            if tensor.group_index is None
            else tensor.group_index
        )

    @np.errstate(over="ignore", invalid="ignore")  # the loss tells
    def tensor(self) -> QuantizedTensor:
        """Return the tensor as it would be stored now."""
        start, moved = self.start, self.parameters
        scales = rounded_scales(self.scales + self.units * moved[0], self.dtype)
        if self.offsets is not None:
            change = (scales.astype(np.float32) - self.scales) * self.middle
            means = self.units * (self.middle / 2) * moved[1]
            biases = (self.offsets + means - change).astype(self.dtype)
            return replace(start, scales=scales, biases=biases)
        if self.moves_zeros and start.zeros is not None:
            # From 1, as version 1 of the GPTQ layout has no room for 0; it has for one more at the end.
            real = start.zeros.astype(np.float32) - PACE * (self.middle / 2) * moved[1]
            end = np.maximum(start.zeros, 2**start.bits - 1)
            zeros = np.clip(np.rint(real), np.minimum(start.zeros, 1), end)
            grid: Literal["symmetric", "zero_point"] = "zero_point"
            if (zeros == 1 << (start.bits - 1)).all():
                grid = "symmetric"
            return replace(start, scales=scales, zeros=zeros.astype(np.uint8), grid=grid)
        return replace(start, scales=scales)

    def add_gradient(self, inputs: Float32, above: Float32) -> None:
        """Accumulate the gradient from inputs ``[tokens, in]`` and that of outputs ``[tokens, out]``."""
        codes, groups = self.start.codes, self.group_of
        by_code, by_weight = self.sums
        _kernels.linear_backward_groups(
            above, inputs, codes, groups, by_code, by_weight, self.start.points
        )

    def add_row_gradient(self, rows: NDArray[np.int32], above: Float32) -> None:
        """Add the gradients ``[tokens, in]`` of these rows: of an embedding."""
        groups = self.sums.shape[2]
        order = np.argsort(self.group_of, kind="stable")  # groups of equal size, one after another
        parts = above[:, order].reshape(len(rows), groups, -1)
        codes = self.start.codes[rows][:, order].reshape(parts.shape)
        points = codes if self.start.points is None else self.start.points[codes]
        np.add.at(self.sums[0], rows, (parts * points).sum(axis=2))
        np.add.at(self.sums[1], rows, parts.sum(axis=2))

    @np.errstate(over="ignore", invalid="ignore")
    def gradient(self) -> Float32:
        """Return the gradient of the parameters, and reset it."""
        by_code, by_weight = self.sums
        result = np.empty_like(self.parameters)
        if self.offsets is not None:
            result[0] = self.units * (by_code - self.middle * by_weight)
            result[1] = self.units * (self.middle / 2) * by_weight
        else:
            tensor = self.tensor()
            zeros = tensor.grids()[1]
            result[0] = self.units * (by_code - zeros * by_weight) / np.float32(tensor.divisor)
            if self.moves_zeros:
                scales = tensor.scales.astype(np.float32)
                result[1] = PACE * (self.middle / 2) * scales * by_weight
        if shares_rows(self.start.grid):  # then they move together
            starts = row_starts(self.start.grid, result.shape[1])
            together = np.add.reduceat(result[0], starts, axis=0)
            result[0] = over_rows(self.start.grid, together, result.shape[1])
        self.sums[...] = 0
        return result


class TrainedSuperBlocks(TrainedTensor):
    """The scales of scales, and of mins, of superblocks as parameters; all codes stay.

    Trained are relative changes: of d and dmin together, which moves weights in proportion, and of dmin.
    """

    def __init__(self, tensor: QuantizedTensor, blocks: SuperBlocks) -> None:
        super().__init__(tensor)
        self.blocks = blocks
        self.parameters = np.zeros((1 if blocks.dmin is None else 2, *blocks.d.shape), np.float32)

    @np.errstate(over="ignore", invalid="ignore")
    def tensor(self) -> QuantizedTensor:
        """Return the tensor as it would be stored now."""
        blocks, factor = self.blocks, 1 + PACE * self.parameters[0]
        moved = replace(blocks, d=rounded_scales(blocks.d * factor, np.dtype(np.float16)))
        if blocks.dmin is not None:
            shift = PACE / 2 * self.parameters[1]
            mins = rounded_scales(blocks.dmin * (factor + shift), np.dtype(np.float16))
            moved = replace(moved, dmin=mins)
        scales, biases = moved.scales(), moved.biases()
        return replace(self.start, scales=scales, biases=biases, superblocks=moved)

    def gradient(self) -> Float32:
        """Return the gradient of the parameters, and reset it."""
        by_code, by_weight = self.sums
        if self.start.zeros is not None:
            by_code = by_code - self.start.zeros * by_weight
        result = np.empty_like(self.parameters)
        by_scale = self._summed(self.scales * by_code)
        result[0] = PACE * by_scale
        if self.offsets is not None:
            by_bias = self._summed(self.offsets * by_weight)
            result[0] += PACE * by_bias
            result[1] = PACE / 2 * by_bias
        self.sums[...] = 0
        return result

    def _summed(self, groups: Float32) -> Float32:
        """Sum the groups' gradients over each superblock."""
        sums: Float32 = groups.reshape(*self.blocks.d.shape, -1).sum(axis=2)
        return sums


def _trained(tensor: QuantizedTensor, zeros: Zeros) -> TrainedTensor:
    if tensor.superblocks is not None:
        return TrainedSuperBlocks(tensor, tensor.superblocks)
    return TrainedTensor(tensor, zeros)


def trained_bytes(model: Model, student: Model | None, zeros: Zeros) -> tuple[int, int]:
    """Return what a student of a model is in training, and what a step's gradients take.

    The first is its codes and, of each group, scales and biases or zeros as they are stored and in float32,
    sums, and the parameters with their best and the two means of Adam.

    Parameters
    ----------
    model
        The teacher.
    student
        None where it is yet to be made: all its linears then have affine grids in groups of 64.
    zeros
        See `TrainedTensor`.
    """
    layers = model.linear_shapes() if student is None else student.quantized_layers()
    weights = sum(out * channels for out, channels in layers.values())
    groups, affine = weights // 64, True
    if student is not None:
        parts = student.packed_tensors()
        scales = [name for name in parts if name.endswith(SCALES)]
        groups = sum(math.prod(student.checkpoint.shape(name)) for name in scales)
        groups = groups or weights // BLOCK
        affine = any(name.endswith(".biases") for name in parts)
    trained = 2 if affine or zeros == "project" else 1
    in_float = 2 + affine + 2 + 4 * trained
    return weights + groups * (4 * in_float + (4 if affine else 3)), groups * 4 * trained


class Student:
    """A quantized model in training: a source of weights for `Network`, and where its gradients go.

    Parameters
    ----------
    model
        Quantized, in any format that is read. Its codes are in memory, one byte per weight.
    zeros
        See `TrainedTensor`.

    Raises
    ------
    UnsupportedModelError
        If no layer of the model is quantized.
    """

    def __init__(self, model: Model, zeros: Zeros = "fixed") -> None:
        self.model = model
        self._in_blocks = set(model.linear_shapes())
        names = [*model.linear_shapes(), model.embedding_name, model.head_name]
        found = {name: model.quantized(name) for name in dict.fromkeys(names)}
        self.tensors = {
            name: _trained(tensor, zeros) for name, tensor in found.items() if tensor is not None
        }
        if not self.tensors:
            raise UnsupportedModelError(
                f"{model.checkpoint.folder}: none of its layers is quantized, so there are no scales to "
                f"train; quantize it first (bitwright quantize), or let bitwright dwq do so (without "
                f"--reference)"
            )
        self._matrices: dict[str, Float32] = {}

    @property
    def parameters(self) -> dict[str, Float32]:
        """The trained parameters by layer; change them in place."""
        return {name: tensor.parameters for name, tensor in self.tensors.items()}

    def weight(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Return the matrix of a layer as it would be read back."""
        if name in self.tensors:
            return self.tensors[name].tensor().dequantize()
        if name in self._in_blocks:
            return self.model.weight(name, shape)
        if name not in self._matrices:  # routers, which are used in every step
            self._matrices[name] = self.model.weight(name, shape)
        return self._matrices[name]

    def rows(self, name: str) -> MatrixRows:
        """Return the rows of embedding or head as they would be read back."""
        if name in self.tensors:
            tensor = self.tensors[name].tensor()
            return MatrixRows(tensor.dequantize, tensor.shape, f"layer {name}")
        return self.model.rows(name)

    def add_gradient(self, name: str, inputs: Float, above: Float) -> None:
        """Accumulate the gradient of a linear, given its inputs and the gradient of its outputs."""
        if name in self.tensors:
            self.tensors[name].add_gradient(inputs, above)

    def add_row_gradient(self, rows: NDArray[np.int32], above: Float) -> None:
        """Add the gradients of rows of the embedding."""
        if self.model.embedding_name in self.tensors:
            self.tensors[self.model.embedding_name].add_row_gradient(rows, above)

    def gradients(self) -> dict[str, Float32]:
        """Return the gradients of the parameters, and reset them."""
        return {name: tensor.gradient() for name, tensor in self.tensors.items()}

    def restore(self, parameters: Mapping[str, Float32]) -> None:
        """Set the parameters."""
        for name, array in parameters.items():
            self.tensors[name].parameters[...] = array

    def stored(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of the checkpoint that training has changed, by name."""
        form = self.model.format
        if form is None:
            return {}
        changed: dict[str, NDArray[Any]] = {}
        stacks: dict[str, list[NDArray[Any]]] = {}
        for name, trained in self.tensors.items():
            place = self.model.experts.get(name)
            stacked = place is not None and f"{place.stacked_name}.weight" in self.model.checkpoint
            if place is None or not stacked:
                changed.update(form.pack_grid(name, trained.tensor()))
                continue
            for part, array in form.pack_grid(place.stacked_name, trained.tensor()).items():
                stacks.setdefault(part, []).append(array)  # experts come in their order
        return changed | {part: np.stack(arrays) for part, arrays in stacks.items()}
