"""How good a model is, alone and next to the original."""

import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.calibration import TokenSource, load_tokens
from bitwright.errors import CalibrationError, NonFiniteError
from bitwright.models.model import Model, load_model
from bitwright.models.operations import Float32

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
    """

    perplexity: float
    kl_divergence: float | None
    top1_agreement: float | None
    bits_per_weight: float
    tokens: int
    seconds: float
    peak_memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second of wall time, reference included."""
        return self.tokens / self.seconds


def evaluate(
    model: str | os.PathLike[str] | Model,
    text: TokenSource,
    *,
    reference: str | os.PathLike[str] | Model | None = None,
    length: int | None = None,
    samples: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Measure perplexity and, next to a reference, KL divergence and agreement of the first choice.

    Blocks are streamed: of each model one block is in memory, with the hidden states of all samples.

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
    on_progress
        Called with the share of the work that is done, from 0 to 1.

    Returns
    -------
    Evaluation

    Raises
    ------
    CheckpointError, CalibrationError, NonFiniteError
        If a model or the text cannot be used; the message says which and why.

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
    tokens = load_tokens(
        text,
        tokenizer=judged.checkpoint.folder,
        length=length,
        samples=samples,
        vocab_size=judged.config.vocab_size,
    )
    if tokens.shape[1] < 2:
        raise CalibrationError("text: samples of one token have no next token to predict")
    steps = sum(each.config.num_hidden_layers + 1 for each in models)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done / steps)

    hidden = [_final_states(each, tokens, step) for each in models]
    losses, divergences, agreements = _compare(models, hidden, tokens)
    step()
    return Evaluation(
        perplexity=float(np.exp(losses)),
        kl_divergence=divergences,
        top1_agreement=agreements,
        bits_per_weight=bits_per_weight(judged),
        tokens=tokens.size,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
    )


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


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    # getrusage begins with the peak of the process that started this one, on Linux.
    with suppress(OSError, StopIteration), open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Return the resident memory of this process now."""
    with suppress(OSError), open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * resource.getpagesize()
    return peak_memory_bytes()


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
) -> tuple[float, float | None, float | None]:
    """Return mean loss, mean divergence and agreement, over chunks of whole samples."""
    heads = [model.head() for model in models]
    samples, length = tokens.shape
    vocabulary = models[0].config.vocab_size
    chunk = max(1, LOGIT_BYTES // (4 * vocabulary * length))
    loss = divergence = 0.0
    agreed = 0
    for first in range(0, samples, chunk):
        ids = tokens[first : first + chunk]
        rows = slice(first * length, first * length + ids.size)
        logits = [
            each.head_logits(states[rows], head)
            for each, states, head in zip(models, hidden, heads, strict=True)
        ]
        # The last position of a sample has no next token: its loss is left out of the mean.
        targets = np.roll(ids, -1, axis=1).reshape(-1)
        losses = _kernels.cross_entropy(logits[0], targets).reshape(ids.shape)
        loss += float(losses[:, :-1].sum())
        if len(models) == 2:
            divergence += float(_kernels.kl_divergence(logits[1], logits[0]).sum())
            agreed += int((logits[0].argmax(1) == logits[1].argmax(1)).sum())
    mean_loss = loss / (samples * (length - 1))
    if len(models) == 1:
        return mean_loss, None, None
    return mean_loss, divergence / tokens.size, agreed / tokens.size
