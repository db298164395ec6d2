"""The precision of every layer: recipes, overrides and exclusions."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from bitwright.checkpoint.reader import read_json_object
from bitwright.errors import RecipeError, malformed_as, shown
from bitwright.files.home import expands_home
from bitwright.files.replacing import followed, write_json
from bitwright.formats import Format, Precision
from bitwright.formats.engine_names import check_fused
from bitwright.formats.gguf_mix import Mix
from bitwright.formats.globs import as_globs
from bitwright.formats.spelling import Spelling, combined
from bitwright.grids.tables import TABLES
from bitwright.grids.tensor import BITS
from bitwright.loading.model import Model

Overrides = Mapping[str, Mapping[str, int | str] | str]
VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """The precision of every layer, for any method and format that can store it.

    Parameters
    ----------
    layers
        ``(bits, group_size)`` by full name, None for the whole row.
    target_bpw, bits_per_weight
        What was asked for and what it comes to, over these layers, scales included.

    Examples
    --------
    >>> import bitwright
    >>> recipe = bitwright.Recipe({"a": (3, 64), "b": (5, 64)}, 4.5, 4.5)
    >>> recipe.overrides()["b"]
    {'bits': 5, 'group_size': 64}
    """

    layers: Mapping[str, tuple[int, int | None]]
    target_bpw: float
    bits_per_weight: float

    @property
    def most_common(self) -> tuple[int, int | None]:
        """The precision that most layers have."""
        return Counter(self.layers.values()).most_common(1)[0][0]

    def overrides(self) -> dict[str, dict[str, int]]:
        """Return it as `bitwright.quantize` takes it."""
        return {
            name: {"bits": bits, "group_size": size or -1}
            for name, (bits, size) in self.layers.items()
        }

    @expands_home
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; OutputError if that fails."""
        write_json(followed(path), self.as_dict())

    def as_dict(self) -> dict[str, object]:
        """Return what the JSON file holds."""
        return {
            "version": VERSION,
            "target_bpw": self.target_bpw,
            "bits_per_weight": self.bits_per_weight,
            "layers": self.overrides(),
        }

    @classmethod
    @expands_home
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read what `save` wrote.

        Raises
        ------
        RecipeError
            If the file is damaged, or not such a file.
        """
        with malformed_as(
            RecipeError, f"{path}: is not a recipe", "; make one with bitwright dynamic"
        ):
            content = read_json_object(Path(path))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            layers: dict[str, tuple[int, int | None]] = {}
            for name, each in content["layers"].items():
                bits, size = each["bits"], each["group_size"]
                sound = type(bits) is int and bits in (1, *BITS) and type(size) is int
                if not sound or not (size > 0 or size == -1):
                    raise ValueError(f"layer {name}: {each}")
                layers[name] = bits, None if size == -1 else size
            if not layers:
                raise ValueError("no layers")
            target, reached = float(content["target_bpw"]), float(content["bits_per_weight"])
            if not (math.isfinite(target) and math.isfinite(reached)):
                raise ValueError(f"target_bpw {target}, bits_per_weight {reached}")
            return cls(layers, target, reached)


def plan_layers(
    model: Model,
    format: type[Format],
    default: Precision,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    float_embeddings: bool = False,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    only_bits: int | None = None,
    allow_unfused: bool = False,
    mix: Mix | None = None,
) -> dict[str, Precision | None]:
    """Return the precision of every layer by full name, None for those that stay in float.

    A mixture gives every layer, embedding and head its own, in place of `default`; overrides count more.
    Otherwise embedding and head have those of `Format.ends`, unless they shall stay in float; a head has
    no others than `only_bits`, those of a method that has one number.

    Patterns are shell globs over full names without ``.weight``, such as ``*.down_proj`` or
    ``model.layers.0.*``. Excluding wins over including; of several overrides the last one wins.

    Raises
    ------
    ValueError
        If a pattern matches no layer, or the format cannot store what is asked for.
    """
    shapes = dict(model.linear_shapes())
    mixed = {} if mix is None else mixed_layers(model, format, mix)
    if mix is None and not float_embeddings:
        mixed = _ends(model, format, default, only_bits)
        shapes |= dict.fromkeys(mixed, model.table_shape)
    plan = plan_shapes(
        shapes,
        default,
        format,
        include=include,
        exclude=exclude,
        overrides=overrides,
        mixed=mixed,
    )
    model_type = model.config.model_type
    plan.update(dict.fromkeys(n for n in shapes if format.keeps_in_float(model_type, n)))
    plan.update(dict.fromkeys(model.never_quantized()))
    matrix = model.table_shape
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
        plan[name] = format.with_bits(default, bits)
        shapes[name] = matrix
    asked = (None, None) if mix is None else (mix.embedding, mix.output)
    for name, own in zip((model.names.embedding, model.names.head), asked, strict=True):
        in_float = float_embeddings and own is None
        if mixed.get(name) is not None and name not in plan and not in_float:
            plan[name], shapes[name] = mixed[name], matrix
    check_plan(plan, shapes, format, allow_unfused)
    return plan


def _ends(
    model: Model, format: type[Format], default: Precision, only_bits: int | None
) -> dict[str, Precision | None]:
    """Return the precisions that embedding and head have by default: None for one that has no whole groups
    in them; nothing for formats that have both in float."""
    if not format.embeddings:
        return {}
    names, shape = model.names, model.table_shape
    embedding, head = format.ends(model.config.model_type, default, shape[1])
    if head is not None and only_bits not in (None, head.bits):
        head = default
    ends = {names.embedding: embedding} | ({} if model.tied else {names.head: head})
    return {
        name: each if each is not None and format.stores(shape, each) else None
        for name, each in ends.items()
    }


def mixed_layers(model: Model, format: type[Format], mix: Mix) -> dict[str, Precision | None]:
    """Return the precision of all layers, embedding and head in a mixture; None for float."""
    matrices: dict[str, tuple[int, ...]] = {model.names.embedding: model.table_shape}
    if not model.tied:
        matrices[model.names.head] = model.table_shape
    places = model.experts if format.stacks_experts else {}
    for name, shape in model.linear_shapes().items():
        if name not in places:
            matrices[name] = shape
        elif model.config.experts is not None:
            matrices[places[name].stacked_name] = (model.config.experts.count, *shape)
    chosen = format.mixed(model.checkpoint, mix, matrices)
    return chosen | {name: chosen[place.stacked_name] for name, place in places.items()}


def plan_shapes(
    shapes: Mapping[str, tuple[int, int]],
    default: Precision,
    format: type[Format] = Format,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    mixed: Mapping[str, Precision | None] | None = None,
) -> dict[str, Precision | None]:
    """Return the precision of every layer in `shapes`; see `plan_layers`."""
    overrides = overrides or {}
    for pattern in (*include, *exclude, *overrides):
        if pattern not in shapes and not any(fnmatchcase(name, pattern) for name in shapes):
            raise ValueError(
                f"pattern {pattern!r} matches no layer; names are like {next(iter(shapes))}"
            )
    known = mixed or {}
    plan: dict[str, Precision | None] = {name: known.get(name, default) for name in shapes}
    for pattern, changes in overrides.items():
        precision = _changed(default, pattern, changes, format)
        # A recipe names every layer: trying each as a pattern on each would take minutes.
        named = [pattern] if pattern in shapes else [n for n in shapes if fnmatchcase(n, pattern)]
        plan.update(dict.fromkeys(named, precision))
    for name in shapes:
        chosen = not include or any(fnmatchcase(name, pattern) for pattern in include)
        if not chosen or any(fnmatchcase(name, pattern) for pattern in exclude):
            plan[name] = None
    return plan


def check_plan(
    plan: Mapping[str, Precision | None],
    shapes: Mapping[str, tuple[int, int]],
    format: type[Format],
    allow_unfused: bool = False,
) -> None:
    """Raise ValueError unless something is quantized, and to what the format can store and its engines
    load: parts of what they compute as one module alike, unless that is allowed."""
    unfit: dict[str, Precision] = {}
    for name, planned in plan.items():
        own = planned is not None and planned.grid in format.grids
        if planned is not None and own and not format.fits(shapes[name][1], planned):
            unfit[name] = planned
        elif planned is not None:
            format.check(name, shapes[name], planned)
    if unfit:
        raise ValueError(_unfit_message(unfit, plan, shapes, format))
    if not any(plan.values()):
        raise ValueError("include and exclude leave no layer to quantize")
    if not allow_unfused:
        check_fused(format, plan)


def check_candidates(
    candidates: Iterable[Precision], shapes: Mapping[str, tuple[int, int]], format: type[Format]
) -> None:
    """Raise ValueError unless every layer can have every precision in some format."""
    for each in candidates:
        unfit = {name: each for name, shape in shapes.items() if not format.fits(shape[1], each)}
        if unfit:
            sizes = [
                size
                for size in format.group_sizes
                if all(
                    format.fits(shape[1], replace(each, group_size=size))
                    for shape in shapes.values()
                )
            ]
            more = f", such as {each.bits}:{max(sizes)}" if sizes else ""
            raise ValueError(
                f"candidates: {unfit_layers(unfit, shapes, format)}. Every candidate must do for every "
                f"layer: give others{more}"
            )
        for name, shape in shapes.items():
            format.check(name, shape, each)


def unfit_layers(
    unfit: Mapping[str, Precision], shapes: Mapping[str, tuple[int, int]], format: type[Format]
) -> str:
    """Describe which groups do not divide the rows of which layers."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for name, precision in unfit.items():
        channels = shapes[name][1]
        kind = format.group_words(precision, channels)
        kinds.setdefault((kind, channels), []).append(name)
    return "; ".join(
        f"{kind} do not divide the {channels} input channels of {', '.join(as_globs(names, shapes))}"
        for (kind, channels), names in kinds.items()
    )


def _unfit_message(
    unfit: Mapping[str, Precision],
    plan: Mapping[str, Precision | None],
    shapes: Mapping[str, tuple[int, int]],
    format: type[Format],
) -> str:
    """Describe which layers do not consist of whole groups, and the remedies."""
    remedies = []
    planned = [(shapes[name][1], each) for name, each in plan.items() if each is not None]
    sizes = [
        size
        for size in format.group_sizes
        if all(
            each.grid not in TABLES and format.fits(channels, replace(each, group_size=size))
            for channels, each in planned
        )
    ]
    if sizes:
        remedies.append(f"--group-size {max(sizes)} for all layers")
    changes: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name, precision in unfit.items():
        change = tuple(format.change_that_fits(shapes[name][1], precision).items())
        changes.setdefault(change, []).append(name)
    overrides = [
        f"--override '{pattern}={','.join(f'{key}:{value}' for key, value in change)}'"
        for change, names in changes.items()
        if change
        for pattern in as_globs(names, shapes)
    ]
    if () not in changes:
        remedies.append(" ".join(overrides))
    excluded = " ".join(f"--exclude '{each}'" for each in as_globs([*unfit], shapes))
    remedies.append(f"{excluded} to leave {'it' if len(unfit) == 1 else 'them'} in float")
    return f"{unfit_layers(unfit, shapes, format)}. What helps: {', or '.join(remedies)}"


def named_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Return ``(out, in)`` of all that a recipe may name: linears, the embedding, and an untied head."""
    ends = [model.names.embedding] if model.tied else [model.names.embedding, model.names.head]
    return {**model.linear_shapes(), **dict.fromkeys(ends, model.table_shape)}


def check_recipe(recipe: Recipe, model: Model) -> None:
    """Raise RecipeError unless a recipe names the layers of a model."""
    known = named_shapes(model)
    for name in recipe.layers:
        if name not in known:
            raise RecipeError(
                f"recipe: names layer {shown(name)}, which {model.checkpoint.folder} does not have; its "
                f"layers are like {next(iter(known))}"
            )


def _changed(
    default: Precision,
    pattern: str,
    changes: Mapping[str, int | str] | str,
    format: type[Format],
) -> Precision:
    try:
        said = _said(changes)
    except ValueError as error:
        raise ValueError(f"override of {pattern!r}: {error}") from error
    bits = default.bits if said.bits is None else said.bits
    if said.grid is not None:
        precision = format.precision(bits, "auto", said.grid, ())
    else:
        precision = default if bits == default.bits else format.with_bits(default, bits)
    size = precision.group_size if said.group_size == "auto" else said.group_size
    return replace(precision, group_size=None if size == -1 else size)


def _said(changes: Mapping[str, int | str] | str) -> Spelling:
    """Return what an override says: a precision as people write it, or its parts."""
    if isinstance(changes, str):
        return Spelling.parse(changes)
    unknown = set(changes) - {"bits", "group_size", "grid"}
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known: bits, group_size, grid")
    return combined({name: Spelling.of(name, value) for name, value in changes.items()})
