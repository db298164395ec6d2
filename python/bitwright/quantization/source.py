"""Where the statistics of the layers' inputs come from: a source for each kind of data, one for none."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from bitwright.blocks.equalizing import Equalized
from bitwright.loading.model import Model
from bitwright.models.layout import Stage
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.operations import Float32
from bitwright.precision.target import Target
from bitwright.quantization.layers import Layers, OwnSolver
from bitwright.runs.journal import Journal
from bitwright.runs.states import States


class StatisticsSource(ABC):
    """What the inputs of a model's layers are known from.

    Attributes
    ----------
    tokens
        How many the statistics are of.
    moved
        ``(samples, length)`` of the tokens that are moved through the model; zeros for none.
    is_known
        Whether statistics or inputs are read from files.
    largest_bytes
        The largest array of such a file.
    propagates
        Whether layers see what the quantized ones before them compute.
    """

    tokens: int = 0
    moved: tuple[int, int] = (0, 0)
    is_known: bool = False
    largest_bytes: int = 0
    propagates: bool = False

    def identity(self) -> Mapping[str, object]:
        """Return what decides the result, in words for whoever changes it between two runs."""
        return {}

    def check(self, model: Model, target: Target) -> None:
        """Raise CalibrationError unless the inputs of all layers that are planned are there."""
        return

    def begin(
        self,
        layers: Layers,
        journal: Journal,
        state: Mapping[str, Any] | None,
        table: NDArray[Any] | MatrixRows | None,
        resident: int | None,
    ) -> None:
        """Prepare for the first block that is left; `table` is the quantized embedding."""
        return

    @abstractmethod
    def quantize_block(self, layers: Layers, index: int, block: Equalized) -> None:
        """Quantize block `index`."""

    def kept(self, layers: Layers, index: int) -> Mapping[str, States | None]:
        """Return the states that a run needs to resume after block `index`."""
        return {}

    def tied_solver(self, layers: Layers, name: str) -> OwnSolver | None:
        """Return how to quantize an embedding that is the head, too; None where nothing is known of what
        the head reads."""
        return None

    @abstractmethod
    def head_solver(self, layers: Layers, name: str, scale: Float32) -> OwnSolver:
        """Return how to quantize the head, whose inputs are divided by a scale."""

    def end(self) -> None:
        """Give back memory and files."""
        return


class NoStatistics(StatisticsSource):
    """Nothing is known of the inputs: each layer is quantized by itself."""

    def quantize_block(self, layers: Layers, index: int, block: Equalized) -> None:
        prefix = layers.model.block_prefix(index)
        for stage in block.block.stages:
            solvers = self._solvers(layers, prefix, stage, block)
            layers.quantize_stage(
                block.block, prefix, stage, None, layers.output.finish, solvers.get
            )
            block.block.release(stage)

    def head_solver(self, layers: Layers, name: str, scale: Float32) -> OwnSolver:
        return layers.own_solver(name, None)

    def _solvers(
        self, layers: Layers, prefix: str, stage: Stage, block: Equalized
    ) -> Mapping[str, OwnSolver]:
        """Return how to quantize a stage's linears by what is known of each."""
        return {}
