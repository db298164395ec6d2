"""Which tokens a model is calibrated on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bitwright.text.builtin import given_or_builtin
from bitwright.text.samples import DEFAULT_SAMPLES, Samples, TokenSource, Windows, load_samples


class Reader(Protocol):
    """A model that tokens are for."""

    @property
    def folder(self) -> Path:
        """Where its tokenizer is."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows."""
        ...

    @property
    def positions(self) -> int | None:
        """How many positions it has learned; None if that is not known."""
        ...


@dataclass(frozen=True)
class CalibrationOptions:
    """Text or token ids, by default the built-in text, and what is taken; see `bitwright.quantize`."""

    source: TokenSource | None
    samples: int | None = None
    length: int | None = None
    seed: int | None = 0
    bos: bool = True
    windows: Windows = "whole"

    def load(self, model: Reader, most: int | None = DEFAULT_SAMPLES) -> Samples:
        """Return the samples for a model, by default at most so many.

        Raises
        ------
        CalibrationError
            If the data cannot be read, holds ids that the model does not know, or is too little.
        """
        return load_samples(
            given_or_builtin(self.source),
            tokenizer=model.folder,
            length=self.length,
            samples=self.samples,
            seed=self.seed,
            vocab_size=model.vocab_size,
            positions=model.positions,
            bos=self.bos,
            most=most,
            windows=self.windows,
        )
