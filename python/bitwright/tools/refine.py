"""Refinement of a quantized model; its format, bits and size stay."""

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitwright.blocks.scaling import AwqOptions
from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.writer import check_apart
from bitwright.distill.training import check_pair
from bitwright.errors import UnsupportedModelError
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.formats import Precision
from bitwright.loading.model import load_model
from bitwright.methods.method import CORRECTED_DAMPING, DAMPING, MethodOptions
from bitwright.methods.registry import METHODS
from bitwright.precision.target import Target
from bitwright.quantization.live import LiveStatistics
from bitwright.quantization.run import Run
from bitwright.records.card import python_call
from bitwright.records.made_by import made_by
from bitwright.records.reports import QuantizationReport
from bitwright.runs.limits import RunLimits
from bitwright.runs.progress import Progressing
from bitwright.spellings import Old, respelled
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import TokenSource
from bitwright.tools.convert import precision_of
from bitwright.warned import reports_warnings


@respelled(Old("original", "reference"), Old("quantized", "model"))
@reports_warnings
@expands_home
@finds_models
@same_inputs()
def refine_model(
    reference: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: TokenSource | None = None,
    *,
    drift: bool = True,
    damping: float | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    memory: float | None = None,
    resume: bool = True,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progressing = True,
) -> QuantizationReport:
    """Improve the codes and scales of a model that any tool has quantized; format and size stay.

    The model is streamed block by block: each layer starts from its codes and goes through
    `bitwright.refine` with the statistics that it sees behind the refined layers before it.

    Parameters
    ----------
    reference
        Checkpoint folder of the original in float, what `model` was made from.
    model
        Folder or GGUF file in any format that is read, with groups of consecutive channels.
    out
        Folder to write; it appears when everything is done, or not at all.
    calibration, samples, length, seed, bos, memory, resume, overwrite, threads, progress
        As for `bitwright.quantize`.
    drift
        Aim at weights that make up for what the errors of earlier layers do to a layer's inputs.
    damping
        As for `bitwright.refine`; by default 0.05 with `drift` and 0.01 without.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError
        If the two do not belong together or anything else is wrong. Nothing is written then.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> text = demo / "calibration.txt"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.quantize(demo, f"{folder}/rtn", "rtn", 3, progress=False)
    ...     refined = bitwright.refine_model(
    ...         demo, f"{folder}/rtn", f"{folder}/refined", text, samples=8, length=128, progress=False
    ...     )
    >>> refined.layer_bits_per_weight == report.layer_bits_per_weight
    True
    """
    arguments = dict(locals())
    start = time.perf_counter()
    limits = RunLimits(memory, resume, overwrite, threads, progress)
    limits.set_threads()
    original, student = load_model(reference), load_model(model)
    check_apart(Path(os.path.realpath(out)), student.checkpoint.source, "model that is refined")
    check_pair(original, student)
    layers = student.quantized_layers()
    if student.format is None or not layers:
        raise UnsupportedModelError(
            f"{student.checkpoint.folder}: none of its layers is quantized; quantize it first"
        )
    kind = type(student.format)
    plan: dict[str, Precision | None] = dict.fromkeys(original.linear_shapes())
    plan |= dict.fromkeys(original.never_quantized())
    for name, shape in layers.items():
        tensor = student.stored(name, shape)
        if tensor.group_index is not None:
            raise ValueError(
                f"{student.checkpoint.folder}: layer {name} has groups of channels that are not "
                f"consecutive (act-order); these cannot be refined, but trained (bitwright dwq)"
            )
        target = original.names.embedding if name == student.embedding_name else name
        plan[target] = precision_of(tensor, kind)
    known = [each for each in plan.values() if each]
    default = Counter(known).most_common(1)[0][0]
    if kind.one_grid and any(each.grid != default.grid for each in known):
        default = replace(default, grid="zero_point")
        plan = {name: each and replace(each, grid="zero_point") for name, each in plan.items()}
    if damping is None:
        damping = CORRECTED_DAMPING if drift else DAMPING
    options = MethodOptions(METHODS["rtn"], damping, refine=True, drift=drift)
    loaded = CalibrationOptions(calibration, samples, length, seed, bos).load(original)
    dtype = np.dtype(np.float32)  # each layer's scales keep their own
    run = Run(
        original,
        Target(kind, plan, default, dtype),
        options,
        AwqOptions(),
        LiveStatistics(original, loaded.tokens, True),
        limits,
        student,
    )
    facts = {"refined from": Path(model).name, "grid": default.grid}
    with made_by(python_call(refine_model, arguments)):
        return run.write(out, start, facts, {"bos": loaded.bos})
