"""The reports of runs: what they did, in figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bitwright.formats import Precision
from bitwright.methods.awq import ScaleSearch
from bitwright.records.described import described, megabytes
from bitwright.records.page import fragment_of


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Parameters
    ----------
    name
        Full name, without ``.weight``.
    bits, group_size
        What it is stored in.
    error
        ``‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖²`` over the calibration tokens, estimated on up to 64 output rows;
        without calibration data the same of the weights, ``‖Ŵ − W‖² / ‖W‖²``.
    damping
        What GPTQ needed, relative to the mean of the gram's diagonal; None for other methods.
    few_tokens
        Whether this is an expert that received too few of the calibration tokens, so that its gram is that
        of all tokens, as if each had been routed to it; or, by statistics from files, of what the router
        reads and, for its last layer, of those that it received.
    power
        Its weights were multiplied by two to this power, and what computes its inputs or reads its outputs
        divided by as much, so that its scales are numbers of the dtype that stores them.
    coarse
        Whether most of its scales are so near the smallest number of their dtype that they have less than
        six bits, and no such power could be found.
    below_floor
        How many groups of an affine grid have a scale below 1e-7, the smallest that MLX's own rounding has.
    error_before
        The same error of what was refined; None where nothing was quantized before.
    wide
        Whether its scales are float32, as float16 cannot hold them.
    """

    name: str
    bits: int
    group_size: int
    error: float
    damping: float | None
    few_tokens: bool = False
    power: int = 0
    coarse: bool = False
    below_floor: int = 0
    error_before: float | None = None
    wide: bool = False


@dataclass(frozen=True, eq=False)
class BlockReport:
    """What AWQ did to one decoder block.

    Parameters
    ----------
    index
        Of the block.
    loss_before, loss_after
        Mean squared difference between the quantized and the float block's output over the calibration
        tokens, without and with AWQ.
    scaled
        Whether AWQ's weights were kept; where the loss is not reduced the block falls back to its own.
    searches
        The search of each scale group, by the short name of its first layer.
    """

    index: int
    loss_before: float
    loss_after: float
    scaled: bool
    searches: dict[str, ScaleSearch]

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, exactly."""
        searches = {
            name: [each.scale.tobytes().hex(), each.ratio, list(each.losses.items())]
            for name, each in self.searches.items()
        }
        return {**vars(self), "searches": searches}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "BlockReport":
        """Undo `as_dict`."""
        searches = {
            name: ScaleSearch(np.frombuffer(bytes.fromhex(scale), np.float32), ratio, dict(losses))
            for name, (scale, ratio, losses) in content["searches"].items()
        }
        return cls(**{**content, "searches": searches})

    @property
    def reduction(self) -> float:
        """``loss_after / loss_before``."""
        return self.loss_after / self.loss_before if self.loss_before > 0 else 1.0


@dataclass(frozen=True)
class QuantizationReport:
    """What `bitwright.quantize` did.

    Parameters
    ----------
    out
        The folder that was written.
    method, format
        As asked for; ``"refine"`` for `bitwright.refine_model`.
    layers
        The quantized layers in the order of the computation.
    blocks
        What AWQ did, block by block; empty for other methods.
    layer_bits_per_weight
        Bits stored per weight of the quantized layers, scales and zeros or biases included.
    bits_per_weight
        The same over all tensors of the model.
    size_bytes, original_bytes
        Bytes of all tensors, written and read.
    calibration_tokens
        Tokens that the statistics were gathered over; 0 for none.
    seconds
        Wall time.
    peak_memory_bytes
        Largest resident memory of the process so far.
    warnings
        What was warned of, one line each.
    in_float
        Of a run through transformers, the matrices that stay in float, embedding and head aside: what
        chooses experts, what was excluded, and all that is no linear of the text decoder's blocks.
    training
        Of preset best, how the scales were trained.
    """

    out: Path
    method: str
    format: str
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    layer_bits_per_weight: float
    bits_per_weight: float
    size_bytes: int
    original_bytes: int
    calibration_tokens: int
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()
    training: "DwqReport | None" = None

    def __str__(self) -> str:
        worst = self.worst(1)
        left = f"; {len(self.in_float)} matrices stay in float" if self.in_float else ""
        named = f"; the largest error is {worst[0].error:.2e}, in {worst[0].name}" if worst else ""
        return (
            f"{self.out}: {len(self.layers)} layers by {self.method} in the {self.format} format, "
            f"{self.layer_bits_per_weight:.3f} bits per weight of these, "
            f"{megabytes(self.size_bytes)} (was {megabytes(self.original_bytes)}), "
            f"{self.seconds:.1f} s{named}{left}"
        )

    def _repr_html_(self) -> str:
        return fragment_of(described(self))

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, exactly, without the training."""
        blocks = [block.as_dict() for block in self.blocks]
        layers = [asdict(layer) for layer in self.layers]
        known = {name: value for name, value in vars(self).items() if name != "training"}
        return {**known, "out": str(self.out), "layers": layers, "blocks": blocks}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "QuantizationReport":
        """Undo `as_dict`."""
        return cls(
            **{
                **content,
                "out": Path(content["out"]),
                "warnings": tuple(content.get("warnings", ())),
                "in_float": tuple(content.get("in_float", ())),
                "layers": tuple(LayerReport(**layer) for layer in content["layers"]),
                "blocks": tuple(BlockReport.from_dict(block) for block in content["blocks"]),
            }
        )

    def worst(self, count: int = 5) -> list[LayerReport]:
        """Return the layers with the largest errors, largest first."""
        return sorted(self.layers, key=lambda layer: -layer.error)[:count]

    def mean_errors(self) -> tuple[float | None, float]:
        """Return the mean error of the layers before, None unless all were quantized then, and after."""
        before = [layer.error_before for layer in self.layers if layer.error_before is not None]
        after = [layer.error for layer in self.layers]
        known = before and len(before) == len(after)
        return float(np.mean(before)) if known else None, float(np.mean(after)) if after else 0.0

    def dampings_raised(self, asked: float) -> list[LayerReport]:
        """Return the layers that needed more damping than asked for."""
        return [layer for layer in self.layers if layer.damping and layer.damping > asked]

    def experts_with_few_tokens(self) -> list[str]:
        """Return the names of the experts' layers whose statistics are those of all tokens."""
        return [layer.name for layer in self.layers if layer.few_tokens]


@dataclass(frozen=True, eq=False)
class DwqReport:
    """What `bitwright.dwq_quantize` did.

    Parameters
    ----------
    out
        The folder that was written.
    loss
        What was minimized.
    steps, tokens
        How far it went.
    losses
        The mean loss of each step.
    validations
        Step and KL (nats per token) on the validation samples, the first before training.
    best_step
        The step whose scales were written; 0 if training made nothing better and they were kept.
    stopped
        Why it ended before its last step, None if it did not.
    seconds
        Wall time of this call.
    tokens_per_second
        Of training, validations included.
    peak_memory_bytes
        Largest resident memory of the process so far.
    student
        The report of the run that made the student, if one did.
    warnings
        What was warned of, one line each.
    """

    out: Path
    loss: str
    steps: int
    tokens: int
    losses: tuple[float, ...]
    validations: tuple[tuple[int, float], ...]
    best_step: int
    stopped: str | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    student: QuantizationReport | None = None
    warnings: tuple[str, ...] = ()
    DERIVED: ClassVar = ("kl_before", "kl_after")

    @property
    def kl_before(self) -> float:
        """The validation KL of the student that was given."""
        return self.validations[0][1]

    @property
    def kl_after(self) -> float:
        """The validation KL of the student that was written."""
        return min(value for _, value in self.validations)

    def __str__(self) -> str:
        return (
            f"{self.out}: validation KL {self.kl_before:.5f} before training, {self.kl_after:.5f} after "
            f"{self.tokens:,} tokens in {self.steps} steps, {self.seconds:.1f} s"
        )

    def _repr_html_(self) -> str:
        return fragment_of(described(self))

    def as_dict(self) -> dict[str, Any]:
        """Return what a JSON file can hold of the training; times, which differ from run to run, are left
        out."""
        left_out = (
            "out",
            "seconds",
            "tokens_per_second",
            "peak_memory_bytes",
            "student",
            "warnings",
        )
        known = {name: value for name, value in vars(self).items() if name not in left_out}
        return known | {"kl_before": self.kl_before, "kl_after": self.kl_after}


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer.

    Parameters
    ----------
    name
        Full name, without ``.weight``.
    before, after
        How it was and is stored; `after` None in float.
    error
        ``‖Ŵ − W‖² / ‖W‖²``, W as it was stored: 0 where nothing is lost.
    requantized
        Whether it has new codes; otherwise what is lost is that scales, or the weights in float, are
        rounded.
    """

    name: str
    before: Precision
    after: Precision | None
    error: float
    requantized: bool = False
    DERIVED: ClassVar = ("change",)

    @property
    def change(self) -> str:
        """What was done to it, as people say it."""
        if self.error == 0:
            return "the same"
        if self.requantized:
            return "rounded again"
        return "weights rounded" if self.after is None else "the same codes, scales rounded"


@dataclass(frozen=True)
class ConversionReport:
    """What `bitwright.convert` did.

    Parameters
    ----------
    out
        The folder that was written.
    source_format, format
        From what to what; ``"float"`` where nothing is quantized.
    layers
        All that were quantized.
    size_bytes, original_bytes
        Bytes of all tensors, written and read.
    warnings
        What was warned of, one line each.
    """

    out: Path
    source_format: str
    format: str
    layers: tuple[ConvertedLayer, ...]
    size_bytes: int
    original_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def lossy(self) -> list[ConvertedLayer]:
        """The layers whose weights are not quite what they were."""
        return [layer for layer in self.layers if layer.error > 0]

    def __str__(self) -> str:
        lossy = f"{len(self.lossy)} of them not quite the same" if self.lossy else "all the same"
        return (
            f"{self.out}: {len(self.layers)} layers from {self.source_format} to {self.format}, {lossy}, "
            f"{megabytes(self.size_bytes)} (was {megabytes(self.original_bytes)})"
        )

    def _repr_html_(self) -> str:
        return fragment_of(described(self))

    def changes(self) -> dict[str, str]:
        """Describe what layers have lost, by what was done to them; unchanged ones are left out."""
        kinds: dict[str, list[ConvertedLayer]] = {}
        for layer in self.lossy:
            kinds.setdefault(layer.change, []).append(layer)
        said = {}
        for change, layers in kinds.items():
            worst = max(layers, key=lambda layer: layer.error)
            mean = sum(layer.error for layer in layers) / len(layers)
            said[change] = (
                f"{len(layers)} of {len(self.layers)} layers lose {mean:.2g} of the energy of their "
                f"weights on average, {worst.error:.2g} at most ({worst.name})"
            )
        return said


def error_text(error: float | None) -> str:
    """Write a relative error; nothing for none."""
    return "" if error is None else f"{error:.2e}"
