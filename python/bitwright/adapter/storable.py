"""The layers that a format has no way to store, which stay in float."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bitwright.formats import Format, Precision
from bitwright.formats.engine_names import unfused
from bitwright.formats.globs import as_globs
from bitwright.grids.tables import TABLES
from bitwright.warned import warn

Shapes = Mapping[str, tuple[int, int]]
SHOWN = 4


def without_unstorable(
    plan: Mapping[str, Precision | None],
    shapes: Shapes,
    default: Precision,
    format: type[Format],
    allow_unfused: bool,
) -> dict[str, Precision | None]:
    """Return a plan without the layers whose shapes no group size of the format does for.

    With them go those that vLLM computes as one module with them, unless that may differ. What another
    group size does for, and what was asked for by name, is left to be refused; so are all if nothing else
    is there.

    Parameters
    ----------
    plan, shapes
        By full name; None for float.
    default
        The precision of layers that nothing was asked for.
    format
        What is written.
    allow_unfused
        Whether parts of one module may differ.
    """
    lost = {
        name
        for name, precision in plan.items()
        if precision == default and not _is_storable(name, shapes[name], precision, format)
    }
    kept = {**plan, **dict.fromkeys(lost)}
    if lost and not allow_unfused:
        for parts in unfused(format, kept).values():
            if not lost.isdisjoint(parts):
                kept.update(dict.fromkeys(parts))
    return kept if any(kept.values()) else dict(plan)


def warn_of_unstorable(
    asked: Mapping[str, Precision | None],
    plan: Mapping[str, Precision | None],
    shapes: Shapes,
    format: type[Format],
    folder: Path,
) -> None:
    """Name the layers that were to be quantized and are left in float by `without_unstorable`."""
    left = {name: asked[name] for name in asked if asked[name] is not None and plan[name] is None}
    if not left:
        return
    patterns = as_globs([*left], shapes)
    more = f" and {len(patterns) - SHOWN} more" if len(patterns) > SHOWN else ""
    shape = next(
        list(shapes[name])
        for name, precision in left.items()
        if precision is not None and not _is_storable(name, shapes[name], precision, format)
    )
    warn(
        f"{folder}: {', '.join(patterns[:SHOWN])}{more} stay in float: the {format.name} format does not "
        f"store matrices such as {shape}"
    )


def _is_storable(
    name: str, shape: tuple[int, int], precision: Precision, format: type[Format]
) -> bool:
    """Tell whether a format stores a layer in groups of some size."""
    sizes: tuple[int | None, ...] = (precision.group_size,)
    if precision.grid not in TABLES:
        sizes += (*format.group_sizes, *((None,) if format.whole_row else ()))
    for size in sizes:
        choice = replace(precision, group_size=size)
        if format.fits(shape[1], choice):
            try:
                format.check(name, shape, choice)
            except ValueError:
                continue
            return True
    return False
