"""From a float model and options to a run."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from bitwright.blocks.output_metrics import OutputMetrics
from bitwright.grids.tables import SPELLED, stored_scales
from bitwright.loading.model import Model, load_model
from bitwright.models.config import float_config
from bitwright.products import products_for, products_in
from bitwright.quantization.known import (
    ActivationStatistics,
    FolderStatistics,
    ImatrixStatistics,
)
from bitwright.quantization.live import LiveStatistics
from bitwright.quantization.options import QuantizationOptions
from bitwright.quantization.run import AllIsWell, Run, only_checking
from bitwright.quantization.source import NoStatistics, StatisticsSource
from bitwright.records.reports import QuantizationReport
from bitwright.statistics.activation_file import ActivationFile
from bitwright.statistics.folder import Statistics
from bitwright.statistics.imatrix import ImportanceMatrix, ModelImportance
from bitwright.warned import warn


def run_quantization(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizationOptions,
    metrics: OutputMetrics | None = None,
) -> QuantizationReport:
    """Quantize a checkpoint folder into another one; see `bitwright.quantize`. With the metrics of the
    layers' outputs, these are refined in them, too."""
    start = time.perf_counter()
    options.limits.set_threads()
    original = _float_model(model, options.allow_requantize)
    precision = options.precision.for_model(original, options.method.method)
    importance = None
    if options.imatrix is not None:
        importance = ModelImportance(ImportanceMatrix.load(options.imatrix), original)
        _tell_of_missing(importance)
    target = precision.target(original, options.method.method, importance is not None)
    if importance is not None:
        target = replace(target, file=replace(target.file, keys=importance.matrix.keys()))
    products = products_for(options.products, original.dtype)
    with products_in(products), _source(original, options) as (source, bos):
        run = Run(
            original,
            target,
            options.method,
            options.awq,
            source,
            options.limits,
            metrics=metrics,
            two_sided=options.two_sided,
            importance=importance,
        )
        facts = {
            "preset": options.preset,
            "grid": SPELLED.get(target.default.grid, target.default.grid),
            "scales": stored_scales(target.default.grid, target.scale_dtype).name,
            "products": None if products == "float32" else products,
        }
        identity = {
            "bits": precision.bits,
            "group_size": precision.group_size,
            "grid": target.default.grid,
            "bos": bos,
            "products": products,
        }
        return run.write(out, start, facts, identity)


def check_run(
    model: str | os.PathLike[str], out: str | os.PathLike[str], options: QuantizationOptions
) -> None:
    """Raise what `run_quantization` would before its first block; nothing is written.

    For those who call it after work of their own, which would be lost."""
    token = only_checking.set(True)
    try:
        run_quantization(model, out, options)
    except AllIsWell:
        pass
    finally:
        only_checking.reset(token)


def _float_model(place: str | os.PathLike[str], allow_requantize: bool) -> Model:
    model = load_model(place)
    model.warn_of_unused()
    declared = model.checkpoint.config != float_config(model.checkpoint.config)
    packed = declared or model.quantized_layers() or model.checkpoint.decoded_type()
    if model.format and packed and not (allow_requantize or _holds_fp8(model)):
        raise ValueError(
            f"{model.checkpoint.folder}: is quantized already ({model.format.name}); start from the "
            f"original, or say that it may be rounded again: allow_requantize (--allow-requantize). "
            f"bitwright convert changes the format alone"
        )
    return model


def _holds_fp8(model: Model) -> bool:
    """Tell whether the layers are floats of 8 bits by themselves: a source, as there is often no other."""
    return all(
        f"{name}.weight" in model.checkpoint
        and model.checkpoint.stored_dtype(f"{name}.weight") == "F8_E4M3"
        for name in model.quantized_layers()
    )


@contextmanager
def _source(
    model: Model, options: QuantizationOptions
) -> Iterator[tuple[StatisticsSource, object]]:
    """Open what the layers' inputs are known from; yield it, and whether samples begin as texts do."""
    if options.activations is not None:
        with ActivationFile(options.activations) as file:
            yield ActivationStatistics(file), None
    elif options.statistics is not None:
        folder = Statistics(options.statistics)
        folder.check(model)
        yield FolderStatistics(folder), None
    elif options.calibration is not None:
        loaded = options.calibration.load(model)
        yield LiveStatistics(model, loaded.tokens, options.propagates), loaded.bos
    else:
        yield NoStatistics() if options.imatrix is None else ImatrixStatistics(), None


def _tell_of_missing(importance: ModelImportance) -> None:
    """Warn of tensors whose rounding nothing weighs."""
    if importance.missing:
        count, some = len(importance.missing), ", ".join(importance.missing[:3])
        warn(
            f"{importance.matrix.path}: has nothing of {count} tensors of the model, such as {some}; these "
            f"are rounded without weights"
        )
