"""The preset that refines layers by what their errors do to the model's predictions."""

import os
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitwright.blocks.output_metrics import (
    GradientPlan,
    OutputMetrics,
    metric_tokens,
    plan_gradients,
)
from bitwright.checkpoint import CheckpointWriter
from bitwright.checkpoint.work_folder import GRADIENTS, WorkFolder, kept_until_written
from bitwright.loading.model import Model, load_model
from bitwright.quantization.options import QuantizationOptions
from bitwright.quantization.quantize import check_run, run_quantization
from bitwright.ranks import current
from bitwright.records.reports import QuantizationReport
from bitwright.runs.budget import one_budget, require_all
from bitwright.runs.progress import in_phases


def high_quantization(
    model: str | os.PathLike[str], out: str | os.PathLike[str], options: QuantizationOptions
) -> QuantizationReport:
    """Quantize as `bitwright.quantize` does with preset high: gradients of the layers' outputs first, then
    the method, refinement and drift correction, each layer being refined in the metric of its outputs,
    too. Until the output is written, the gradients' moments are kept beside it, in
    ``.NAME.gradients.work``."""
    assert options.calibration is not None
    started, limits = time.perf_counter(), options.limits
    limits.set_threads()
    original = load_model(model)
    writer = CheckpointWriter(out, limits.overwrite, source=original.checkpoint.source)
    with (
        one_budget(limits.memory),
        in_phases(limits.progress, ("gradients of outputs", 3), ("quantizing", 2)),
        kept_until_written(WorkFolder(out, GRADIENTS)) as work,
    ):
        current().on_first(writer.check_place)
        tokens, plan = check_high(original, out, options)
        metrics = OutputMetrics(original, tokens, options.calibration.seed or 0, work, plan)
        metrics.gather(limits.resume, limits.progress)
        report = run_quantization(model, out, options, metrics)
    return replace(report, seconds=time.perf_counter() - started)


def check_high(
    original: Model, out: str | os.PathLike[str], options: QuantizationOptions
) -> tuple[NDArray[np.int32], GradientPlan]:
    """Raise, before anything is computed, what `high_quantization` would; return the tokens that gradients
    are taken of, and how."""
    assert options.calibration is not None
    tokens = metric_tokens(options.calibration.load(original).tokens)
    quiet = replace(options, limits=replace(options.limits, progress=False))
    plans: list[GradientPlan] = []
    require_all(
        [
            lambda: check_run(original.checkpoint.source, out, quiet),
            lambda: plans.append(plan_gradients(original, tokens, options.limits.memory)),
        ]
    )
    return tokens, plans[0]
