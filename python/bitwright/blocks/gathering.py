"""Statistics of what the stages of a model read, gathered while its states move on."""

import numpy as np

from bitwright.blocks.drift import Drift
from bitwright.errors import NonFiniteError
from bitwright.loading.model import Model
from bitwright.methods.moments import LayerStatistics, Moments
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.runs.states import States


def advance(
    block: DecoderBlock,
    stage: Stage | None,
    following: Stage | None,
    states: States,
    rope: Rotation,
    statistics: LayerStatistics | None,
    drift: Drift | None = None,
) -> None:
    """Compute a stage, chunk by chunk, and gather what the following one sees."""
    drifts = drift is not None and drift.is_gathered
    first_part = drift.chunks if drift is not None and drifts else len(states) + 1
    for place, chunk in enumerate(states.chunks()):
        if stage is not None:
            block.advance(stage, block.stage_input(stage, chunk), chunk, rope)
        if following is not None and statistics is not None:
            if place == first_part:
                statistics.end_first_part()
            leaf = states.plan.leaf(states.plan.numbers[place])
            inputs = block.stage_input(following, chunk)
            statistics.add(inputs, leaf)
            if drift is not None:
                drift.add(place, inputs, chunk.hidden, leaf)
    if statistics is not None and drifts and len(states) <= first_part:
        statistics.end_first_part()


def head_moments(model: Model, states: States, magnitudes: bool = False) -> Moments:
    """Return the statistics of what the head reads, from the states after the last block."""
    statistics = LayerStatistics(model.config.hidden_size, magnitudes)
    for number, hidden in zip(states.plan.numbers, states.hidden(), strict=True):
        statistics.add(model.final_norm(hidden), states.plan.leaf(number))
    return statistics.gather()


def require_finite_inputs(finite: bool | np.bool_, model: Model, stage: Stage, index: int) -> None:
    """Raise NonFiniteError, naming a stage of block `index`, unless its inputs are finite."""
    if not finite:
        raise NonFiniteError(
            f"{model.checkpoint.folder}: the inputs of {model.block_prefix(index)}{stage.name} (block "
            f"{index}) are NaN or infinite; check the model with bitwright evaluate"
        )
