"""Which layers are quantized, and how finely."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from bitwright.formats import Format, Precision
from bitwright.models.model import Model

Overrides = Mapping[str, Mapping[str, int]]


def plan_layers(
    model: Model,
    format: type[Format],
    default: Precision,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
) -> dict[str, Precision | None]:
    """Return the precision of every layer by full name, None for those that stay in float.

    Patterns are shell globs over full names without ``.weight``, such as ``*.down_proj`` or
    ``model.layers.0.*``. Excluding wins over including; of several overrides the last one wins.

    Raises
    ------
    ValueError
        If a pattern matches no layer, or the format cannot store what is asked for.
    """
    shapes = dict(model.linear_shapes())
    plan = plan_shapes(shapes, default, include=include, exclude=exclude, overrides=overrides)
    plan.update(dict.fromkeys(model.never_quantized()))
    matrix = (model.config.vocab_size, model.config.hidden_size)
    for name, bits, option in (
        (model.names.embedding, embedding_bits, "embedding_bits"),
        (model.names.head, head_bits, "head_bits"),
    ):
        if bits is None:
            continue
        if not format.embeddings:
            raise ValueError(
                f"{option}: the {format.name} format keeps embeddings and head in float"
            )
        if model.tied and option == "head_bits":
            raise ValueError("head_bits: the head is the embedding; use embedding_bits")
        plan[name] = Precision(bits, default.group_size, default.grid)
        shapes[name] = matrix
    check_plan(plan, shapes, format)
    return plan


def plan_shapes(
    shapes: Mapping[str, tuple[int, int]],
    default: Precision,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
) -> dict[str, Precision | None]:
    """Return the precision of every layer in `shapes`; see `plan_layers`."""
    overrides = overrides or {}
    for pattern in (*include, *exclude, *overrides):
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise ValueError(
                f"pattern {pattern!r} matches no layer; names are like {next(iter(shapes))}"
            )
    plan: dict[str, Precision | None] = {}
    for name in shapes:
        chosen = not include or any(fnmatchcase(name, pattern) for pattern in include)
        if not chosen or any(fnmatchcase(name, pattern) for pattern in exclude):
            plan[name] = None
            continue
        precision = default
        for pattern, changes in overrides.items():
            if fnmatchcase(name, pattern):
                precision = _changed(default, pattern, changes)
        plan[name] = precision
    return plan


def check_plan(
    plan: Mapping[str, Precision | None],
    shapes: Mapping[str, tuple[int, int]],
    format: type[Format],
) -> None:
    """Raise ValueError unless something is quantized, and to what the format can store."""
    for name, planned in plan.items():
        if planned is not None:
            format.check(name, shapes[name], planned)
    if not any(plan.values()):
        raise ValueError("include and exclude leave no layer to quantize")


def _changed(default: Precision, pattern: str, changes: Mapping[str, int]) -> Precision:
    unknown = set(changes) - {"bits", "group_size"}
    if unknown:
        raise ValueError(
            f"override of {pattern!r}: unknown {', '.join(sorted(unknown))}; known: bits, group_size"
        )
    size = changes.get("group_size", default.group_size)
    return Precision(changes.get("bits", default.bits), None if size == -1 else size, default.grid)
