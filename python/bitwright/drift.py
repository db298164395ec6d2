"""Drift correction: weights that make up for what the errors of earlier layers have done to the states."""

import numpy as np

from bitwright import _kernels
from bitwright.models.block import ChunkStates, DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.operations import Float, Float32
from bitwright.statistics import LayerStatistics

DAMPING = 0.1  # of the mean of the gram's diagonal: towards the weights as they are
FEEDBACK = 0.75  # share of the error in the residual stream that a layer is to take back
ENOUGH_TOKENS = 8192  # of which half of the calibration's may be less


def drift_rows(rows: int, rope: Rotation) -> int:
    """Return how many of the calibration's rows are computed in the original model, too: whole chunks."""
    wanted = max(rows // 2, ENOUGH_TOKENS)
    return min(rows, -(-wanted // rope.chunk_rows) * rope.chunk_rows)


class OriginalStream:
    """The hidden states of the original model beside those of the quantized one, in one block.

    Parameters
    ----------
    block
        In float; that its weights are replaced later on does not change what is computed here.
    hidden
        ``[tokens, hidden_size]`` of the first `drift_rows`, moved past the block in place; None where
        nobody asks for it.
    rope
        Rotary tables.
    """

    def __init__(self, block: DecoderBlock, hidden: Float32 | None, rope: Rotation) -> None:
        self._source = block
        self.block = block.with_weights({})
        self._rope = rope
        self._chunks = [] if hidden is None else [ChunkStates(rows) for rows in rope.chunks(hidden)]
        self._done = [0] * len(self._chunks)  # stages of each chunk

    @property
    def chunks(self) -> int:
        """How many chunks, from the first on, are computed here."""
        return len(self._chunks)

    def reach(self, stage: int, number: int) -> ChunkStates:
        """Compute a chunk up to the input of a stage."""
        chunk = self._chunks[number]
        for each in self.block.stages[self._done[number] : stage]:
            self.block.advance(each, self.block.stage_input(each, chunk), chunk, self._rope)
        self._done[number] = max(stage, self._done[number])
        return chunk

    def finish(self, release: bool) -> None:
        """Compute all chunks to the end of the block, with `release` one expert at a time."""
        if not self._chunks:
            return
        for index, stage in enumerate(self.block.stages, 1):
            for number in range(len(self._chunks)):
                self.reach(index, number)
            if release:
                self.block.release(stage)

    def drift(self, stage: Stage | None, statistics: LayerStatistics | None) -> "Drift":
        """Return what gathers how far the quantized stream is from the original in the inputs of a stage.

        Experts are left out, since the two streams may route tokens differently."""
        if not self._chunks or stage is None or stage.expert is not None or statistics is None:
            return Drift(self, None, None)
        for name in stage.linears:
            self.block.weights[f"{name}.weight"] = self._source.weights[f"{name}.weight"]
        return Drift(self, stage, statistics)


class Drift:
    """What correlates the inputs X of a stage with what its outputs should be, and weights made from it.

    Let X_ref be the original's inputs of the same tokens. The weights that best give the original's
    outputs W X_ref are W + W (C − G)(G + λ)⁻¹, with G = XᵀX and C = X_refᵀX (see GPTAQ, Li et al. 2025).
    Where the outputs are added to the hidden states H as they are, they can also take back a part α of the
    error that is there: their targets are T = W X_ref + α (H_ref − H), and the weights
    W + (TᵀX − W G)(G + λ)⁻¹.
    """

    def __init__(
        self, stream: OriginalStream, stage: Stage | None, statistics: LayerStatistics | None
    ) -> None:
        self._stream = stream
        self._stage = stage
        self._statistics = statistics
        self._gram: Float32 | None = None  # G of the tokens that both streams have
        self._cross: Float32 | None = None  # C, or TᵀX
        self._factor: Float32 | None = None  # of G + λ
        self._adds = stage is not None and stream.block.adds_linearly(stage)

    def add(self, number: int, states: Float, hidden: Float) -> None:
        """Add one chunk, just added to the statistics: inputs and hidden states of the quantized stream."""
        if self._stage is None or self._statistics is None or number >= self._stream.chunks:
            return
        # States that overflow are an error of the layer that sees them next; no correction until then.
        with np.errstate(over="ignore", invalid="ignore"):
            self._add(self._stage, self._statistics, number, states, hidden)
            if self._gram is not None and not np.isfinite(np.asarray(self._cross)).all():
                self._cross = None

    def _add(
        self,
        stage: Stage,
        statistics: LayerStatistics,
        number: int,
        states: Float,
        hidden: Float,
    ) -> None:
        block = self._stream.block
        index = block.stages.index(stage)
        chunk = self._stream.reach(index, number)
        if self._adds:
            target = np.float32(FEEDBACK) * (chunk.hidden - hidden) - chunk.hidden
            target += self._stream.reach(index + 1, number).hidden
            target /= np.float32(block.config.residual_scale)
            bias = block.operations.bias(stage.linears[0])
            if bias is not None:
                target -= bias
        else:
            target = block.stage_input(stage, chunk)
        if self._cross is None:
            self._cross = np.zeros((target.shape[1], states.shape[1]), np.float32)
        _kernels.linear_backward_weight(target, states, self._cross)
        if number + 1 == self._stream.chunks:
            self._cross /= np.float32(statistics.tokens)
            self._gram = statistics.so_far()
            if not self._adds:
                self._cross -= self._gram

    def corrected(self, name: str, weight: Float32, gram: Float32) -> Float32:
        """Return what to quantize in place of a layer's weight, `gram` being that of all tokens."""
        if self._cross is None or self._gram is None:
            return weight
        if self._factor is None:
            self._factor = gram.copy()
            damping = DAMPING * gram.diagonal().mean()
            self._factor[np.diag_indices_from(gram)] += np.float32(damping)
            if not (damping > 0 and _kernels.cholesky_factor(self._factor)):
                self._cross = None
                return weight
        change = np.empty_like(weight)
        if self._adds:
            _kernels.linear(weight, self._gram, None, change, False)
            np.subtract(self._cross, change, out=change)
        else:
            _kernels.linear_backward_input(weight, self._cross, change, False)
        _kernels.cholesky_solve(self._factor, change)
        change += weight
        return change
