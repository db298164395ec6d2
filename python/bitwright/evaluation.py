"""Evaluation: perplexity, and KL divergence and top-1 agreement with the original."""

import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.checkpoint.hub import finds_models
from bitwright.errors import CalibrationError, NonFiniteError, check_choice
from bitwright.files.home import expands_home
from bitwright.files.inputs import InputFiles, same_inputs
from bitwright.loading.model import Model, load_model
from bitwright.markup import html_table
from bitwright.models.block import Rotation
from bitwright.models.matrix_rows import piece_rows
from bitwright.models.network import logit_rows
from bitwright.models.operations import Float32
from bitwright.process.memory import peak_memory_bytes
from bitwright.runs.budget import Budget
from bitwright.runs.forecast import inner_width, passing_bytes
from bitwright.runs.progress import Progressing, phase
from bitwright.spellings import Old, respelled
from bitwright.text.samples import Samples, TokenSource, Windows, load_samples
from bitwright.warned import reports_warnings

WINDOWS: tuple[Windows, ...] = ("whole", "llama.cpp")
LOGIT_BYTES = 64 << 20  # logits that exist at one time, per model


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text.

    Parameters
    ----------
    perplexity
        exp of the mean negative log-likelihood of each token that is judged: of all but a sample's first,
        or as `windows` says.
    kl_divergence
        Mean KL(reference ‖ model) over all positions, or those that `windows` judges, in nats per token;
        None without a reference.
    top1_agreement
        Share of these positions where both give the largest probability to the same token; None
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
    reference_perplexity
        The perplexity of the reference on the same tokens; None without one.
    windows
        What was judged: ``"whole"`` samples, or the second halves of windows, as ``"llama.cpp"`` does.
    first_tokens
        What each sample of the text began with, see `load_tokens`; None where token ids were given.
    """

    perplexity: float
    kl_divergence: float | None
    top1_agreement: float | None
    bits_per_weight: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()
    reference_perplexity: float | None = None
    windows: Windows = "whole"
    first_tokens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        compared = (
            "" if self.kl_divergence is None else f", KL {self.kl_divergence:.5f} nats per token"
        )
        agreed = "" if self.top1_agreement is None else f", {100 * self.top1_agreement:.2f} % top-1"
        figures = f"perplexity {self.perplexity:.4f}{compared}{agreed}"
        return f"{figures}, {self.bits_per_weight:.3f} bits per weight"

    def _repr_html_(self) -> str:
        agreed = None if self.top1_agreement is None else f"{100 * self.top1_agreement:.2f} %"
        known = (self.perplexity, self.reference_perplexity, self.kl_divergence)
        figures = [None if each is None else f"{each:.5g}" for each in known]
        names = ("perplexity", "perplexity of the reference", "KL, nats per token")
        more = [("same first choice", agreed), ("bits per weight", f"{self.bits_per_weight:.3f}")]
        return html_table(
            [*zip(names, figures, strict=True), *more, ("tokens", f"{self.tokens:,}")]
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second of wall time, reference included."""
        return self.tokens / self.seconds


@respelled(Old("text", "evaluation"))
@reports_warnings
@expands_home
@finds_models
@same_inputs()
def evaluate(
    model: str | os.PathLike[str] | Model,
    evaluation: TokenSource,
    *,
    reference: str | os.PathLike[str] | Model | None = None,
    length: int | None = None,
    samples: int | None = None,
    bos: bool = True,
    windows: Windows = "whole",
    memory: float | None = None,
    on_progress: Callable[[float], None] | None = None,
    progress: Progressing = True,
) -> Evaluation:
    """Measure perplexity and, next to a reference, KL divergence and agreement of the first choice.

    Blocks are streamed: of each model one block is in memory, with the hidden states of all samples, or of
    as many as fit at a time.

    Parameters
    ----------
    model
        Checkpoint folder, in float or quantized, or a loaded model.
    evaluation
        A file of text, JSON, tables or token ids, or token ids ``[samples, length]``; see
        `bitwright.load_tokens`.
    reference
        The original.
    length
        Tokens per sample; by default 512 of a text, or as many as the model knows positions, and the
        whole rows of an array.
    samples
        Evaluate the first so many; all by default.
    bos
        Begin every sample of a text with what the tokenizer puts first, see `bitwright.load_tokens`.
    windows
        ``"whole"`` judges all positions of every sample. ``"llama.cpp"`` gives the figures of
        llama-perplexity with a context of `length`: the text is tokenized once, cut into windows whose
        first token gives way to the one that the tokenizer puts first, and of n positions those from n // 2
        on are judged. Token ids are not changed then either, but judged so.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    on_progress
        Called with the share of the work that is done, from 0 to 1.
    progress
        Show a bar or lines on standard error, or what gets each record, see `Progress`.

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
    check_choice("windows", windows, WINDOWS)
    judged = _opened(model)
    models = [judged]
    if reference is not None:
        models.append(_opened(reference))
    if len({each.config.vocab_size for each in models}) > 1:
        raise CalibrationError(
            f"{models[1].checkpoint.folder}: the reference's vocabulary has "
            f"{models[1].config.vocab_size} entries, the model's {judged.config.vocab_size}"
        )
    loaded = check_text(models, evaluation, length, samples, bos, windows)
    tokens = loaded.tokens
    skipped = _skipped(tokens, windows)
    batch, _ = plan_evaluation(models, len(tokens), tokens.shape[1], memory)
    parts = [tokens[first : first + batch] for first in range(0, len(tokens), batch)]
    steps = len(parts) * (sum(each.config.num_hidden_layers + 1 for each in models) + 1)
    total, inputs, done = LossSums(), InputFiles(), 0
    for each in models:
        inputs.watch_model(each.checkpoint)
    with phase("evaluating", progress, steps) as shown:

        def step() -> None:
            nonlocal done
            done += 1
            shown.update(done)
            if on_progress:
                on_progress(done / steps)

        for number, part in enumerate(parts, start=1):
            hidden = [final_states(each, part, step) for each in models]
            total.add(models, hidden, part, compared_positions(part.shape, windows))
            inputs.check()
            if number < len(parts):
                inputs.take_checksums()
            step()
    followed = len(tokens) * (tokens.shape[1] - 1 - skipped)
    positions = followed if skipped else tokens.size
    perplexities = [float(np.exp(loss / followed)) for loss in total.losses[: len(models)]]
    return Evaluation(
        perplexity=perplexities[0],
        kl_divergence=None if reference is None else total.divergence / positions,
        top1_agreement=None if reference is None else total.agreed / positions,
        bits_per_weight=bits_per_weight(judged),
        tokens=tokens.size,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(),
        reference_perplexity=None if reference is None else perplexities[1],
        windows=windows,
        first_tokens=loaded.first,
    )


def _opened(model: Model | str | os.PathLike[str]) -> Model:
    if isinstance(model, Model):
        return model
    opened = load_model(model)
    opened.warn_of_unused()
    return opened


def check_text(
    models: Sequence[Model],
    text: TokenSource,
    length: int | None,
    samples: int | None = None,
    bos: bool = True,
    windows: Windows = "whole",
) -> Samples:
    """Return the samples that models can be evaluated on; CalibrationError if they cannot."""
    loaded = load_samples(
        text,
        tokenizer=models[0].checkpoint.folder,
        length=length,
        samples=samples,
        vocab_size=models[0].config.vocab_size,
        positions=min(each.positions for each in models),
        bos=bos,
        windows=windows,
    )
    if loaded.tokens.shape[1] < _skipped(loaded.tokens, windows) + 2:
        raise CalibrationError(
            f"evaluation: samples of {loaded.tokens.shape[1]} tokens have no next token to predict. "
            f"Ask for a larger length"
        )
    return loaded


def check_evaluation(
    models: Sequence[Model],
    text: TokenSource,
    length: int | None,
    bos: bool,
    memory: float | None,
) -> None:
    """Raise CalibrationError or MemoryBudgetError where models cannot be evaluated on a text."""
    tokens = check_text(models, text, length, bos=bos).tokens
    plan_evaluation(models, len(tokens), tokens.shape[1], memory)


def _skipped(tokens: NDArray[np.int32], windows: Windows) -> int:
    """Return how many tokens at the start of a sample are not scored."""
    return tokens.shape[1] // 2 if windows == "llama.cpp" else 0


def bits_per_weight(model: Model) -> float:
    """Return the bits that a checkpoint stores per parameter, all tensors counted."""
    return 8 * model.checkpoint.stored_bytes() / parameter_count(model)


def parameter_count(model: Model, left_out: Collection[str] = ()) -> int:
    """Return the number of weights of the model in float, a tied matrix counted once; parts that are not
    the decoder's, such as a vision tower, as they are stored, and without those that are left out."""
    config, checkpoint = model.config, model.checkpoint
    parameters = config.vocab_size * config.hidden_size * (1 if model.tied else 2)
    known: tuple[str, ...] = (model.names.embedding, model.names.head, model.names.final_norm)
    for index, layout in enumerate(model.layouts):
        known += (model.block_prefix(index),)
        for shapes in (layout.linears, layout.floats, layout.vectors):
            parameters += sum(math.prod(shape) for shape in shapes.values())
    others = (
        name for name in checkpoint.names() if not name.startswith(known) and name not in left_out
    )
    final_norm = config.hidden_size * (2 if model.architecture.norm_kind == "layer_norm" else 1)
    parameters += config.vocab_size if model.architecture.rules.head_bias else 0
    return parameters + final_norm + sum(math.prod(checkpoint.shape(n)) for n in others)


def plan_evaluation(
    models: Sequence[Model], samples: int, length: int, memory: float | None
) -> tuple[int, int]:
    """Return how many samples go through all blocks together, in whole chunks, and the peak of memory that
    is expected; MemoryBudgetError if the budget is too small for the fewest."""
    budget = Budget.of(memory)
    chunk_rows = Rotation(length, {}).chunk_rows
    codes = [each.codes_bytes(each.head_name) for each in models]
    pieces = max(each.piece_bytes(each.head_name) for each in models)
    blocks = max(passing_bytes(layout, chunk_rows) for each in models for layout in each.layouts)
    embeddings = max(_looking_up(each) for each in models)
    row = 4 * models[0].config.vocab_size
    positions = min(logit_rows(row, LOGIT_BYTES), samples * length)
    piece = max(piece_rows(each.config.hidden_size) for each in models)
    logits = len(models) * row * positions
    logits += 4 * positions * piece * (piece < models[0].config.vocab_size)
    heads = sum(codes) + max(max(codes), pieces + logits)
    fixed = budget.base + max(blocks, embeddings, heads)
    per_row = sum(each.config.hidden_size for each in models)
    per_row += max(each.config.hidden_size + _inner(each) for each in models)  # normed at last
    per_chunk = 4 * min(chunk_rows, samples * length) * per_row
    budget.require(fixed + per_chunk, models[0].checkpoint.folder)
    per_chunk_samples = max(1, chunk_rows // length)
    chunks = min(int((budget.bytes - fixed) / per_chunk), -(-samples // per_chunk_samples))
    return chunks * per_chunk_samples, fixed + chunks * per_chunk


def _looking_up(model: Model) -> int:
    """Return what looking tokens up in the embedding takes."""
    codes = model.codes_bytes(model.embedding_name)
    return codes + max(codes, model.piece_bytes(model.embedding_name))


def _inner(model: Model) -> int:
    """Return the width of what stages leave for later ones in all chunks: of experts alone."""
    return max((inner_width(layout) for layout in model.layouts if layout.experts), default=0)


def final_states(model: Model, tokens: NDArray[np.int32], step: Callable[[], None]) -> Float32:
    """Return the input of the head ``[samples * length, hidden_size]``."""
    states = np.empty((0, 0, 0), np.float32)
    for after_block in model.hidden_states(tokens):
        states = after_block
        step()
    if not np.isfinite(states).all():
        raise NonFiniteError(f"{model.checkpoint.folder}: the final hidden states are not finite")
    return states.reshape(-1, states.shape[-1])


def compared_positions(shape: tuple[int, ...], windows: Windows) -> NDArray[np.bool_]:
    """Return which positions ``[samples, length]`` are judged; no token follows the last of a whole sample,
    which counts for KL only."""
    chosen = np.ones(shape, bool)
    if windows == "llama.cpp":
        chosen[:, : shape[1] // 2] = chosen[:, -1] = False
    return chosen


@dataclass(eq=False)
class LossSums:
    """Sums of losses, by model, and divergences, and how often first choices agree."""

    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    divergence: float = 0.0
    agreed: int = 0

    def add(
        self,
        models: list[Model],
        hidden: list[Float32],
        tokens: NDArray[np.int32],
        chosen: NDArray[np.bool_],
    ) -> None:
        """Add what is `chosen` of some samples."""
        heads = [model.rows(model.head_name) for model in models]
        # The last position of a sample has no next token: its loss is left out.
        targets = np.roll(tokens, -1, axis=1).reshape(-1)
        followed = chosen.copy()
        followed[:, -1] = False
        step = logit_rows(4 * models[0].config.vocab_size, LOGIT_BYTES)
        for first in range(0, tokens.size, step):
            rows = slice(first, first + step)
            logits = [
                each.head_logits(states[rows], head)
                for each, states, head in zip(models, hidden, heads, strict=True)
            ]
            for index, each in enumerate(logits):
                losses = _kernels.cross_entropy(each, targets[rows])
                self.losses[index] += float(losses[followed.reshape(-1)[rows]].sum())
            if len(models) == 2:
                judged = chosen.reshape(-1)[rows]
                divergences = _kernels.kl_divergence(logits[1], logits[0])
                self.divergence += float(divergences[judged].sum())
                self.agreed += int((logits[0].argmax(1) == logits[1].argmax(1))[judged].sum())
            del logits, each  # before the next ones are computed
