"""The format and precisions of an output."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bitwright.checkpoint.writer import FileOptions
from bitwright.formats import Format, Precision
from bitwright.loading.model import Model
from bitwright.models.layout import ExpertPlace


@dataclass(frozen=True, eq=False)
class Target:
    """The format and precision of every layer.

    Parameters
    ----------
    format
        How they are stored.
    plan
        The precision of every layer by full name, None for float.
    default
        The precision that config.json takes for granted.
    scale_dtype
        Of scales and biases.
    file
        What the files are called, and say.
    wider_dtype
        Of scales of layers that float16 cannot hold; None where there is no choice.
    """

    format: type[Format]
    plan: Mapping[str, Precision | None]
    default: Precision
    scale_dtype: np.dtype[Any]
    file: FileOptions = field(default_factory=FileOptions)
    wider_dtype: np.dtype[Any] | None = None

    def is_planned(self, name: str) -> bool:
        """Tell whether a layer is quantized, by its full name."""
        return self.plan.get(name) is not None

    def config(self, model: Model) -> dict[str, Any]:
        """Return config.json of the output.

        Raises
        ------
        ValueError
            If the experts of a layer that are stored as one tensor are planned differently.
        """
        config = model.config_for(self.format)
        check_stacks(model, self.format, self.plan)
        written = as_written(model, self.format, self.plan)
        blocks = self.format.name_written(model.names.block.format(""), model.nested)
        config.update(self.format.config(self.default, written, blocks))
        return config


class StackedExperts(Protocol):
    """A model, of which some layers belong to experts that a format stores as one tensor."""

    @property
    def experts(self) -> Mapping[str, ExpertPlace]:
        """The place of each such layer, by name."""

    @property
    def nested(self) -> bool:
        """Whether the language model is part of a multimodal model."""


def check_stacks(
    model: StackedExperts, format: type[Format], plan: Mapping[str, Precision | None]
) -> None:
    """Raise ValueError if the experts of a layer that are stored as one tensor are planned differently."""
    if not format.stacks_experts:
        return
    seen: dict[str, Precision | None] = {}
    for name, place in model.experts.items():
        if seen.setdefault(place.stacked_name, plan[name]) != plan[name]:
            raise ValueError(
                f"{name}: the {format.name} format stores all experts of a layer in one tensor, "
                f"so include, exclude and overrides must treat them alike"
            )


def as_written(
    model: StackedExperts, format: type[Format], plan: Mapping[str, Precision | None]
) -> dict[str, Precision | None]:
    """Return the plan by the names that are written: of experts that are stacked, those of the stacks."""
    places = model.experts if format.stacks_experts else {}
    return {
        format.name_written(
            places[name].stacked_name if name in places else name, model.nested
        ): precision
        for name, precision in plan.items()
    }
