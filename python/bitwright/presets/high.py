"""The preset that refines layers by what their errors do to the model's predictions."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from bitwright.blocks.output_metrics import OutputMetrics, metric_tokens, plan_gradients
from bitwright.checkpoint import CheckpointWriter
from bitwright.checkpoint.work_folder import GRADIENTS, WorkFolder, kept_until_written
from bitwright.loading.model import Model, load_model
from bitwright.quantization.options import QuantizationOptions
from bitwright.quantization.quantize import check_run, run_quantization
from bitwright.ranks import current
from bitwright.records.reports import QuantizationReport
from bitwright.runs.budget import one_budget, require_all


def high_quantization(
    model: str | os.PathLike[str], out: str | os.PathLike[str], options: QuantizationOptions
) -> QuantizationReport:
    """Quantize as `bitwright.quantize` does with preset high: gradients of the layers' outputs first, then
    the method, refinement and drift correction, each layer being refined in the metric of its outputs,
    too. Until the output is written, the gradients' moments are kept beside it, in
    ``.NAME.gradients.work``."""
    started = time.perf_counter()
    options.limits.set_threads()
    original = load_model(model)
    writer = CheckpointWriter(out, options.limits.overwrite, source=original.checkpoint.source)
    with one_budget(options.limits.memory):
        current().on_first(writer.check_place)
        quiet = replace(options, limits=replace(options.limits, progress=False))
        require_all(
            [lambda: check_run(model, out, quiet), lambda: check_gradients(original, options)]
        )
        with gathered_metrics(original, out, options) as metrics:
            report = run_quantization(model, out, options, metrics)
    return replace(report, seconds=time.perf_counter() - started)


def check_gradients(original: Model, options: QuantizationOptions) -> None:
    """Raise MemoryBudgetError if there is no room for the gradients."""
    assert options.calibration is not None
    tokens = metric_tokens(options.calibration.load(original).tokens)
    plan_gradients(original, tokens, options.limits.memory)


@contextmanager
def gathered_metrics(
    original: Model, out: str | os.PathLike[str], options: QuantizationOptions
) -> Iterator[OutputMetrics]:
    """Yield the metrics of a model's layers' outputs, kept beside the output until that is written."""
    assert options.calibration is not None
    calibration, limits = options.calibration, options.limits
    tokens = metric_tokens(calibration.load(original).tokens)
    with kept_until_written(WorkFolder(out, GRADIENTS)) as work:
        plan = plan_gradients(original, tokens, limits.memory)
        metrics = OutputMetrics(original, tokens, calibration.seed or 0, work, plan)
        metrics.gather(limits.resume, limits.progress)
        yield metrics
