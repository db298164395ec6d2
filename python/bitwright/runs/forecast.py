"""The memory that hidden states and weights take in a pass over a model's blocks."""

from collections.abc import Iterable

from bitwright.models.layout import BlockLayout, Stage

INNER_COPIES = 3  # of one chunk's widest states while a stage is computed


def passing_bytes(layout: BlockLayout, chunk_rows: int) -> int:
    """Return the memory of a pass over a block beside states: weights, and a stage's work on a chunk."""
    weights = weight_count(layout.linears.values())
    if layout.experts:
        weights = max(weight_count(stage_shapes(layout, stage)) for stage in layout.stages)
    widest = max(max(shape) for shape in layout.linears.values())
    return 4 * (weights + INNER_COPIES * chunk_rows * widest)


def inner_width(layout: BlockLayout) -> int:
    """Return the widest that the stages of a block leave for the next one."""
    left = [
        layout.linears[stage.linears[0]][1]
        for stage in layout.stages
        if stage.linears and (stage.kind.endswith("output") or stage.kind.startswith("latent_"))
    ]
    beside = [layout.channels(stage) for stage in layout.stages if stage.kind == "beside"]
    normed = any(stage.kind == "router" for stage in layout.stages)
    experts = [layout.linears[name] for name in layout.experts] if normed else []
    return max(left, default=0) + sum(beside) + max((c for _, c in experts), default=0)


def stage_shapes(layout: BlockLayout, stage: Stage) -> list[tuple[int, int]]:
    """Return the shapes of the weights that are there during a stage: an expert's go together."""
    shapes = [layout.linears[name] for name in stage.linears]
    if stage.kind == "expert_output" and stage.mlp is not None:
        experts = filter(None, (stage.mlp.gate, stage.mlp.up))
        shapes += [layout.linears[name] for name in experts if name in layout.linears]
    return shapes


def weight_count(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(out * channels for out, channels in shapes)
