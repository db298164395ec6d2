"""Drift correction: weights that make up for what the errors of earlier layers have done to the states."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bitwright import _kernels
from bitwright.methods.moments import LayerStatistics, Moments
from bitwright.models.block import ChunkStates, DecoderBlock, Rotation
from bitwright.models.layout import Stage
from bitwright.models.operations import Float, Float32
from bitwright.products import add_cross_gram
from bitwright.ranks import Sum
from bitwright.runs.states import States

DAMPING = 0.1  # of the mean of the gram's diagonal: towards the weights as they are
FEEDBACK = 0.75  # share of the error in the residual stream that a layer is to take back
LARGEST = 16.0  # change of a row that is still taken for a correction, times the row's own norm
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
        In float; its weights are read again, and that they are replaced in it does not change what is
        computed here.
    states
        Of the first chunks, of `drift_rows` together, moved past the block in place; None where nobody
        asks for it.
    rope
        Rotary tables.
    """

    def __init__(self, block: DecoderBlock, states: States | None, rope: Rotation) -> None:
        self.states = states
        self.block = block.as_read()
        self._rope = rope
        self._done = [0] * self.chunks  # stages of each chunk

    @property
    def chunks(self) -> int:
        """How many chunks, from the first on, are computed here."""
        return 0 if self.states is None else len(self.states)

    @contextmanager
    def opened(self, place: int) -> Iterator[ChunkStates]:
        """Yield a chunk, which is stored again when the block ends well."""
        if self.states is None:
            raise ValueError("states: there are none")
        with self.states.opened(place) as chunk:
            yield chunk

    def reach(self, stage: int, place: int, chunk: ChunkStates) -> None:
        """Compute an opened chunk up to the input of a stage."""
        for each in self.block.stages[self._done[place] : stage]:
            self.block.advance(each, self.block.stage_input(each, chunk), chunk, self._rope)
        self._done[place] = max(stage, self._done[place])

    def release(self) -> None:
        """Forget the weights that all chunks are past."""
        for stage in self.block.stages[: min(self._done, default=0)]:
            self.block.release(stage)

    def finish(self) -> None:
        """Compute all chunks to the end of the block, stage by stage."""
        if self.states is None:
            return
        for index, stage in enumerate(self.block.stages, 1):
            for place in range(self.chunks):
                if self._done[place] < index:
                    with self.opened(place) as chunk:
                        self.reach(index, place, chunk)
            self.block.release(stage)
        self.states.forget_inner()

    def drift(self, stage: Stage | None, statistics: LayerStatistics | None) -> "Drift":
        """Return what gathers how far the quantized stream is from the original in the inputs of a stage.

        Experts are left out, since the two streams may route tokens differently."""
        if self.states is None or stage is None or stage.expert is not None or statistics is None:
            return Drift(self, None)
        return Drift(self, stage)


class Drift:
    """What correlates the inputs X of a stage with what its outputs should be, and weights made from it.

    Let X_ref be the original's inputs of the same tokens. The weights that best give the original's
    outputs W X_ref are W + W (C − G)(G + λ)⁻¹, with G = XᵀX and C = X_refᵀX,
    the cross-gram. GPTAQ (Li et al. 2025, arXiv:2504.02692) has the same objective, inside GPTQ's loop;
    QEP (Arai and Ichikawa 2025, arXiv:2504.09629) corrects weights before the method, as here.
    Where the outputs are added to the hidden states H as they are, they can also take back a part α of the
    error that is there: their targets are T = W X_ref + α (H_ref − H), and the weights
    W + (TᵀX − W G)(G + λ)⁻¹.
    """

    def __init__(self, stream: OriginalStream, stage: Stage | None) -> None:
        self._stream = stream
        self._stage = stage
        self._sum: Sum | None = None
        self._gram: Float32 | None = None  # G of the tokens that both streams have
        self._cross: Float32 | None = None  # C, or TᵀX
        self._factor: Float32 | None = None  # of G + λ
        self._adds = stage is not None and stream.block.adds_linearly(stage)
        if stage is not None:
            out, channels = stream.block.layout.linears[stage.linears[0]]
            self._sum = Sum((out if self._adds else channels, channels))

    @property
    def is_gathered(self) -> bool:
        """Whether there is anything to gather."""
        return self._stage is not None

    @property
    def chunks(self) -> int:
        """How many chunks, from the first on, both streams have."""
        return self._stream.chunks

    def add(self, place: int, states: Float, hidden: Float, leaf: int = 0) -> None:
        """Add one chunk: inputs and hidden states of the quantized stream."""
        if self._stage is None or self._sum is None or place >= self._stream.chunks:
            return
        block = self._stream.block
        index = block.stages.index(self._stage)
        # States that overflow are an error of the layer that sees them next; no correction until then.
        with self._stream.opened(place) as chunk, np.errstate(over="ignore", invalid="ignore"):
            self._stream.reach(index, place, chunk)
            if self._adds:
                target = np.float32(FEEDBACK) * (chunk.hidden - hidden) - chunk.hidden
                self._stream.reach(index + 1, place, chunk)
                target += chunk.hidden
                target /= np.float32(block.added_scale(self._stage))
                bias = block.operations.bias(self._stage.linears[0])
                if bias is not None:
                    target -= bias
            else:
                target = block.stage_input(self._stage, chunk)
            add_cross_gram(target, states, self._sum.place(leaf))
        if place + 1 == self._stream.chunks:
            self._sum.join()

    def gather(self, moments: Moments, tokens: int) -> None:
        """Add up what all ranks have of so many tokens; all ranks call this together."""
        if self._sum is None or moments.first_gram is None:
            return
        cross, self._sum = self._sum.total(), None
        self._stream.release()
        with np.errstate(over="ignore", invalid="ignore"):
            cross /= np.float32(max(tokens, 1))
            if not np.isfinite(cross).all():
                return
        self._cross, self._gram = cross, moments.first_gram
        if not self._adds:
            self._cross -= self._gram

    def corrected(self, weight: Float32, gram: Float32, rows: slice = slice(None)) -> Float32:
        """Return what to quantize in place of some rows of a layer's weight, `gram` being that of all
        tokens."""
        if self._cross is None or self._gram is None:
            return weight
        if self._factor is None:
            self._factor = gram.copy()
            damping = DAMPING * gram.diagonal().mean()
            self._factor[np.diag_indices_from(gram)] += np.float32(damping)
            if not (damping > 0 and _kernels.cholesky_factor(self._factor)):
                self.forget()
                return weight
        if self._adds:  # of one linear alone, so what is known can be changed
            change = np.negative(self._cross[rows], out=self._cross[rows])
            _kernels.linear(weight, self._gram, None, change, True)
            np.negative(change, out=change)
        else:
            change = np.empty_like(weight)
            _kernels.linear_backward_input(weight, self._cross, change, False)
        _kernels.cholesky_solve(self._factor, change)
        # Of a layer that adds next to nothing, the error of all others asks for weights without bounds,
        # which no scale holds and whose products with tiny inputs engines in half precision lose.
        with np.errstate(over="ignore", invalid="ignore"):
            asked, own = (np.einsum("ij,ij->i", each, each) for each in (change, weight))
        change[~(asked <= np.float32(LARGEST**2) * own)] = 0
        change += weight
        return change

    def forget(self) -> None:
        """Give back the memory: nothing is corrected any more."""
        self._cross = self._gram = self._factor = None
