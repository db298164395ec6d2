"""Statistics of what the stages of a model read, gathered while its states move on."""

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks.drift import Drift
from bitwright.errors import NonFiniteError
from bitwright.loading.model import Model
from bitwright.methods.moments import LayerStatistics, Moments, gram
from bitwright.models.block import DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.operations import Float32
from bitwright.runs.states import States

TIED_TOKENS = 4096  # that tell what the head reads, before anything else is quantized


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


def tied_gram(model: Model, tokens: NDArray[np.int32]) -> Float32:
    """Return the metric of an embedding that is the head, too.

    An error Δ of a row changes its logit by Δ · h for every h that the head reads, and the states of its
    token by Δ itself: G / mean diagonal + I weighs both alike. G is that of the original on the first
    tokens; what the embedding is rounded to is known before anything else.

    Parameters
    ----------
    model
        In float.
    tokens
        ``[samples, length]`` int32.
    """
    samples = tokens[: max(1, TIED_TOKENS // tokens.shape[1])]
    hidden = model.embed(samples, model.embedding_table())
    rope = model.rotation(tokens.shape[1])
    for index in range(model.config.num_hidden_layers):
        model.block(index).forward(hidden, rope)
    metric = gram(model.final_norm(hidden))
    mean = float(metric.trace()) / len(metric)
    if not 0 < mean < np.inf:
        return np.eye(len(metric), dtype=np.float32)
    metric /= np.float32(mean)
    metric[np.diag_indices_from(metric)] += 1
    return metric


def require_finite_inputs(finite: bool | np.bool_, model: Model, stage: Stage, index: int) -> None:
    """Raise NonFiniteError, naming a stage of block `index`, unless its inputs are finite."""
    if not finite:
        raise NonFiniteError(
            f"{model.checkpoint.folder}: the inputs of {model.block_prefix(index)}{stage.name} (block "
            f"{index}) are NaN or infinite; check the model with bitwright evaluate"
        )
