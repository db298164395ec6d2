"""Prints the reports of runs as figures and tables."""

from collections import Counter

from rich.console import Console

from bitwright.evaluation import Evaluation
from bitwright.precision.recipe import Recipe
from bitwright.precision.sensitivities import Sensitivities, precision_name
from bitwright.records.described import megabytes
from bitwright.records.reports import (
    BlockReport,
    ConversionReport,
    DwqReport,
    QuantizationReport,
    error_text,
)
from bitwright.report.tables import print_facts, print_sentence, print_table
from bitwright.tools.inspect import Inspection

SHOWN_EXPERTS = 12


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
        share = sum(found.parameters.get(name, 0) for name in names) / total
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
        "to write": f"not in the {found.output_format} format: {found.output_problem}"
        if found.output_bytes is None
        else f"{megabytes(found.output_bytes)} of weights in the {found.output_format} format",
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
