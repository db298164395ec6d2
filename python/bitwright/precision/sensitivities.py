"""The sensitivities of a model's layers, and their file."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bitwright.checkpoint.reader import read_json_object
from bitwright.errors import (
    SensitivityError,
    malformed_as,
    shown,
)
from bitwright.files.home import expands_home
from bitwright.files.replacing import followed, write_json
from bitwright.grids.tensor import BITS
from bitwright.markup import html_table

VERSION = 1


@dataclass(frozen=True)
class Sensitivities:
    """The sensitivity of every layer, and what they were estimated with.

    Parameters
    ----------
    alignments
        By layer: ⟨∇ loss, low − high⟩, the gradient taken where all layers have the low precision; about
        twice what the layer adds to the KL divergence there.
    parameters
        Weights of each layer.
    low, high
        ``(bits, group_size)`` of both precisions.
    model, tokens
        Fingerprints of what was looked at.
    loss
        Whose gradient it is.
    kl_divergence
        Of the model in low precision, in nats per token, on these tokens.
    checksum
        Of all weights of the model; None in files of versions that took none.
    """

    alignments: Mapping[str, float]
    parameters: Mapping[str, int]
    low: tuple[int, int | None]
    high: tuple[int, int | None]
    model: str
    tokens: str
    loss: str
    kl_divergence: float
    checksum: str | None = None
    DERIVED: ClassVar = ("per_million",)

    def __str__(self) -> str:
        most = max(self.per_million, key=self.per_million.__getitem__)
        return (
            f"sensitivities of {len(self.alignments)} layers to {precision_name(self.low)} in place of "
            f"{precision_name(self.high)}, the largest per parameter of {most}; "
            f"KL {self.kl_divergence:.5f} with all in the former"
        )

    def _repr_html_(self) -> str:
        rows = sorted(self.per_million.items(), key=lambda each: -each[1])
        return html_table((name, f"{value:.4g}") for name, value in rows)

    @property
    def per_million(self) -> dict[str, float]:
        """The alignment of each layer per million of its parameters."""
        return {
            name: 1e6 * value / self.parameters[name] for name, value in self.alignments.items()
        }

    @expands_home
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        content = {
            "version": VERSION,
            "model": self.model,
            "checksum": self.checksum,
            "tokens": self.tokens,
            "loss": self.loss,
            "low": precision_name(self.low),
            "high": precision_name(self.high),
            "kl_divergence": self.kl_divergence,
            "layers": {
                name: {
                    "sensitivity": self.per_million[name],
                    "alignment": self.alignments[name],
                    "parameters": self.parameters[name],
                }
                for name in self.alignments
            },
        }
        write_json(followed(path), content)

    @classmethod
    @expands_home
    def load(cls, path: str | os.PathLike[str]) -> "Sensitivities":
        """Read what `save` wrote.

        Raises
        ------
        SensitivityError
            If the file is damaged, or not such a file.
        """
        with malformed_as(
            SensitivityError,
            f"{path}: does not hold sensitivities",
            "; make it with bitwright sensitivities",
        ):
            content = read_json_object(Path(path))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            layers = content["layers"]
            alignments = {str(name): float(each["alignment"]) for name, each in layers.items()}
            parameters = {str(name): int(each["parameters"]) for name, each in layers.items()}
            known = cls(
                alignments,
                parameters,
                parse_precision(content["low"]),
                parse_precision(content["high"]),
                str(content["model"]),
                str(content["tokens"]),
                str(content["loss"]),
                float(content["kl_divergence"]),
                None if content.get("checksum") is None else str(content["checksum"]),
            )
            if not alignments or min(parameters.values()) < 1:
                raise ValueError("no layers")
            if not all(map(math.isfinite, [*alignments.values(), known.kl_divergence])):
                raise ValueError("a number is not finite")
        return known


def precision_name(precision: tuple[int, int | None]) -> str:
    """Write a precision as ``bits:group_size``, with -1 for the whole row."""
    bits, size = precision
    return f"{bits}:{size or -1}"


def parse_precision(text: str) -> tuple[int, int | None]:
    """Read ``bits:group_size``.

    Raises
    ------
    ValueError
        If it is not of that form.
    """
    bits, _, size = str(text).partition(":")
    with suppress(ValueError):
        if int(bits) in BITS and (int(size) > 0 or int(size) == -1):
            return int(bits), None if int(size) == -1 else int(size)
    raise ValueError(
        f"{shown(text)} is not of the form BITS:GROUP_SIZE, with {', '.join(map(str, BITS))} bits"
    )
