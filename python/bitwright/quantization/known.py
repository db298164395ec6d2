"""Statistics that are read from files: those of a folder, or those of a file of activations."""

from collections.abc import Callable, Mapping, Sequence

from bitwright.blocks.equalizing import Equalized
from bitwright.blocks.known_inputs import KnownInputs
from bitwright.blocks.scaling import ScaledBlock, divide_channels
from bitwright.loading.model import Model
from bitwright.methods.method import StageInputs
from bitwright.methods.moments import gram as gram_of
from bitwright.methods.salient import compute_activation_stats
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.operations import Float32
from bitwright.precision.target import Target
from bitwright.quantization.layers import Layers, OwnSolver
from bitwright.quantization.output import QuantizedLayer, Trial
from bitwright.quantization.source import NoStatistics, StatisticsSource
from bitwright.statistics.activation_file import ActivationFile
from bitwright.statistics.folder import Statistics
from bitwright.warned import warn


class ActivationStatistics(NoStatistics):
    """A file of layer inputs; layer by layer, as nothing is moved through the model."""

    is_known = True

    def __init__(self, file: ActivationFile) -> None:
        self._file = file
        self.tokens = file.token_count()
        self.largest_bytes = file.largest_bytes()

    def identity(self) -> Mapping[str, object]:
        return {"activations": self._file.fingerprint()}

    def check(self, model: Model, target: Target) -> None:
        for index, layout in enumerate(model.layouts):
            prefix = model.block_prefix(index)
            for stage in layout.stages:
                for name in stage.linears:
                    if target.is_planned(prefix + name):
                        names = _sharing(prefix, name, stage)
                        self._file.require(names, layout.linears[name][1])
        head = model.names.head
        if target.is_planned(head) and self._file.has(head):
            self._file.require((head,), model.config.hidden_size)
        elif target.is_planned(head):
            warn(f"{self._file.path}: has no activations of {head}, which is rounded without them")

    def head_solver(self, layers: Layers, name: str, scale: Float32) -> OwnSolver:
        if not self._file.has(name):
            return layers.rounding()
        return self._solver(layers, (name,), len(scale), scale)

    def _solvers(
        self, layers: Layers, prefix: str, stage: Stage, block: Equalized
    ) -> Mapping[str, OwnSolver]:
        linears = block.block.layout.linears
        return {
            name: self._solver(
                layers, _sharing(prefix, name, stage), linears[name][1], block.scale(stage)
            )
            for name in stage.linears
            if layers.is_planned(prefix + name)
        }

    def _solver(
        self, layers: Layers, names: Sequence[str], channels: int, scale: Float32 | None
    ) -> OwnSolver:
        inputs = self._file.tokens(names, channels)
        if scale is not None:
            inputs = inputs / scale
        magnitudes = None
        if layers.options.method.uses_magnitudes:
            magnitudes = compute_activation_stats(inputs, layers.options.activation_method)
        return layers.method_solver(StageInputs(gram_of(inputs), magnitudes))


class ImatrixStatistics(NoStatistics):
    """An importance matrix alone: each layer is rounded by the mean squares of its inputs."""

    is_known = True

    def head_solver(self, layers: Layers, name: str, scale: Float32) -> OwnSolver:
        return layers.weighted(name, scale) or layers.rounding()

    def _solvers(
        self, layers: Layers, prefix: str, stage: Stage, block: Equalized
    ) -> Mapping[str, OwnSolver]:
        scale = block.scale(stage)
        return {
            name: layers.weighted(prefix + name, scale) or layers.rounding()
            for name in stage.linears
        }


class FolderStatistics(StatisticsSource):
    """A folder of statistics, which are those of the original's layers."""

    is_known = True

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self.tokens = statistics.tokens

    def identity(self) -> Mapping[str, object]:
        return {"statistics": self._statistics.fingerprint()}

    def quantize_block(self, layers: Layers, index: int, block: Equalized) -> None:
        """Quantize block `index`.

        Whether AWQ's scales are kept, the errors of its layers' outputs decide: the sum of tr(Δ G Δᵀ) over
        all of them, with the scaled gram for scaled weights."""
        inputs = KnownInputs(self._statistics, layers.model, index, block)
        prefix, plain = layers.model.block_prefix(index), block.block
        names = (name for stage in plain.stages for name in stage.linears)
        if layers.awq is None or not layers.plans_any(prefix, names):
            _solve(layers, plain, prefix, inputs, lambda layer, _: layers.output.finish(layer))
            return
        before = _trial(layers, plain, prefix, inputs)
        scaled = layers.scaled_block(plain, prefix, inputs.facts(), Rotation(1, {}))
        plain.weights.clear()
        scaled.scale()
        scaled.forget_grams(layers.options.method.clips)
        after = _trial(layers, scaled.block, prefix, inputs, scaled)
        if layers.output.finish_better(index, before, after, scaled.searches):
            layers.take_scales(prefix, scaled)

    def head_solver(self, layers: Layers, name: str, scale: Float32) -> OwnSolver:
        moments = self._statistics.read(name)
        if moments is None:
            return layers.own_solver(name, None)
        divide_channels(moments.gram, scale)
        return layers.own_solver(name, moments.gram)


def _sharing(prefix: str, name: str, stage: Stage) -> tuple[str, ...]:
    """Return the layers whose inputs are those of a linear, itself first."""
    return (prefix + name, *(prefix + other for other in stage.linears))


def _trial(
    layers: Layers,
    block: DecoderBlock,
    prefix: str,
    inputs: KnownInputs,
    scaled: ScaledBlock | None = None,
) -> Trial:
    """Return the layers of a block, quantized by statistics, and the error of all their outputs."""
    found: list[QuantizedLayer] = []
    errors: list[float] = []

    def finish(layer: QuantizedLayer, gram: Float32 | None) -> None:
        found.append(layer)
        if gram is not None:
            weight = block.weights[f"{layer.name.removeprefix(prefix)}.weight"]
            errors.append(layers.output_error(layer, weight, gram))

    _solve(layers, block, prefix, inputs, finish, scaled)
    return Trial(found, sum(errors))


def _solve(
    layers: Layers,
    block: DecoderBlock,
    prefix: str,
    inputs: KnownInputs,
    finish: Callable[[QuantizedLayer, Float32 | None], None],
    scaled: ScaledBlock | None = None,
) -> None:
    """Quantize a block stage by stage, and hand on each layer with its gram."""
    clips = scaled if layers.options.method.clips else None
    for stage in block.stages:
        if layers.plans_any(prefix, stage.linears):
            gram, few = inputs.gram(stage, None if scaled is None else scaled.scales)

            def own_solver(
                name: str, stage: Stage = stage, gram: Float32 | None = gram
            ) -> OwnSolver | None:
                if gram is None:  # no token ever came here
                    return layers.rounding()
                solve = None if clips is None else clips.clip_solver(stage, name, gram)
                return None if solve is None else OwnSolver(solve, gram)

            def hand_on(layer: QuantizedLayer, gram: Float32 | None = gram) -> None:
                finish(layer, gram)

            layers.quantize_stage(block, prefix, stage, gram, hand_on, own_solver, few_tokens=few)
            del gram, own_solver, hand_on
        block.release(stage)
