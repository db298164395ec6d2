"""The memory of a model's losses and gradients, see `bitwright.models.network.Network`."""

import math
from collections.abc import Iterable, Iterator
from typing import cast

from bitwright import _kernels
from bitwright.loading.model import Model
from bitwright.models.architecture import Attention, LatentAttention
from bitwright.models.block import Rotation
from bitwright.models.layout import Stage
from bitwright.models.matrix_rows import piece_rows
from bitwright.models.network import HEAD_BYTES, logit_rows

KEPT_STATES = 2  # of every block, where a backward pass begins
BACKWARD_BYTES = (
    5_000_000  # of a thread's buffers for products of gradients, beside those for outputs
)


def backward_bytes() -> int:
    """Return what the threads of backward passes take beside those of forward ones."""
    return BACKWARD_BYTES * _kernels.num_threads()


def batch_step(model: Model, length: int) -> int:
    """Return how many samples consist of whole chunks of every kind that gradients are computed in: batches
    of multiples of it have their sums in the same order."""
    rope = Rotation(length, {})
    at_once = logit_rows(4 * model.config.vocab_size, HEAD_BYTES)
    return math.lcm(length, rope.chunk_rows, rope.tape_rows, at_once) // length


def logits_bytes(model: Model, rows: int, copies: int) -> int:
    """Return what so many copies take of the logits that exist at one time."""
    row = 4 * model.config.vocab_size
    return copies * row * min(rows, logit_rows(row, HEAD_BYTES))


def head_bytes(model: Model, rows: int) -> int:
    """Return what a piece of the head takes, with the logits that it makes."""
    vocabulary, width = model.table_shape
    at_once = min(rows, logit_rows(4 * vocabulary, HEAD_BYTES))
    return 4 * min(vocabulary, piece_rows(width)) * (width + at_once)


def final_bytes(model: Model, rows: int, copies: int) -> int:
    """Return what the head takes with so many copies of the logits, beside the states that blocks keep, and
    the last ones before and after their norm, with their gradients."""
    kept = KEPT_STATES * model.config.num_hidden_layers + 4
    states = 4 * rows * model.config.hidden_size
    return kept * states + logits_bytes(model, rows, copies) + head_bytes(model, rows)


def sub_block_bytes(
    model: Model, length: int, rows: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """Yield, for each half of a block in a backward pass, the sizes of its linears, those of all that are
    read of the block by then, and the bytes of the states that are kept, their gradient, these weights and
    the tape."""
    states = 4 * rows * model.config.hidden_size
    for index, layout in enumerate(model.layouts):
        read: list[int] = []
        for stages in reversed(layout.sub_blocks):
            own = [math.prod(layout.linears[name]) for stage in stages for name in stage.linears]
            read += own
            tape = tape_bytes(model, index, stages, length, rows)
            yield own, read, (KEPT_STATES * (index + 1) + 1) * states + 4 * sum(read) + tape


def tape_bytes(model: Model, index: int, stages: Iterable[Stage], length: int, rows: int) -> int:
    """Return the most that the samples that go through a sub-block together leave on the tape, with the
    gradients that are there at one time."""
    tokens = min(rows, Rotation(length, {}).tape_rows)
    return int(4 * tokens * _per_token(model, index, stages))


def _per_token(model: Model, index: int, stages: Iterable[Stage]) -> float:
    """Return how many numbers per token operations remember, with the most that their gradients add."""
    layout, config, names = model.layouts[index], model.config.at(index), model.architecture
    hidden, experts = config.hidden_size, config.experts
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    remembered, gradients = 0.0, [0.0]
    for stage in stages:
        share = 1.0  # of the tokens
        if stage.expert is not None and experts is not None:
            share = experts.chosen / experts.count
        outputs = sum(layout.linears[name][0] for name in stage.linears)
        kept, changes = 0, outputs
        if stage.norm is not None or stage.kind == "expert":
            kept = layout.channels(stage)
        if stage.kind == "attention":
            attention = cast(Attention, names.attention)
            kept += outputs + (3 if attention.gated else 1) * queries
            if attention.fused is not None:  # and taken apart
                kept, changes = kept + outputs, 2 * outputs
            if stage.mlp is not None:  # in parallel
                kept, changes = kept + config.intermediate_size, changes + config.intermediate_size
            if names.beside is not None:
                mixed = layout.linears[names.beside.inputs][0]
                kept, changes = kept + 6 * mixed, changes + mixed
            kept += queries if attention.query_norm is not None else 0
            kept += keys if attention.key_norm is not None else 0
            changes += queries + (2 * queries if keys < queries else 0)
        elif stage.kind in (
            "delta",
            "mamba",
        ):  # convolved, taken apart, weighed, recurred, gated, normed
            kept, changes = kept + 6 * outputs, 2 * outputs
        elif stage.kind == "convolution":
            kept, changes = kept + 3 * outputs, 2 * outputs
        elif stage.kind in ("latent", "latent_query"):
            kept += 2 * outputs
        elif stage.kind == "latent_attention":
            attention_out = layout.linears[cast(LatentAttention, names.attention).output][1]
            kept += outputs + 2 * queries + 2 * attention_out
            changes += 2 * (queries + attention_out)
        elif stage.kind == "router":
            changes = hidden
        elif stage.kind.endswith("_output"):
            post_norm = names.mlp_post_norm or names.attention_post_norm
            if not stage.adds_to_states or post_norm or config.residual_scale != 1:
                kept += (2 if post_norm else 1) * outputs
            changes += hidden
        else:
            fused = stage.mlp is not None and stage.mlp.fused is not None
            inner = outputs // 2 if fused or len(stage.linears) == 2 else outputs
            kept += outputs + inner + (outputs if fused else 0)
            changes = outputs + (outputs if fused else inner)
        remembered += share * kept
        gradients.append(share * changes)
    return remembered + max(gradients) + hidden
