"""What a run writes, layer by layer, and what is reported of it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.arrays import require_finite
from bitwright.checkpoint import Checkpoint, CheckpointWriter
from bitwright.checkpoint.fingerprint import digest
from bitwright.checkpoint.reader import written_dtype
from bitwright.errors import OutputError
from bitwright.formats import Format
from bitwright.grids.choice import FLOAT_DTYPES
from bitwright.grids.tensor import QuantizedTensor
from bitwright.loading.model import load_model
from bitwright.methods.awq import ScaleSearch
from bitwright.methods.gptq import GptqTensor
from bitwright.models.layout import ExpertPlace
from bitwright.process.memory import peak_memory_bytes
from bitwright.ranks import current
from bitwright.records.reports import BlockReport, LayerReport, QuantizationReport

Float32 = NDArray[np.float32]
ERROR_ROWS = 64  # output rows that a layer's reported error is estimated on
SMALLEST_ENERGY = 1e-25
MLX_FLOOR = np.float32(1e-7)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer that is ready to be written."""

    name: str
    tensor: QuantizedTensor
    error: float
    few_tokens: bool = False
    power: int = 0
    coarse: bool = False
    error_before: float | None = None  # of what the layer was quantized to before
    wide: bool = False


@dataclass(frozen=True, eq=False)
class Trial:
    """The layers of a block in one form, and how far what they compute is from the original."""

    layers: Sequence[QuantizedLayer]
    loss: float


class Output:
    """The layers and tensors that a run has written so far.

    Parameters
    ----------
    writer, format
        Where they go, and as what; without a writer they are only reported.
    experts
        Layers that the format stores as one tensor per stack: they are collected until all are there.
    stack_size
        The number of experts in a stack.
    nested
        Whether the language model is a part of a multimodal one.
    family
        Its family.
    """

    def __init__(
        self,
        writer: CheckpointWriter | None,
        format: type[Format],
        experts: Mapping[str, ExpertPlace] | None = None,
        stack_size: int = 0,
        nested: bool = False,
        family: str = "",
    ) -> None:
        self.format = format
        self._nested, self._family = nested, family
        self.layers: list[LayerReport] = []
        self.blocks: list[BlockReport] = []
        self.divided: list[str] = []  # by powers of two, for others to be large enough
        self._writer = writer
        self.experts = experts or {}
        self._stack_size = stack_size
        self._layer_bytes = 0.0
        self._layer_weights = 0
        self._ranks = current()
        self._digests: dict[str, str] = {}
        self.size_bytes = 0

    def with_stacks(self, found: set[str], names: Iterable[str]) -> set[str]:
        """Return some layers, with those of `names` that are stored as one tensor with any of them."""
        experts = self.experts
        stacks = {experts[name].stacked_name for name in found if name in experts}
        return found | {
            name for name in names if name in experts and experts[name].stacked_name in stacks
        }

    def finish(self, layer: QuantizedLayer) -> None:
        """Write and report a layer."""
        tensor = layer.tensor
        place = self.experts.get(layer.name)
        if self._ranks.size > 1 and len(self.layers) % self._ranks.size == self._ranks.rank:
            self._digests[layer.name] = digest(tensor.dequantize().data)
        if self._writer is None:
            pass
        elif place is None:
            for part, array in self.format.pack(layer.name, tensor).items():
                self.add(part, array)
        else:
            for part, array in self.format.pack(place.stacked_name, tensor).items():
                name = self.format.name_written(part, self._nested)
                self._writer.add_part(name, array, place.index, self._stack_size)
                self.size_bytes += array.nbytes
        self._layer_bytes += tensor.nbytes
        self._layer_weights += tensor.codes.size
        damping = tensor.damping if isinstance(tensor, GptqTensor) else None
        self.layers.append(
            LayerReport(
                layer.name,
                tensor.bits,
                tensor.group_size,
                layer.error,
                damping,
                layer.few_tokens,
                layer.power,
                layer.coarse,
                groups_below_floor(tensor),
                layer.error_before,
                layer.wide,
            )
        )

    def finish_better(
        self, index: int, plain: Trial, scaled: Trial, searches: Mapping[str, ScaleSearch]
    ) -> bool:
        """Write and report the better form of block `index`; tell whether it is that with AWQ's scales."""
        kept = scaled.loss < plain.loss
        for layer in (scaled if kept else plain).layers:
            self.finish(layer)
        self.blocks.append(BlockReport(index, plain.loss, scaled.loss, kept, dict(searches)))
        return kept

    def carry(
        self,
        checkpoint: Checkpoint,
        name: str,
        changed: dict[str, Float32],
        target: str | None = None,
    ) -> None:
        """Write a tensor as it is, or as it was `changed`, rounded to the dtype that it is stored in;
        floats that engines do not load become such as they do."""
        if self._writer is None:
            changed.pop(name, None)
            return
        array = checkpoint.read(name)
        array = array.astype(written_dtype(array.dtype), copy=False)
        if name in changed:
            array = changed.pop(name).astype(array.dtype)
        if array.dtype in FLOAT_DTYPES:
            require_finite(array, f"{checkpoint.file(name)}: tensor {name}")
        self.add(target or name, array)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Write a tensor; of experts in float, where the format has nothing but stacks, a part of one."""
        place = self.experts.get(name.removesuffix(".weight"))
        if self._writer is not None and place is not None and self.format.own_container:
            stack = self.format.name_written(f"{place.stacked_name}.weight", self._nested)
            self._writer.add_part(stack, array, place.index, self._stack_size)
            self.size_bytes += array.nbytes
        elif self._writer is not None:
            array = self.format.array_written(name, array, self._family)
            self._writer.add(self.format.name_written(name, self._nested), array)
            self.size_bytes += array.nbytes

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, for JSON, between two blocks."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "blocks": [block.as_dict() for block in self.blocks],
            "divided": self.divided,
            "layer_bytes": self._layer_bytes,
            "layer_weights": self._layer_weights,
            "size_bytes": self.size_bytes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of another run's."""
        self.layers = [LayerReport(**layer) for layer in state["layers"]]
        self.blocks = [BlockReport.from_dict(block) for block in state["blocks"]]
        self.divided = list(state["divided"])
        self._layer_bytes = state["layer_bytes"]
        self._layer_weights = state["layer_weights"]
        self.size_bytes = state["size_bytes"]

    def verify(self, out: str | os.PathLike[str]) -> None:
        """Compare what was written with what several ranks have computed, each its share of the layers.

        Raises
        ------
        OutputError
            If a layer has other weights.
        """
        if self._ranks.size == 1:
            return
        self._ranks.barrier()
        written = load_model(out)
        for name, known in self._digests.items():
            target = self.format.name_written(name, self._nested)
            tensor = written.quantized(name) or written.quantized(target)
            if written.names.embedding in (name, target):
                tensor = written.quantized(written.embedding_name)
            if tensor is None or digest(tensor.dequantize().data) != known:
                raise OutputError(
                    f"{out}: layer {name} is not what rank {self._ranks.rank} has computed; do all ranks "
                    f"see the same folder?"
                )
        self._ranks.barrier()

    def report(
        self,
        out: Path,
        method: str,
        checkpoint: Checkpoint,
        parameters: int,
        tokens: int,
        seconds: float,
    ) -> QuantizationReport:
        """Sum up the run."""
        return QuantizationReport(
            out=out,
            method=method,
            format=self.format.name,
            layers=tuple(self.layers),
            blocks=tuple(self.blocks),
            layer_bits_per_weight=8 * self._layer_bytes / self._layer_weights,
            bits_per_weight=8 * self.size_bytes / parameters,
            size_bytes=self.size_bytes,
            original_bytes=checkpoint.stored_bytes(),
            calibration_tokens=tokens,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )


def block_error(layers: Sequence[LayerReport]) -> str:
    """Say how large the errors of a block's layers are."""
    if not layers:
        return "block left in float"
    return f"block error {max(layer.error for layer in layers):.2e}"


def groups_below_floor(tensor: QuantizedTensor) -> int:
    """Count the groups of an affine grid whose scale is smaller than MLX's own rounding has."""
    if tensor.biases is None or tensor.superblocks is not None:
        return 0
    below = np.abs(tensor.scales.astype(np.float32)) < MLX_FLOOR
    if not below.any():
        return 0
    codes = tensor.codes.reshape(*tensor.scales.shape, -1)[below]
    return int((codes.min(axis=1) < codes.max(axis=1)).sum())


def summed(energies: Sequence[tuple[float, float]]) -> float:
    """Return the relative error of pieces from their `error_energies`; 0 for zeros."""
    error, energy = map(sum, zip(*energies, strict=True))
    return error / energy if energy > 0 else 0.0


def relative_error(weight: Float32, stored: Float32, gram: Float32 | None) -> float:
    """Return ``tr(Δ G Δᵀ) / tr(W G Wᵀ)`` from `error_energies`; 0 for a layer of zeros."""
    return summed([error_energies(weight, stored, gram)])


def error_energies(
    weight: Float32, stored: Float32, gram: Float32 | None, first: int = 0, out: int | None = None
) -> tuple[float, float]:
    """Return ``tr(Δ G Δᵀ)`` and ``tr(W G Wᵀ)``, Δ = `stored` − `weight`, of at most 64 evenly spaced rows.

    Without a gram the identity takes its place. Where these are a rank's rows, `first` is the place of the
    first of them among `out`.
    """
    chosen = sampled_rows(first, out or len(weight))
    return energies_of_sample(weight[chosen], stored[chosen], gram)


def sampled_rows(first: int, out: int) -> slice:
    """Return which rows errors are estimated on, of those from `first` on among `out`."""
    step = -(-out // ERROR_ROWS)
    return slice(-first % step, None, step)


def energies_of_sample(
    weight: Float32, stored: Float32, gram: Float32 | None
) -> tuple[float, float]:
    """Return `error_energies` of rows that are chosen already."""
    rows = np.ascontiguousarray(weight)
    if len(rows) == 0:
        return 0.0, 0.0
    change = stored - rows
    error, energy = (
        float(
            _kernels.inner_product(each, each)
            if gram is None
            else _kernels.row_quadratic_forms(each, gram).sum()
        )
        for each in (change, rows)
    )
    if gram is None and energy < SMALLEST_ENERGY:  # squares of which float32 has not enough
        error, energy = (float(np.square(each, dtype=np.float64).sum()) for each in (change, rows))
    return error, energy
