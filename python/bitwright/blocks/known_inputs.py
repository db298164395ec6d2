"""What the stages of one block see, by statistics from files: for methods, and for AWQ's scales."""

from collections.abc import Mapping
from dataclasses import replace

from bitwright.blocks.equalizing import Equalized, first_reader
from bitwright.blocks.scaling import StageFacts, divide_channels
from bitwright.loading.model import Model
from bitwright.methods.moments import Moments
from bitwright.models.layout import Stage
from bitwright.models.operations import Float32
from bitwright.statistics.folder import Statistics

FEW_TOKENS = 128  # below so many an expert's gram is that of all tokens


class KnownInputs:
    """Statistics of one block's stages, read when they are asked for.

    Parameters
    ----------
    statistics
        Of the model.
    model, index
        Whose block, and which.
    block
        The same block as it is quantized, whose inputs may be divided by scales.
    """

    def __init__(self, statistics: Statistics, model: Model, index: int, block: Equalized) -> None:
        self._statistics = statistics
        self._block = block
        self._prefix = model.block_prefix(index)
        self._stages = model.layouts[index].stages

    def gram(
        self, stage: Stage, scales: Mapping[Stage, Float32] | None = None
    ) -> tuple[Float32 | None, bool]:
        """Return the gram of a stage, None where no token came, and whether it is an expert with few.

        An expert's first linears then get the gram of all tokens, which are what the router reads. What its
        last one would see of them is in no file, so it has to do with those that came. With `scales`, by
        the stage that reads what they were folded into, the gram is that of the scaled input.
        """
        folded = first_reader(self._stages, stage)
        few = stage.expert is not None and self._record_tokens(stage) < FEW_TOKENS
        moments = self._read(folded if few or not stage.has_own_input else stage)
        if moments is None:
            return None, few
        scale = (scales or {}).get(folded)
        if scale is not None:
            divide_channels(moments.gram, scale)
        return moments.gram, few

    def facts(self) -> dict[Stage, StageFacts]:
        """Return what AWQ's search asks for, as `observe_block` does."""
        found = {}
        for stage in self._stages:
            moments = None if stage.reads_routed else self._read(stage)
            if moments is not None and moments.mean_abs is not None:
                gram = moments.gram
                found[stage] = StageFacts(gram, (gram,), moments.mean_abs, None)
        return found

    def _record_tokens(self, stage: Stage) -> int:
        return self._statistics.stages[self._prefix + stage.name].tokens

    def _read(self, stage: Stage) -> Moments | None:
        moments = self._statistics.read(self._prefix + stage.name)
        scale = self._block.scale(stage)
        if moments is not None and scale is not None:
            divide_channels(moments.gram, scale)
            mean_abs = None if moments.mean_abs is None else moments.mean_abs / scale
            moments = replace(moments, mean_abs=mean_abs)
        return moments
