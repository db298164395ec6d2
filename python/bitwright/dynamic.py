"""Dynamic precision: a model within a size, with the bits where they matter."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from bitwright import _kernels
from bitwright.calibration import TokenSource
from bitwright.card import add_evaluations, is_made_by_this, made_by, python_call
from bitwright.checkpoint import CheckpointWriter
from bitwright.checkpoint.fingerprint import model_fingerprint
from bitwright.checkpoint.reader import read_json_object
from bitwright.checkpoint.replacing import write_json
from bitwright.checkpoint.work_folder import WorkFolder, as_identity
from bitwright.distributed import current
from bitwright.errors import MALFORMED, OutputExistsError, SensitivityError, check_choice
from bitwright.evaluate import Evaluation, evaluate
from bitwright.formats import FORMATS, Format, FormatName, Precision
from bitwright.methods.dynamic import allocate, check_target
from bitwright.methods.rtn import quantize_rtn
from bitwright.models.model import Model, load_model
from bitwright.pipeline import quantize
from bitwright.recipe import Recipe, check_candidates
from bitwright.report import QuantizationReport
from bitwright.sensitivity import (
    Sensitivities,
    estimate_sensitivities,
)
from bitwright.tensor import Grid, stored_bits
from bitwright.warned import reports_warnings

Candidate = tuple[int, int | None]
DEFAULT_CANDIDATES: tuple[Candidate, ...] = ((3, 64), (4, 64), (5, 64))
ERROR_ROWS = 64  # of each weight, on which candidates are compared
LEAST_SHARE = 1e-3  # of the median alignment, for layers whose own is not positive


@dataclass(frozen=True, eq=False)
class DynamicReport:
    """What `dynamic_quantize` did.

    Parameters
    ----------
    recipe
        The precision of every layer.
    sensitivities
        What it follows from.
    quantization
        The run that used it.
    before, after
        Evaluations of the original and of the result, None unless asked for.
    warnings
        What was warned of, one line each.
    """

    recipe: Recipe
    sensitivities: Sensitivities
    quantization: QuantizationReport
    before: Evaluation | None
    after: Evaluation | None
    warnings: tuple[str, ...] = ()


def choose_precisions(
    model: str | os.PathLike[str] | Model,
    sensitivities: Sensitivities,
    target_bpw: float,
    candidates: Sequence[Candidate] = DEFAULT_CANDIDATES,
    *,
    format: FormatName = "mlx",
    grid: Grid | None = None,
    scale_dtype: DTypeLike | None = None,
) -> Recipe:
    """Choose a precision for every layer so that they take no more than a target together.

    What a layer adds to the divergence in low precision is half its alignment; in another precision it is
    taken to shrink as the rounding error of its weights does. Layers that a format or its engines must
    store alike get one precision: experts in one tensor (mlx), and what vLLM fuses (gptq).

    Parameters
    ----------
    model
        The original.
    sensitivities
        Of this model.
    target_bpw
        Bits per weight over the layers in the blocks, scales and biases or zeros included.
    candidates
        ``(bits, group_size)`` to choose from.
    format, grid, scale_dtype
        How it will be stored; they decide what scales take.

    Returns
    -------
    Recipe

    Raises
    ------
    SensitivityError
        If the sensitivities are those of another model.
    ValueError
        If the target is out of reach, which the message tells, or a candidate cannot be stored.

    Examples
    --------
    >>> import bitwright
    >>> demo = bitwright.demo_folder()
    >>> found = bitwright.estimate_sensitivities(
    ...     demo, demo / "calibration.txt", samples=4, length=64, progress=False
    ... )
    >>> recipe = bitwright.choose_precisions(demo, found, 4.5, [(3, 64), (5, 64)])
    >>> recipe.layers["model.layers.0.self_attn.v_proj"]
    (5, 64)
    """
    original = model if isinstance(model, Model) else load_model(model)
    check_choice("format", format, FORMATS)
    kind = FORMATS[format]
    shapes = original.linear_shapes()
    if sensitivities.model != model_fingerprint(original.checkpoint) or set(shapes) != set(
        sensitivities.alignments
    ):
        raise SensitivityError(
            f"sensitivities: are not those of {original.checkpoint.folder}; estimate them again"
        )
    choices = list(dict.fromkeys(candidates))
    if not choices:
        raise ValueError("candidates: none given")
    if kind.one_precision and len(choices) > 1:
        raise ValueError(
            f"candidates: the {format} format has one precision for all layers; mixed ones can be had in "
            f"the mlx and gptq formats"
        )
    channels = original.input_channels()
    chosen_grid = grid or kind.default_grid(max(bits for bits, _ in choices), channels)
    dtype = kind.scale_dtype(original.dtype) if scale_dtype is None else np.dtype(scale_dtype)
    check_candidates((Precision(*each, chosen_grid) for each in choices), shapes, kind)
    weights = np.array([float(np.prod(shape)) for shape in shapes.values()])
    per_weight = np.empty((len(shapes), len(choices)))
    errors = np.empty_like(per_weight)
    for row, (name, shape) in enumerate(shapes.items()):
        matrix = original.weight(name, shape)
        some = np.ascontiguousarray(matrix[:: -(-len(matrix) // ERROR_ROWS)])
        low_error = _rounding_error(some, sensitivities.low, chosen_grid)
        for column, (bits, size) in enumerate(choices):
            per_weight[row, column] = stored_bits(bits, size or shape[1], chosen_grid, dtype)
            error = _rounding_error(some, (bits, size), chosen_grid)
            errors[row, column] = error / low_error if low_error > 0 else 0.0
    sizes = per_weight * weights[:, None]
    total = weights.sum()
    check_target(target_bpw, sizes.min(axis=1).sum() / total, sizes.max(axis=1).sum() / total)
    alignments = np.array([sensitivities.alignments[name] for name in shapes])
    positive = alignments[alignments > 0]
    least = LEAST_SHARE * float(np.median(positive)) if positive.size else 1.0
    costs = 0.5 * np.maximum(alignments, least)[:, None] * errors
    groups = _moving_together(original, kind)
    places = {name: row for row, name in enumerate(shapes)}
    rows = [[places[name] for name in group] for group in groups]
    picked = allocate(
        [costs[group].sum(axis=0) for group in rows],
        [sizes[group].sum(axis=0) for group in rows],
        target_bpw * total,
    )
    columns = np.empty(len(shapes), np.intp)
    for group, column in zip(rows, picked, strict=True):
        columns[group] = column
    reached = float(sizes[np.arange(len(shapes)), columns].sum() / total)
    layers = {name: choices[column] for name, column in zip(shapes, columns, strict=True)}
    return Recipe(layers, target_bpw, reached)


@reports_warnings
def dynamic_quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target_bpw: float,
    candidates: Sequence[Candidate] = DEFAULT_CANDIDATES,
    method: Literal["gptq", "rtn", "awq", "awq+gptq"] = "gptq",
    format: FormatName = "mlx",
    data: TokenSource | None = None,
    *,
    sensitivities: str | os.PathLike[str] | Sensitivities | None = None,
    sensitivity_samples: int | None = None,
    calibration: TokenSource | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    grid: Grid | None = None,
    evaluate_on: TokenSource | None = None,
    memory: float | None = None,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: bool = True,
    **options: Any,
) -> DynamicReport:
    """Quantize a checkpoint folder to a target size, with more bits where they matter.

    Parameters
    ----------
    model, out, method, format
        As for `bitwright.quantize`.
    target_bpw, candidates
        See `choose_precisions`.
    data
        Text or token ids to estimate the sensitivities on, and to calibrate on unless there is
        `calibration`.
    sensitivities
        Known ones, or a file of them: read if it is there, otherwise written. A new target needs no new
        estimate.
    sensitivity_samples
        How many samples of `data` the estimate takes; by default at most 32.
    calibration, samples, length, seed, bos, grid, memory, overwrite, threads, progress, options
        As for `bitwright.quantize`.
    evaluate_on
        Text or token ids to evaluate the original and the result on.
    resume
        Go on where the same call was interrupted. Until its end the sensitivities are kept beside `out`, in
        ``.NAME.sensitivities.work``, whatever the target is then.

    Returns
    -------
    DynamicReport

    Raises
    ------
    SensitivityError
        If the sensitivities given are of another model or other precisions.
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError
        As `estimate_sensitivities`, `choose_precisions` and `bitwright.quantize`.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> text = demo / "calibration.txt"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.dynamic_quantize(
    ...         demo, f"{folder}/q", 4.5, [(3, 64), (5, 64)], "rtn", data=text, samples=4, length=64,
    ...         sensitivity_samples=4, progress=False,
    ...     )
    >>> report.recipe.bits_per_weight <= 4.5
    True
    """
    arguments = dict(locals())
    if threads is not None:
        _kernels.set_num_threads(threads)
    original = load_model(model)
    low, high = min(candidates, key=fineness), max(candidates, key=fineness)
    ranks = current()
    known = ranks.on_first(lambda: _known(sensitivities))
    with sensitivities_kept(out) as work, made_by(python_call(dynamic_quantize, arguments)):
        written = _Written(work, Path(out), arguments, model_fingerprint(original.checkpoint))
        report = None
        if resume and evaluate_on is not None:
            report, again = ranks.on_first(written.found)
            overwrite = overwrite or again
        if report is None:
            writer = CheckpointWriter(out, overwrite, source=original.checkpoint.source)
            ranks.on_first(writer.check_place)
        if known is None:
            if data is None:
                raise ValueError("data: give text or token ids, or sensitivities that are known")
            file = None if isinstance(sensitivities, Sensitivities) else sensitivities
            known = estimate_sensitivities(
                original,
                data,
                *low,
                *high,
                samples=sensitivity_samples,
                length=length,
                seed=seed,
                bos=bos,
                out=work if file is None else file,
                resume=resume,
                progress=progress,
            )
        recipe = choose_precisions(
            original,
            known,
            target_bpw,
            candidates,
            format=format,
            grid=grid,
            scale_dtype=options.get("scale_dtype"),
        )
        text = data if calibration is None else calibration
        if report is None:
            if evaluate_on is not None:
                written.commit(None)
            report = quantize(
                model,
                out,
                method,
                format=format,
                calibration=None if method == "rtn" and not options.get("grid_search") else text,
                samples=samples,
                length=length,
                seed=seed,
                bos=bos,
                grid=grid,
                recipe=recipe,
                memory=memory,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
                **options,
            )
        before = after = None
        if evaluate_on is not None:
            written.commit(report)
            before = evaluate(original, evaluate_on, length=length, bos=bos)
            after = evaluate(out, evaluate_on, reference=original, length=length, bos=bos)
            rows = {"original": before, "quantized": after}
            ranks.on_first(lambda: add_evaluations(out, rows))
    return DynamicReport(recipe, known, report, before, after)


@contextmanager
def sensitivities_kept(out: str | os.PathLike[str]) -> Iterator[WorkFolder]:
    """Hold a work folder for sensitivities until what follows from them is written."""
    place = WorkFolder(out).out
    with WorkFolder(place.parent / f"{place.name}.sensitivities") as work:
        try:
            yield work
        except OutputExistsError:
            work.keep = False  # of a run that was killed at its very end
            raise


class _Written:
    """What is known of an output that is there already, and is to be evaluated.

    Parameters
    ----------
    work
        Where that is kept.
    out
        The output.
    arguments, model
        Of the call, and the fingerprint of its model.
    """

    def __init__(
        self, work: WorkFolder, out: Path, arguments: Mapping[str, object], model: str
    ) -> None:
        self._work = work
        self._path = work.path / "written.json"
        self._out = out
        free = ("memory", "overwrite", "progress", "resume", "threads")
        given = {name: value for name, value in arguments.items() if name not in free}
        self._identity = as_identity({**given, "model": model})

    def found(self) -> tuple[QuantizationReport | None, bool]:
        """Return what an interrupted run of this very call reported of the output that it has written, and
        whether it has written one without a word of that."""
        with suppress(*MALFORMED, OSError):
            content = read_json_object(self._path)
            if content["identity"] == self._identity:
                self._work.keep = True
                if content["inode"] == self._out.stat().st_ino:
                    return QuantizationReport.from_dict(content["report"]), False
                return None, is_made_by_this(self._out)
        return None, False

    def commit(self, report: QuantizationReport | None) -> None:
        """Remember that the output is about to be written, or is."""
        content = {
            "identity": self._identity,
            "inode": None if report is None else os.stat(self._out).st_ino,
            "report": None if report is None else report.as_dict(),
        }
        current().on_first(lambda: write_json(self._path, content))
        self._work.keep = self._work.keep or report is not None


def _known(
    sensitivities: str | os.PathLike[str] | Sensitivities | None,
) -> Sensitivities | None:
    if sensitivities is None or isinstance(sensitivities, Sensitivities):
        return sensitivities
    return Sensitivities.load(sensitivities) if Path(sensitivities).exists() else None


def fineness(candidate: Candidate) -> tuple[int, float]:
    """Return what orders candidates from coarse to fine."""
    bits, size = candidate
    return bits, 1 / size if size else 0.0


def _rounding_error(weight: np.ndarray[Any, Any], candidate: Candidate, grid: Grid) -> float:
    change = quantize_rtn(weight, *candidate, grid=grid).dequantize() - weight
    return float(np.vdot(change, change))


def _moving_together(model: Model, kind: type[Format]) -> list[list[str]]:
    """Return all layers in groups of those that must have one precision."""
    groups: dict[str, list[str]] = {}
    for index, layout in enumerate(model.layouts):
        prefix = model.block_prefix(index)
        for stage in layout.stages:
            for name in stage.linears:
                place, key = model.experts.get(prefix + name), prefix + name
                if place is not None and kind.fuses_shared_inputs:
                    key = place.prefix
                elif place is not None and kind.stacks_experts:
                    key = place.stacked_name
                elif kind.fuses_shared_inputs:
                    key = prefix + stage.linears[0]
                groups.setdefault(key, []).append(prefix + name)
    return list(groups.values())
