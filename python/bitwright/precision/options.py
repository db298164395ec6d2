"""The options of precision: bits, groups, format and grid."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from numpy.typing import DTypeLike

from bitwright.checkpoint.gguf_parts import named_after
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import RecipeError
from bitwright.formats import FORMATS, Format, FormatName, GroupSize
from bitwright.formats.gguf_mix import FLOATS, Mix
from bitwright.formats.spelling import Spelling, combined
from bitwright.grids.tensor import Grid
from bitwright.loading.model import Model
from bitwright.methods.method import Method
from bitwright.precision.byte_count import size_in_bytes
from bitwright.precision.recipe import Overrides, Recipe, check_recipe, plan_layers
from bitwright.precision.target import Target

Kind = type[Format]  # a name of its own, since an option is called type
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
    float_embeddings: bool = False
    embedding_bits: int | None = None
    head_bits: int | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    overrides: Overrides | None = field(default=None)
    recipe: str | os.PathLike[str] | Recipe | None = None
    allow_unfused: bool = False
    type: str | None = None
    pure: bool = False
    tensor_types: Mapping[str, str] | None = None
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    split_max_size: int | None = None
    target_size: int | str | None = None

    def __post_init__(self) -> None:
        self._check_type()
        if self.target_size is not None:
            self._check_size()
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

    def _check_size(self) -> None:
        """Take the bytes of a target; ValueError if it is none, or options say what it decides."""
        try:
            object.__setattr__(self, "target_size", size_in_bytes(self.target_size or 0))
        except ValueError as error:
            raise ValueError(f"target_size: {error}") from error
        for name, usual in (("bits", USUAL_BITS), ("group_size", "auto"), ("recipe", None)):
            if getattr(self, name) != usual:
                raise ValueError(f"{name}: target_size decides that; leave it out")
        if self.type is not None:
            raise ValueError(f"type: {self.type} has a size of its own; leave out one of the two")

    def _check_type(self) -> None:
        """Raise ValueError if options say what a mixture says, or change none."""
        own = ("pure", "tensor_types", "token_embedding_type", "output_tensor_type")
        if self.type is None:
            for name in own:
                if getattr(self, name):
                    raise ValueError(f"{name}: changes a mixture of types; name it (type, --type)")
        else:
            for name in ("bits", "grid", "recipe", "embedding_bits", "head_bits"):
                if getattr(self, name) not in (None, USUAL_BITS if name == "bits" else None):
                    raise ValueError(
                        f"{name}: the type {self.type} says that already; leave it out"
                    )
            if self.group_size != "auto":
                raise ValueError(
                    f"group_size: every type has its own; leave it out beside {self.type}"
                )
        splits = self.format not in FORMATS or self.kind.own_container
        if self.split_max_size is not None and not splits:
            raise ValueError("split_max_size: is for the gguf format; others have files of 5 GB")
        if self.split_max_size is not None and self.split_max_size < 1:
            raise ValueError(
                f"split_max_size: must be a number of bytes, got {self.split_max_size}"
            )

    def mix(self, has_imatrix: bool = False) -> Mix | None:
        """Return the mixture of types that is asked for.

        Raises
        ------
        ValueError
            If there is no such mixture, or it quantizes nothing.
        """
        if self.type is None:
            return None
        mix = Mix(
            self.type,
            self.pure,
            tuple((self.tensor_types or {}).items()),
            self.token_embedding_type,
            self.output_tensor_type,
            has_imatrix,
        )
        if mix.base in FLOATS:
            dtype = {"F32": "float32", "F16": "float16"}.get(mix.base, "bfloat16")
            raise ValueError(
                f"type: {mix.name} quantizes nothing; bitwright convert --format gguf --dtype {dtype} "
                f"writes such a file"
            )
        return mix

    @property
    def kind(self) -> Kind:
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
        known = recipe.overrides()
        for name in (model.names.embedding, model.names.head):
            if name in known and not found.kind.embeddings:
                raise RecipeError(
                    f"recipe: names {name}, which the {found.format} format keeps in float"
                )
            if found.float_embeddings:
                known.pop(name, None)
        overrides: Overrides = {**known, **(found.overrides or {})}
        return replace(found, bits=bits, group_size=group_size, overrides=overrides)

    def target(self, model: Model, method: Method, has_imatrix: bool = False) -> Target:
        """Return what the layers of a model are stored in; of options that are `for_model`.

        Raises
        ------
        ValueError
            If a pattern matches no layer, or the format or the method does not have what is asked for.
        """
        kind, mix = self.kind, self.mix(has_imatrix)
        default = kind.precision(self.bits, self.group_size, self.grid, model.input_channels())
        default = default if mix is None else kind.default_of(mix)
        plan = plan_layers(
            model,
            kind,
            default,
            include=self.include,
            exclude=self.exclude,
            overrides=self.overrides,
            float_embeddings=self.float_embeddings,
            embedding_bits=self.embedding_bits,
            head_bits=self.head_bits,
            only_bits=method.bits,
            allow_unfused=self.allow_unfused,
            mix=mix,
        )
        for name, planned in plan.items():
            is_rounded = name == model.names.embedding
            if planned and method.bits not in (None, planned.bits) and not is_rounded:
                raise ValueError(
                    f"{name}: method {method.name} stores {method.bits} bits, no other number"
                )
        dtype = kind.chosen_scale_dtype(model.dtype, self.scale_dtype)
        stem = "model" if mix is None else f"{named_after(model.checkpoint)}-{mix.name}"
        file = FileOptions(stem, None if mix is None else mix.name, self.split_max_size)
        wider = kind.wider_dtype(model.dtype, self.scale_dtype)
        return Target(kind, plan, default, dtype, file, wider)
