"""Dynamic precision: a model within a size, with the bits where they matter."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.work_folder import SENSITIVITIES, WorkFolder, kept_until_written
from bitwright.checkpoint.writer import check_apart, completed
from bitwright.errors import check_choice
from bitwright.evaluation import Evaluation, check_evaluation, check_text, evaluate
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.files.replacing import check_new_file
from bitwright.formats import FORMATS, FormatName
from bitwright.grids.tensor import Grid
from bitwright.loading.model import Model, load_model
from bitwright.methods.method import Method
from bitwright.methods.registry import METHODS
from bitwright.precision.choices import (
    Candidate,
    Choices,
    check_model,
    choose_precisions,
    dynamic_choices,
)
from bitwright.precision.estimate import check_estimate, estimate_sensitivities
from bitwright.precision.options import PrecisionOptions
from bitwright.precision.recipe import Recipe, plan_layers
from bitwright.precision.sensitivities import Sensitivities
from bitwright.precision.whole_size import JUDGED_SAMPLES, WholeSize
from bitwright.presets.quantize import check_quantization, quantize
from bitwright.quantization.options import taken
from bitwright.ranks import current
from bitwright.records.card import add_evaluations, python_call
from bitwright.records.described import extend_report
from bitwright.records.made_by import made_by
from bitwright.records.reports import QuantizationReport
from bitwright.runs.budget import one_budget, require_all
from bitwright.runs.limits import RunLimits
from bitwright.runs.progress import Progressing, in_phases
from bitwright.spellings import Old, respelled
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import TokenSource
from bitwright.warned import reports_warnings


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

    def __str__(self) -> str:
        judged = "" if self.after is None else f"; {self.after}"
        return f"{self.quantization}{judged}"

    def _repr_html_(self) -> str:
        judged = "" if self.after is None else self.after._repr_html_()
        return self.quantization._repr_html_() + judged


@respelled(
    Old("data", "sensitivity_calibration", beside="calibration"),
    Old("data", "calibration"),
    Old("evaluate_on", "evaluation"),
)
@reports_warnings
@expands_home
@finds_models
@same_inputs()
def dynamic_quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target_bpw: float | None = None,
    candidates: Sequence[Candidate] | None = None,
    method: str = "gptq",
    format: FormatName = "mlx",
    calibration: TokenSource | None = None,
    *,
    target_size: int | str | None = None,
    sensitivities: str | os.PathLike[str] | Sensitivities | None = None,
    sensitivity_calibration: TokenSource | None = None,
    sensitivity_samples: int | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    grid: Grid | None = None,
    recipe: str | os.PathLike[str] | None = None,
    evaluation: TokenSource | None = None,
    memory: float | None = None,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progressing = True,
    **options: Any,
) -> DynamicReport:
    """Quantize a checkpoint folder to a target size, with more bits where they matter.

    Parameters
    ----------
    model, out, method, format
        As for `bitwright.quantize`.
    target_bpw, candidates
        See `choose_precisions`.
    target_size
        In place of `target_bpw` the bytes of all weight files, headers included: a number, or such as
        ``"3.2GB"``, ``"500M"`` and ``"2GiB"``. The files are no larger, and little smaller. Embedding and
        head are chosen for, too, where the format holds them: what they cost is measured on a few samples.
    calibration
        Text or token ids to calibrate on, and to estimate the sensitivities on unless there is
        `sensitivity_calibration`.
    sensitivities
        Known ones, or a file of them: read if it is there, otherwise written. A new target needs no new
        estimate.
    sensitivity_calibration, sensitivity_samples
        Text or token ids to estimate the sensitivities on in place of `calibration`, and how many samples
        of it; by default at most 32.
    samples, length, seed, bos, grid, memory, overwrite, threads, progress, options
        As for `bitwright.quantize`.
    recipe
        JSON file to write the layers' precisions to, just before `out` appears.
    evaluation
        Text or token ids to evaluate the original and the result on, just before `out` appears.
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
    MemoryBudgetError
        If the budget is too small for one of the stages, with the smallest that would work for all.
    CheckpointError, CalibrationError, NonFiniteError, OutputError, ValueError
        As `estimate_sensitivities`, `choose_precisions` and `bitwright.quantize`.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> text = demo / "calibration.txt"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = bitwright.dynamic_quantize(
    ...         demo, f"{folder}/q", 4.5, [(3, 64), (5, 64)], "rtn", calibration=text, samples=4, length=64,
    ...         sensitivity_samples=4, progress=False,
    ...     )
    >>> report.recipe.bits_per_weight <= 4.5
    True
    """
    arguments = dict(locals())
    RunLimits(threads=threads).set_threads()
    original = load_model(model)
    check_choice("method", method, [each.name for each in METHODS.values() if each.bits is None])
    estimated_on: Any = calibration if sensitivity_calibration is None else sensitivity_calibration
    stored = {"format": format, "grid": grid, "target_size": target_size, **options}
    within = _Within.of(original, target_bpw, candidates, METHODS[method], stored)
    choices = within.choices
    _check_places(out, sensitivities, recipe, overwrite)
    _check_plan(original, format, choices.ends[1], choices.grid, options)
    known = _known(original, sensitivities)
    reading: dict[str, Any] = {"length": length, "bos": bos, "memory": memory}
    judged = _Judged(original, evaluation, reading, progress)
    estimated = {**reading, "samples": sensitivity_samples, "seed": seed}
    making: dict[str, Any] = {
        **{**reading, "method": method, "format": format, "grid": choices.grid, "seed": seed},
        "calibration": _calibration(method, calibration, options),
        **{"samples": samples, "resume": resume, "overwrite": overwrite, **options},
    }
    with (
        kept_until_written(WorkFolder(out, SENSITIVITIES)) as work,
        made_by(python_call(dynamic_quantize, arguments)),
        one_budget(memory),
        in_phases(progress, *_phases(known is not None, evaluation is not None)),
    ):
        # All that does not depend on which layer gets what.
        lowest = dict.fromkeys(original.linear_shapes(), choices.ends[0])
        same = Recipe(lowest, 0.0, 0.0)
        plans: list[Callable[[], object]] = [
            lambda: check_quantization(model, out, recipe=same, **making),
            judged.check_memory,
        ]
        if known is None:
            plans.insert(1, lambda: check_estimate(original, estimated_on, **estimated))
        require_all(plans)
        if known is None:
            known = estimate_sensitivities(
                *(original, estimated_on, *choices.ends[0], *choices.ends[1]),
                **estimated,
                out=sensitivities if isinstance(sensitivities, str | os.PathLike) else work,
                resume=resume,
                progress=progress,
            )
        judging = CalibrationOptions(estimated_on, sensitivity_samples, length, seed, bos)
        chosen = within.chosen(known, judging)

        def complete(folder: Path) -> None:
            within.compare(folder)
            said = {"recipe": chosen, "sensitivities": known, **judged.evaluate(folder)}
            extend_report(folder, "quantization", said)
            _save_recipe(chosen, recipe, overwrite)

        with completed(out, complete):
            report = quantize(model, out, recipe=chosen, progress=progress, **making)
    before, after, seconds = judged.result()
    spent = replace(report, seconds=report.seconds - seconds)
    return DynamicReport(chosen, known, spent, before, after)


def _phases(known: bool, judged: bool) -> list[tuple[str, float]]:
    """Return what is done, and what that usually takes."""
    estimating = [] if known else [("estimating sensitivities", 2.0)]
    evaluating = [("evaluating", 0.2), ("evaluating", 0.4)] if judged else []
    return [*estimating, ("quantizing", 2.0), *evaluating]


def _calibration(
    method: str, text: TokenSource | None, options: Mapping[str, Any]
) -> TokenSource | None:
    """Return what a method is calibrated on, if it asks for that."""
    return text if METHODS[method].needs_inputs or options.get("grid_search") else None


@dataclass(frozen=True)
class _Within:
    """What precisions are chosen within: bits per weight of the layers, or the size of whole files."""

    model: Model
    choices: Choices
    options: PrecisionOptions
    target_bpw: float
    whole: WholeSize | None

    @classmethod
    def of(
        cls,
        model: Model,
        target_bpw: float | None,
        candidates: Sequence[Candidate] | None,
        method: Method,
        stored: Mapping[str, Any],
    ) -> "_Within":
        """Return it; ValueError unless it is one of the two, and within reach."""
        if (target_bpw is None) == (stored["target_size"] is None):
            raise ValueError("target_bpw: give it, or target_size in its place")
        if target_bpw is not None:
            form = stored["format"], stored["grid"], stored.get("scale_dtype")
            choices = dynamic_choices(model, target_bpw, candidates, *form)
            return cls(model, choices, taken(PrecisionOptions, stored), target_bpw, None)
        options = taken(PrecisionOptions, stored)
        whole = WholeSize.of(model, options, method, candidates)
        return cls(model, whole.choices, options, 0.0, whole)

    def chosen(self, known: Sensitivities, judging: CalibrationOptions) -> Recipe:
        """Return the precision of every layer; what embedding and head cost is measured on some text."""
        if self.whole is not None:
            return self.whole.chosen(known, judging.load(self.model, JUDGED_SAMPLES).tokens)
        return choose_precisions(
            *(self.model, known, self.target_bpw, self.choices.candidates),
            format=self.options.format,
            grid=self.choices.grid,
            scale_dtype=self.choices.scale_dtype,
            allow_unfused=self.options.allow_unfused,
        )

    def compare(self, folder: Path) -> None:
        """Warn if the files are larger than they should be."""
        if self.whole is not None:
            self.whole.compare(folder)


class _Judged:
    """The evaluations of the original and of the result, where there is a text for them."""

    def __init__(
        self,
        original: Model,
        text: TokenSource | None,
        reading: Mapping[str, Any],
        progress: Progressing,
    ) -> None:
        self._original = original
        self._progress = progress
        self._text = text
        self._reading = reading
        self._found: tuple[Evaluation | None, Evaluation | None] = (None, None)
        self._problem: ValueError | None = None
        self._seconds = 0.0
        if text is not None:
            check_text([original], text, reading["length"], bos=reading["bos"])

    def check_memory(self) -> None:
        """Raise MemoryBudgetError if the budget is too small."""
        if self._text is not None:
            both = [self._original, self._original]  # the quantized one takes no more
            check_evaluation(both, self._text, **self._reading)

    def evaluate(self, folder: Path) -> dict[str, Evaluation | None]:
        """Evaluate both, add that to the result's card, and return it by names."""
        if self._text is None:
            return {"before": None, "after": None}
        start = time.perf_counter()
        try:
            how: dict[str, Any] = {**self._reading, "progress": self._progress}
            before = evaluate(self._original, self._text, **how)
            after = evaluate(folder, self._text, reference=self._original, **how)
            self._found = before, after
            add_evaluations(folder, {"original": before, "quantized": after})
        except ValueError as error:
            self._problem = error  # what does not depend on it is worth having
        self._seconds = time.perf_counter() - start
        return dict(zip(("before", "after"), self._found, strict=True))

    def result(self) -> tuple[Evaluation | None, Evaluation | None, float]:
        """Return the evaluations and the seconds that they took, or raise what was wrong with them."""
        found, problem, seconds = current().broadcast((self._found, self._problem, self._seconds))
        if problem is not None:
            raise problem
        return *found, seconds


def _check_places(
    out: str | os.PathLike[str],
    sensitivities: str | os.PathLike[str] | Sensitivities | None,
    recipe: str | os.PathLike[str] | None,
    overwrite: bool,
) -> None:
    """Raise unless the files can be written, and none of them is in the place of another."""
    folder = Path(os.path.realpath(out))
    if sensitivities is not None and not isinstance(sensitivities, Sensitivities):
        check_apart(folder, Path(sensitivities), "sensitivities")
    if recipe is not None:
        check_apart(folder, Path(recipe), "recipe")
    current().on_first(lambda: _check_recipe_file(recipe, overwrite))


def _check_recipe_file(recipe: str | os.PathLike[str] | None, overwrite: bool) -> None:
    if recipe is not None:
        check_new_file(Path(recipe), Recipe.load, overwrite)


def _save_recipe(chosen: Recipe, recipe: str | os.PathLike[str] | None, overwrite: bool) -> None:
    _check_recipe_file(recipe, overwrite)  # hours may have passed
    if recipe is not None:
        chosen.save(recipe)


def _check_plan(
    model: Model, format: FormatName, finest: Candidate, grid: Grid | None, options: dict[str, Any]
) -> None:
    """Raise ValueError if layers that are left out or overridden cannot be so."""
    kind = FORMATS[format]
    ends = ("float_embeddings", "embedding_bits", "head_bits")
    asked = ("include", "exclude", "overrides", *ends, "allow_unfused")
    given = {name: options[name] for name in asked if name in options}
    plan_layers(model, kind, kind.precision(*finest, grid, model.input_channels()), **given)


def _known(
    model: Model,
    sensitivities: str | os.PathLike[str] | Sensitivities | None,
) -> Sensitivities | None:
    """Return sensitivities that are given, or that a file holds; None if they are to be estimated."""

    def read() -> Sensitivities | None:
        if sensitivities is None or isinstance(sensitivities, Sensitivities):
            return sensitivities
        WorkFolder(sensitivities).forget_finished()
        return Sensitivities.load(sensitivities) if Path(sensitivities).exists() else None

    known = current().on_first(read)
    if known is not None:
        check_model(known, model)
    return known
