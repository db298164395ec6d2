"""Dynamic precision: a model within a size, with the bits where they matter."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from bitwright.build import set_num_threads
from bitwright.checkpoint.work_folder import SENSITIVITIES, WorkFolder, kept_until_written
from bitwright.checkpoint.writer import check_apart, completed
from bitwright.errors import check_choice
from bitwright.evaluate import Evaluation, check_evaluation, check_text, evaluate
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.files.replacing import check_new_file
from bitwright.formats import FORMATS, FormatName
from bitwright.grids.tensor import Grid
from bitwright.loading.model import Model, load_model
from bitwright.methods.registry import METHODS
from bitwright.precision.choices import Candidate, check_model, choose_precisions, dynamic_choices
from bitwright.precision.estimate import check_estimate, estimate_sensitivities
from bitwright.precision.recipe import Recipe, plan_layers
from bitwright.precision.sensitivities import Sensitivities
from bitwright.presets.quantize import check_quantization, quantize
from bitwright.ranks import current
from bitwright.records.card import add_evaluations, made_by, python_call
from bitwright.records.reports import QuantizationReport
from bitwright.runs.budget import one_budget, require_all
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


@reports_warnings
@expands_home
@same_inputs()
def dynamic_quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target_bpw: float,
    candidates: Sequence[Candidate] | None = None,
    method: str = "gptq",
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
    recipe: str | os.PathLike[str] | None = None,
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
    recipe
        JSON file to write the layers' precisions to, just before `out` appears.
    evaluate_on
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
    ...         demo, f"{folder}/q", 4.5, [(3, 64), (5, 64)], "rtn", data=text, samples=4, length=64,
    ...         sensitivity_samples=4, progress=False,
    ...     )
    >>> report.recipe.bits_per_weight <= 4.5
    True
    """
    arguments = dict(locals())
    if threads is not None:
        set_num_threads(threads)
    original = load_model(model)
    check_choice("method", method, [each.name for each in METHODS.values() if each.bits is None])
    choices = dynamic_choices(
        original, target_bpw, candidates, format, grid, options.get("scale_dtype")
    )
    low, high = choices.ends
    ranks = current()
    if sensitivities is not None and not isinstance(sensitivities, Sensitivities):
        check_apart(Path(os.path.realpath(out)), Path(sensitivities), "sensitivities")
    if recipe is not None:
        check_apart(Path(os.path.realpath(out)), Path(recipe), "recipe")

    def check_recipe_file() -> None:
        if recipe is not None:
            check_new_file(Path(recipe), Recipe.load, overwrite)

    ranks.on_first(check_recipe_file)
    _check_plan(original, format, high, choices.grid, options)
    known = ranks.on_first(lambda: _known(sensitivities))
    if known is not None:
        check_model(known, original)
    elif data is None:
        raise ValueError("data: give text or token ids, or sensitivities that are known")
    text = data if calibration is None else calibration
    if evaluate_on is not None:
        check_text([original], evaluate_on, length, bos=bos)
    making: dict[str, Any] = {
        "method": method,
        "format": format,
        "calibration": text if METHODS[method].needs_inputs or options.get("grid_search") else None,
        "samples": samples,
        "length": length,
        "seed": seed,
        "bos": bos,
        "grid": choices.grid,
        "memory": memory,
        "resume": resume,
        **options,
    }
    found: list[Evaluation] = []
    problem: ValueError | None = None
    evaluating = 0.0  # seconds
    with (
        kept_until_written(WorkFolder(out, SENSITIVITIES)) as work,
        made_by(python_call(dynamic_quantize, arguments)),
        one_budget(memory),
    ):
        # All that does not depend on which layer gets what.
        same = Recipe(dict.fromkeys(original.linear_shapes(), low), target_bpw, target_bpw)
        plans: list[Callable[[], object]] = [
            lambda: check_quantization(model, out, recipe=same, overwrite=overwrite, **making)
        ]
        estimated: dict[str, Any] = {
            "samples": sensitivity_samples,
            "length": length,
            "seed": seed,
            "bos": bos,
            "memory": memory,
        }
        if known is None:
            plans.append(lambda: check_estimate(original, cast(TokenSource, data), **estimated))
        if evaluate_on is not None:
            both = [original, original]  # the quantized one takes no more
            plans.append(lambda: check_evaluation(both, evaluate_on, length, bos, memory))
        require_all(plans)
        if known is None:
            file = None if isinstance(sensitivities, Sensitivities) else sensitivities
            known = estimate_sensitivities(
                original,
                cast(TokenSource, data),
                *low,
                *high,
                **estimated,
                out=work if file is None else file,
                resume=resume,
                progress=progress,
            )
        chosen = choose_precisions(
            original,
            known,
            target_bpw,
            choices.candidates,
            format=format,
            grid=choices.grid,
            scale_dtype=choices.scale_dtype,
            allow_unfused=options.get("allow_unfused", False),
        )

        def complete(folder: Path) -> None:
            nonlocal problem, evaluating
            start = time.perf_counter()
            if evaluate_on is not None:
                try:
                    given: dict[str, Any] = {"length": length, "bos": bos, "memory": memory}
                    before = evaluate(original, evaluate_on, **given)
                    after = evaluate(folder, evaluate_on, reference=original, **given)
                    found.extend((before, after))
                    add_evaluations(folder, {"original": before, "quantized": after})
                except ValueError as error:
                    # What does not depend on it is worth having.
                    problem = error
            evaluating = time.perf_counter() - start
            check_recipe_file()  # hours may have passed
            if recipe is not None:
                chosen.save(recipe)

        with completed(out, complete):
            report = quantize(
                model, out, recipe=chosen, overwrite=overwrite, progress=progress, **making
            )
    found, problem, evaluating = ranks.broadcast((found, problem, evaluating))
    if problem is not None:
        raise problem
    before, after = found or (None, None)
    report = replace(report, seconds=report.seconds - evaluating)
    return DynamicReport(chosen, known, report, before, after)


def _check_plan(
    model: Model, format: FormatName, finest: Candidate, grid: Grid | None, options: dict[str, Any]
) -> None:
    """Raise ValueError if layers that are left out or overridden cannot be so."""
    kind = FORMATS[format]
    asked = ("include", "exclude", "overrides", "embedding_bits", "head_bits", "allow_unfused")
    given = {name: options[name] for name in asked if name in options}
    plan_layers(model, kind, kind.precision(*finest, grid, model.input_channels()), **given)


def _known(
    sensitivities: str | os.PathLike[str] | Sensitivities | None,
) -> Sensitivities | None:
    if sensitivities is None or isinstance(sensitivities, Sensitivities):
        return sensitivities
    WorkFolder(sensitivities).forget_finished()
    return Sensitivities.load(sensitivities) if Path(sensitivities).exists() else None
