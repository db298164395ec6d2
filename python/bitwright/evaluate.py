"""How good a model is, alone and next to the original."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.budget import Budget
from bitwright.calibration import TokenSource, load_tokens
from bitwright.errors import CalibrationError, NonFiniteError
from bitwright.home import expands_home
from bitwright.memory import peak_memory_bytes
from bitwright.models.block import Rotation
from bitwright.models.model import Model, load_model
from bitwright.models.network import logit_rows
from bitwright.models.operations import Float32
from bitwright.planner import inner_width, passing_bytes
from bitwright.warned import reports_warnings

LOGIT_BYTES = 64 << 20  # logits that exist at one time, per model


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text.

    Parameters
    ----------
    perplexity
        exp of the mean negative log-likelihood of each token but a sample's first.
    kl_divergence
        Mean KL(reference ‖ model) over all positions, in nats per token; None without a reference.
    top1_agreement
        Share of the positions where both give the largest probability to the same token; None
        without a reference.
    bits_per_weight
        Bits that the checkpoint stores per parameter of the model, all tensors counted.
    tokens
        Tokens that were read.
    seconds
        Wall time, loading included.
    peak_memory_bytes
        Largest resident memory of the process so far.
    warnings
        What was warned of, one line each.
    """

    perplexity: float
    kl_divergence: float | None
    top1_agreement: float | None
    bits_per_weight: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second of wall time, reference included."""
        return self.tokens / self.seconds


@reports_warnings
@expands_home
def evaluate(
    model: str | os.PathLike[str] | Model,
    text: TokenSource,
    *,
    reference: str | os.PathLike[str] | Model | None = None,
    length: int | None = None,
    samples: int | None = None,
    memory: float | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Measure perplexity and, next to a reference, KL divergence and agreement of the first choice.

    Blocks are streamed: of each model one block is in memory, with the hidden states of all samples, or of
    as many as fit at a time.

    Parameters
    ----------
    model
        Checkpoint folder, in float or quantized, or a loaded model.
    text
        A ``.txt``, ``.jsonl`` or ``.npy`` file, or token ids ``[samples, length]``; see
        `bitwright.load_tokens`.
    reference
        The original.
    length
        Tokens per sample; by default 512 of a text, and the whole rows of an array.
    samples
        Evaluate the first so many; all by default.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    on_progress
        Called with the share of the work that is done, from 0 to 1.

    Returns
    -------
    Evaluation

    Raises
    ------
    CheckpointError, CalibrationError, NonFiniteError
        If a model or the text cannot be used; the message says which and why.
    MemoryBudgetError, ValueError
        If the budget is too small, with the smallest that would work, or no positive number.

    Examples
    --------
    >>> import bitwright
    >>> demo = bitwright.demo_folder()
    >>> result = bitwright.evaluate(demo, demo / "evaluation.txt", reference=demo, samples=4)
    >>> result.kl_divergence, result.top1_agreement
    (0.0, 1.0)
    """
    start = time.perf_counter()
    judged = model if isinstance(model, Model) else load_model(model)
    models = [judged]
    if reference is not None:
        models.append(reference if isinstance(reference, Model) else load_model(reference))
    if len({each.config.vocab_size for each in models}) > 1:
        raise CalibrationError(
            f"{models[1].checkpoint.folder}: the reference's vocabulary has "
            f"{models[1].config.vocab_size} entries, the model's {judged.config.vocab_size}"
        )
    tokens = check_text(judged, text, length, samples)
    batch = _samples_at_once(models, len(tokens), tokens.shape[1], memory)
    parts = [tokens[first : first + batch] for first in range(0, len(tokens), batch)]
    steps = len(parts) * (sum(each.config.num_hidden_layers + 1 for each in models) + 1)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done / steps)

    loss = divergence = 0.0
    agreed = 0
    for part in parts:
        hidden = [_final_states(each, part, step) for each in models]
        found = _compare(models, hidden, part)
        loss, divergence, agreed = loss + found[0], divergence + found[1], agreed + found[2]
        step()
    return Evaluation(
        perplexity=float(np.exp(loss / (tokens.size - len(tokens)))),
        kl_divergence=None if reference is None else divergence / tokens.size,
        top1_agreement=None if reference is None else agreed / tokens.size,
        bits_per_weight=bits_per_weight(judged),
        tokens=tokens.size,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
    )


def check_text(
    model: Model, text: TokenSource, length: int | None, samples: int | None = None
) -> NDArray[np.int32]:
    """Return the samples that a model can be evaluated on; CalibrationError if it cannot."""
    tokens = load_tokens(
        text,
        tokenizer=model.checkpoint.folder,
        length=length,
        samples=samples,
        vocab_size=model.config.vocab_size,
    )
    if tokens.shape[1] < 2:
        raise CalibrationError("text: samples of one token have no next token to predict")
    return tokens


def bits_per_weight(model: Model) -> float:
    """Return the bits that a checkpoint stores per parameter, all tensors counted."""
    return 8 * model.checkpoint.nbytes() / parameter_count(model)


def parameter_count(model: Model) -> int:
    """Return the number of weights of the model in float, a tied matrix counted once; parts that are not
    the decoder's, such as a vision tower, as they are stored."""
    config, checkpoint = model.config, model.checkpoint
    parameters = config.vocab_size * config.hidden_size * (1 if model.tied else 2)
    known: tuple[str, ...] = (model.names.embedding, model.names.head, model.names.final_norm)
    for index, layout in enumerate(model.layouts):
        known += (model.block_prefix(index),)
        for shapes in (layout.linears, layout.floats, layout.vectors):
            parameters += sum(math.prod(shape) for shape in shapes.values())
    others = (name for name in checkpoint.names() if not name.startswith(known))
    final_norm = config.hidden_size * (2 if model.architecture.norm_kind == "layer_norm" else 1)
    return parameters + final_norm + sum(math.prod(checkpoint.shape(n)) for n in others)


def _samples_at_once(models: list[Model], samples: int, length: int, memory: float | None) -> int:
    """Return how many samples' states fit, in the chunks that they are computed in."""
    budget = Budget.of(memory)
    chunk_rows = Rotation(length, {}).chunk_rows
    heads = 4 * sum(each.config.vocab_size * each.config.hidden_size for each in models)
    blocks = max(passing_bytes(layout, chunk_rows) for each in models for layout in each.layouts)
    row = 4 * models[0].config.vocab_size
    logits = row * min(logit_rows(row, LOGIT_BYTES), samples * length)
    fixed = budget.base + max(blocks, heads + len(models) * logits)
    per_row = sum(each.config.hidden_size for each in models)
    per_row += max(each.config.hidden_size + _inner(each) for each in models)  # normed at last
    per_chunk = 4 * min(chunk_rows, samples * length) * per_row
    budget.require(fixed + per_chunk, models[0].checkpoint.folder)
    return int((budget.bytes - fixed) / per_chunk) * (chunk_rows // length)


def _inner(model: Model) -> int:
    """Return the width of what stages leave for later ones in all chunks: of experts alone."""
    return max((inner_width(layout) for layout in model.layouts if layout.experts), default=0)


def _final_states(model: Model, tokens: NDArray[np.int32], step: Callable[[], None]) -> Float32:
    """Return the states ``[samples * length, hidden_size]`` that the head sees."""
    states = np.empty((0, 0, 0), np.float32)
    for after_block in model.hidden_states(tokens):
        states = after_block
        step()
    if not np.isfinite(states).all():
        raise NonFiniteError(f"{model.checkpoint.folder}: the final hidden states are not finite")
    return states.reshape(-1, states.shape[-1])


def _compare(
    models: list[Model], hidden: list[Float32], tokens: NDArray[np.int32]
) -> tuple[float, float, int]:
    """Return the sums of losses and divergences, and how often first choices agree."""
    heads = [model.head() for model in models]
    # The last position of a sample has no next token: its loss is left out.
    targets = np.roll(tokens, -1, axis=1).reshape(-1)
    followed = np.ones(tokens.shape, bool)
    followed[:, -1] = False
    loss = divergence = 0.0
    agreed = 0
    step = logit_rows(4 * models[0].config.vocab_size, LOGIT_BYTES)
    for first in range(0, tokens.size, step):
        rows = slice(first, first + step)
        logits = [
            each.head_logits(states[rows], head)
            for each, states, head in zip(models, hidden, heads, strict=True)
        ]
        losses = _kernels.cross_entropy(logits[0], targets[rows])
        loss += float(losses[followed.reshape(-1)[rows]].sum())
        if len(models) == 2:
            divergence += float(_kernels.kl_divergence(logits[1], logits[0]).sum())
            agreed += int((logits[0].argmax(1) == logits[1].argmax(1)).sum())
    return loss, divergence, agreed
