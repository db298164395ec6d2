"""The options of precision: bits, groups, format and grid."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from numpy.typing import DTypeLike

from bitwright.formats import FORMATS, Format, FormatName, GroupSize
from bitwright.formats.spelling import Spelling, combined
from bitwright.grids.tensor import Grid
from bitwright.loading.model import Model
from bitwright.methods.method import Method
from bitwright.precision.recipe import Overrides, Recipe, check_recipe, plan_layers
from bitwright.precision.target import Target

USUAL_BITS = 4  # where neither bits nor a grid that has its own say otherwise


@dataclass(frozen=True)
class PrecisionOptions:
    """Bits, groups and format of a run; see `bitwright.quantize` for the meaning of each.

    Bits and grid may be written as `Spelling` reads them; here they are numbers and names.
    """

    bits: int = USUAL_BITS
    group_size: GroupSize = "auto"
    format: FormatName = "mlx"
    grid: Grid | None = None
    scale_dtype: DTypeLike | None = None
    embedding_bits: int | None = None
    head_bits: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Overrides | None = field(default=None)
    recipe: str | os.PathLike[str] | Recipe | None = None
    allow_unfused: bool = False

    def __post_init__(self) -> None:
        said: dict[str, Spelling] = {}
        if self.grid is not None:
            said["grid"] = Spelling.parse(self.grid)
        if self.bits != USUAL_BITS or "grid" not in said or said["grid"].bits is None:
            said["bits"] = Spelling.of("bits", self.bits)
        if self.group_size != "auto":
            said["group_size"] = Spelling.of("group_size", self.group_size)
        found = combined(said)
        for name in ("bits", "group_size", "grid"):
            object.__setattr__(self, name, getattr(found, name))

    @property
    def kind(self) -> type[Format]:
        """The format."""
        return FORMATS[self.format]

    def for_model(self, model: Model, method: Method) -> "PrecisionOptions":
        """Return the options with what a recipe says, and the grid that a method is made for.

        Raises
        ------
        RecipeError
            If the recipe cannot be read, or is of another model.
        """
        found = self
        if found.grid is None and method.grid in found.kind.grids:
            found = replace(found, grid=method.grid)
        if found.recipe is None:
            return found
        recipe = found.recipe if isinstance(found.recipe, Recipe) else Recipe.load(found.recipe)
        check_recipe(recipe, model)
        bits, group_size = recipe.most_common
        overrides: Overrides = {**recipe.overrides(), **(found.overrides or {})}
        return replace(found, bits=bits, group_size=group_size, overrides=overrides)

    def target(self, model: Model, method: Method) -> Target:
        """Return what the layers of a model are stored in; of options that are `for_model`.

        Raises
        ------
        ValueError
            If a pattern matches no layer, or the format or the method does not have what is asked for.
        """
        kind = self.kind
        default = kind.precision(self.bits, self.group_size, self.grid, model.input_channels())
        plan = plan_layers(
            model,
            kind,
            default,
            include=self.include,
            exclude=self.exclude,
            overrides=self.overrides,
            embedding_bits=self.embedding_bits,
            head_bits=self.head_bits,
            allow_unfused=self.allow_unfused,
        )
        for name, planned in plan.items():
            is_rounded = name == model.names.embedding
            if planned and method.bits not in (None, planned.bits) and not is_rounded:
                raise ValueError(
                    f"{name}: method {method.name} stores {method.bits} bits, no other number"
                )
        dtype = kind.chosen_scale_dtype(model.dtype, self.scale_dtype)
        return Target(kind, plan, default, dtype)
