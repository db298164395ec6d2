"""Drift correction: weights that make up for what the errors of earlier layers do to a layer's inputs."""

import numpy as np

from bitwright import _kernels
from bitwright.methods.gptq import factor_gram
from bitwright.models.block import ChunkStates, DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.operations import Float32
from bitwright.statistics import LayerStatistics

DAMPING = 0.1  # of the mean of the gram's diagonal: towards the weights as they are


class OriginalStream:
    """The hidden states of the original model beside those of the quantized one, in one block.

    Parameters
    ----------
    block
        In float.
    hidden
        ``[tokens, hidden_size]``, moved past the block in place; None where nobody asks for it.
    rope
        Rotary tables.
    """

    def __init__(self, block: DecoderBlock, hidden: Float32 | None, rope: Rotation) -> None:
        self.block = block
        self.rope = rope
        self.chunks = [] if hidden is None else [ChunkStates(rows) for rows in rope.chunks(hidden)]

    def advance(self, stage: Stage, number: int) -> None:
        """Compute a stage for one chunk."""
        if self.chunks:
            chunk = self.chunks[number]
            self.block.advance(stage, self.block.stage_input(stage, chunk), chunk, self.rope)

    def drift(self, stage: Stage | None, statistics: LayerStatistics | None) -> "Drift":
        """Return what gathers how far the quantized stream's inputs of a stage are from the original's.

        Experts are left out, since the two streams may route tokens differently."""
        watched = self.chunks and stage is not None and stage.expert is None
        return Drift(self, stage if watched and statistics is not None else None)


class Drift:
    """Cross-gram of the inputs of a stage in both streams, and weights that make up for their difference.

    The weights that best give the original's outputs W X_ref from the quantized stream's X are
    W + (W C − W G)(G + λ)⁻¹, with G = XᵀX and C = X_refᵀX (compare GPTAQ, Li et al. 2025)."""

    def __init__(self, stream: OriginalStream, stage: Stage | None) -> None:
        self.stream = stream
        self.stage = stage
        self.cross: Float32 | None = None  # XᵀX_ref
        self.tokens = 0
        self.factor: Float32 | None = None

    def add(self, number: int, states: Float32) -> None:
        """Add one chunk's inputs in the quantized stream."""
        if self.stage is None:
            return
        original = self.stream.block.stage_input(self.stage, self.stream.chunks[number])
        if self.cross is None:
            self.cross = np.zeros((states.shape[1], states.shape[1]), np.float32)
        _kernels.linear_backward_weight(states, original, self.cross)
        self.tokens += len(states)

    def corrected(self, name: str, weight: Float32, gram: Float32) -> Float32:
        """Return what to quantize in place of a layer's weight."""
        if self.cross is None:
            return weight
        if self.factor is None:
            self.factor = factor_gram(gram, damping=DAMPING, act_order=False).upper
            self.cross /= np.float32(self.tokens)
        change = np.empty_like(weight)
        _kernels.linear(
            self.stream.block.weights[f"{name}.weight"], self.cross, None, change, False
        )
        _kernels.linear(np.ascontiguousarray(-weight), gram, None, change, True)
        half = np.empty_like(weight)
        _kernels.linear(change, self.factor, None, half, False)
        target = weight.copy()
        _kernels.linear(half, np.ascontiguousarray(self.factor.T), None, target, True)
        return target
