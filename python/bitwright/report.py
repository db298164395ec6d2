"""What a run did, as figures and as tables."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bitwright.evaluate import Evaluation
from bitwright.formats import Precision
from bitwright.inspection import Inspection
from bitwright.methods.awq import ScaleSearch
from bitwright.recipe import Recipe
from bitwright.sensitivity import Sensitivities, precision_name
from bitwright.tables import print_facts, print_sentence, print_table

SHOWN_EXPERTS = 12


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
        """Return what `as_dict` was made of."""
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

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, exactly."""
        blocks = [block.as_dict() for block in self.blocks]
        layers = [asdict(layer) for layer in self.layers]
        return {**vars(self), "out": str(self.out), "layers": layers, "blocks": blocks}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "QuantizationReport":
        """Return what `as_dict` was made of."""
        return cls(
            **{
                **content,
                "out": Path(content["out"]),
                "warnings": tuple(content.get("warnings", ())),
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

    @property
    def kl_before(self) -> float:
        """The validation KL of the student that was given."""
        return self.validations[0][1]

    @property
    def kl_after(self) -> float:
        """The validation KL of the student that was written."""
        return min(value for _, value in self.validations)

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


def print_dwq_report(report: DwqReport, console: Console) -> None:
    """Print what training has changed."""
    change = 100 * (1 - report.kl_after / report.kl_before) if report.kl_before else 0.0
    facts = {
        "written to": str(report.out),
        "trained on": f"{report.tokens:,} tokens in {report.steps} steps, loss {report.loss}",
        "validation KL": f"{report.kl_before:.5f} before, {report.kl_after:.5f} after "
        f"({change:.1f} % less)",
        "best step": str(report.best_step),
        "time": f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s",
        "peak memory": megabytes(report.peak_memory_bytes),
    }
    print_facts(facts, console)
    if report.stopped:
        print_sentence(f"Stopped: {report.stopped}. What was best until then is written.", console)
    if report.best_step == 0:
        print_sentence(
            "Training made nothing better: the scales are those of the student that was given. A smaller "
            "learning rate or more data may help.",
            console,
        )


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

    def changes(self) -> dict[str, str]:
        """Say what layers have lost, by what was done to them; nothing of those that are the same."""
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


def print_conversion(report: ConversionReport, console: Console) -> None:
    """Print what became of the layers, alike ones together."""
    kinds = Counter((layer.before, layer.after, layer.change) for layer in report.layers)
    rows = [
        (str(count), before.words(), after.words() if after else "float", change)
        for (before, after, change), count in kinds.items()
    ]
    headings = ("layers", report.source_format, report.format, "weights")
    print_table(headings, rows, console, words=(1, 2, 3))
    print_sentence(
        f"written to {report.out}: {megabytes(report.size_bytes)}, from "
        f"{megabytes(report.original_bytes)}",
        console,
    )
    for change, what in report.changes().items():
        print_sentence(f"{change}: {what}", console)


def print_sensitivities(found: Sensitivities, console: Console, count: int = 10) -> None:
    """Print the layers that matter most and least."""
    low, high = precision_name(found.low), precision_name(found.high)
    ranked = sorted(found.per_million.items(), key=lambda each: -each[1])
    few = len(ranked) <= 2 * count
    shown: list[tuple[str, float | None]] = [
        *(ranked if few else [*ranked[:count], ("…", None), *ranked[-count:]])
    ]
    rows = [(name, "" if value is None else f"{value:.4g}") for name, value in shown]
    title = f"{low} instead of {high}, per million parameters"
    print_table(("layer", "sensitivity"), rows, console, title, words=(0,))
    print_sentence(f"all layers in {low}: KL {found.kl_divergence:.5f} nats per token", console)


def print_recipe(recipe: Recipe, found: Sensitivities, console: Console) -> None:
    """Print how many layers and weights have each precision."""
    total = sum(found.parameters.values())
    rows = []
    for precision in sorted(set(recipe.layers.values()), key=str):
        names = [name for name, each in recipe.layers.items() if each == precision]
        share = sum(found.parameters[name] for name in names) / total
        rows.append((precision_name(precision), str(len(names)), f"{100 * share:.1f} %"))
    title = f"{recipe.bits_per_weight:.4f} bits per weight"
    print_table(("bits:group", "layers", "weights"), rows, console, title)


def print_report(report: QuantizationReport, console: Console) -> None:
    """Print the summary and the worst layers."""
    earlier, error = report.mean_errors()
    facts = {
        "written to": str(report.out),
        "method, format": f"{report.method}, {report.format}",
        "bits per weight": f"{report.layer_bits_per_weight:.3f} in the {len(report.layers)} quantized "
        f"layers, {report.bits_per_weight:.3f} over all tensors",
        "size": f"{megabytes(report.size_bytes)} (was {megabytes(report.original_bytes)})",
        "calibration": f"{report.calibration_tokens:,} tokens",
        "time": f"{report.seconds:.1f} s",
        "peak memory": megabytes(report.peak_memory_bytes),
    }
    if earlier is not None:
        facts["mean error"] = f"{earlier:.2e} before, {error:.2e} after"
    print_facts(facts, console)
    compared = any(layer.error_before is not None for layer in report.layers)
    rows = [
        (
            layer.name,
            str(layer.bits),
            str(layer.group_size),
            *([error_text(layer.error_before)] if compared else []),
            f"{layer.error:.2e}",
            "" if layer.damping is None else f"{layer.damping:g}",
        )
        for layer in report.worst()
    ]
    errors = ("error before", "after") if compared else ("relative error",)
    headings = ("layer", "bits", "group", *errors, "damping")
    print_table(headings, rows, console, "worst layers", words=(0,))
    few = report.experts_with_few_tokens()
    if few:
        shown = ", ".join(few[:SHOWN_EXPERTS]) + (", …" if len(few) > SHOWN_EXPERTS else "")
        print_sentence(
            f"{len(few)} layers of experts received too few calibration tokens and share their "
            f"layer's statistics: {shown}",
            console,
        )
    if report.blocks:
        print_blocks(report.blocks, console)


def print_blocks(blocks: tuple[BlockReport, ...], console: Console) -> None:
    """Print what AWQ did to each block."""
    rows = [
        (
            str(block.index),
            f"{block.loss_before:.3e}",
            f"{block.loss_after:.3e}",
            f"{block.reduction:.3f}",
            ", ".join(f"{name} {search.ratio:g}" for name, search in block.searches.items())
            if block.scaled
            else "loss is not reduced: weights kept as they were",
        )
        for block in blocks
    ]
    headings = ("block", "loss before", "after", "ratio", "exponents of the activations")
    print_table(headings, rows, console, "AWQ, block by block", words=(4,))


def print_evaluations(rows: dict[str, Evaluation], console: Console) -> None:
    """Print evaluations side by side, one row each, by the names given."""
    shown = [
        (
            name,
            f"{result.perplexity:.4f}",
            "" if result.reference_perplexity is None else f"{result.reference_perplexity:.4f}",
            "" if result.kl_divergence is None else f"{result.kl_divergence:.5f}",
            "" if result.top1_agreement is None else f"{100 * result.top1_agreement:.2f} %",
            f"{result.bits_per_weight:.3f}",
            f"{result.tokens_per_second:,.0f}",
            megabytes(result.peak_memory_bytes),
        )
        for name, result in rows.items()
    ]
    of_model = ("model", "perplexity", "reference", "KL (nats/token)", "top-1")
    headings = (*of_model, "bits/weight", "tokens/s", "memory")
    print_table(headings, shown, console, words=(0,))
    if any(result.windows == "llama.cpp" for result in rows.values()):
        print_sentence(
            "judged as by llama-perplexity: the second halves of windows of the text", console
        )


def print_inspection(found: Inspection, console: Console) -> None:
    """Print what a checkpoint holds and what quantizing it would take."""
    experts = f", {found.experts} experts" if found.experts else ""
    facts = {
        "model": f"{found.folder} ({found.model_type}, {found.dtype})",
        "stored in": found.format or "float",
        "blocks": f"{found.blocks}{experts}",
        "parameters": f"{found.parameters:,}, {found.bits_per_weight:.3f} bits each"
        f"{', embedding and head are one matrix' if found.tied else ''}",
        "to quantize": f"{found.method}, preset {found.preset}, would take about "
        f"{megabytes(found.memory_bytes)} of memory and {found.seconds:,.0f} s here, with "
        f"{found.tokens:,} calibration tokens",
    }
    print_facts(facts, console)
    rows = [
        (
            layer.name,
            f"{layer.shape[0]} × {layer.shape[1]}",
            str(layer.count),
            "yes" if layer.quantized else "no",
        )
        for layer in found.layers
    ]
    headings = ("layer", "out × in", "count", "quantized")
    print_table(headings, rows, console, "matrices in the blocks", words=(0,))


def error_text(error: float | None) -> str:
    """Write a relative error; nothing for none."""
    return "" if error is None else f"{error:.2e}"


def megabytes(size: int) -> str:
    """Write a number of bytes in megabytes."""
    return f"{size / 1e6:,.1f} MB"
