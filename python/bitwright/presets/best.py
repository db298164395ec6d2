"""The preset that takes its time: dynamic precision of the same size, then scales that are trained."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from bitwright.checkpoint import CheckpointWriter
from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.work_folder import SENSITIVITIES, WorkFolder, kept_until_written
from bitwright.distill.training import check_training, dwq_quantize
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.formats import Format, FormatName, GroupSize, Precision
from bitwright.grids.tables import TABLES
from bitwright.grids.tensor import K_GRIDS, Grid, stored_bits
from bitwright.loading.model import Model, load_model
from bitwright.precision.choices import Candidate, choose_precisions, fineness
from bitwright.precision.estimate import check_estimate, estimate_sensitivities
from bitwright.precision.options import PrecisionOptions
from bitwright.precision.recipe import Recipe
from bitwright.precision.whole_size import WholeSize
from bitwright.presets.high import check_high, high_quantization
from bitwright.quantization.options import QuantizationOptions
from bitwright.quantization.quantize import check_run, run_quantization
from bitwright.ranks import current
from bitwright.records.card import python_call
from bitwright.records.made_by import made_by
from bitwright.records.reports import DwqReport, QuantizationReport
from bitwright.runs.budget import one_budget, require_all
from bitwright.runs.progress import Progressing, in_phases
from bitwright.text.builtin import given_or_builtin
from bitwright.text.samples import TokenSource
from bitwright.warned import reports_warnings

TRAINED_TOKENS = 100_000
LEARNING_RATE = 3e-4  # what is known to suit students that are good already


@reports_warnings
@expands_home
@finds_models
@same_inputs()
def quantize_best(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: Any = "gptq",
    bits: int = 4,
    group_size: GroupSize = "auto",
    format: FormatName = "mlx",
    calibration: TokenSource | None = None,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: bool = True,
    grid: Grid | None = None,
    recipe: Any = None,
    memory: float | None = None,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    progress: Progressing = True,
    **options: Any,
) -> QuantizationReport:
    """Quantize as well as is known within the size that `bits` and `group_size` would take.

    Sensitivities are estimated, and every layer gets a precision around the one asked for, in groups of the
    same or twice the size, so that all layers together take no more than they would have. Then come the
    method as preset ``"high"`` does it, where it refines, and DWQ on as many as 100,000 tokens of
    `calibration`. Where the format has one precision for all layers, or a recipe is given, that is what is
    used. With `target_size` (an option) they are chosen within the bytes of all weight files, see
    `dynamic_quantize`.

    Parameters
    ----------
    model, out, method, bits, group_size, format, calibration, samples, length, seed, bos, grid, recipe
        As for `bitwright.quantize`; `samples` do not limit what DWQ trains on.
    memory, overwrite, threads, progress, options
        As for `bitwright.quantize`.
    resume
        Go on where the same call was interrupted. Until its end the sensitivities are kept beside `out`, in
        ``.NAME.sensitivities.work``, and all else in ``.NAME.work``.

    Returns
    -------
    QuantizationReport
        Of the method, with the time and memory of everything.

    Raises
    ------
    ValueError
        If there is no calibration data, or as `bitwright.quantize`, `choose_precisions` and `dwq_quantize`.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
    ...     bitwright.quantize_best(demo, f"{folder}/q", bits=3, calibration=demo / "calibration.txt")
    """
    arguments = dict(locals())
    given = {"preset": "best", **arguments, **options}
    del given["options"]
    with made_by(python_call(quantize_best, arguments)):
        return best_quantization(model, out, QuantizationOptions.of(given))


def best_quantization(
    model: str | os.PathLike[str], out: str | os.PathLike[str], options: QuantizationOptions
) -> QuantizationReport:
    """Quantize as `quantize_best` does."""
    started = time.perf_counter()
    options.limits.set_threads()
    original = load_model(model)
    if options.preset == "best":  # which is what this is: the stages have another one
        options = replace(options, preset="high" if options.method.refine else "default")
    recipe = options.precision.recipe
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    chooses = recipe is None and _can_choose(original, options.precision)
    writer = CheckpointWriter(out, options.limits.overwrite, source=original.checkpoint.source)
    with (
        kept_until_written(WorkFolder(out, SENSITIVITIES)) as work,
        one_budget(options.limits.memory),
        in_phases(options.limits.progress, *_phases(chooses, options.two_sided)),
    ):
        current().on_first(writer.check_place)
        whole = _require_room(original, model, out, options, chooses)
        if chooses:
            recipe = _chosen(original, options, work, whole)
        precision = replace(options.precision, recipe=recipe, target_size=None)
        options = replace(options, precision=precision)
        trained = _trained(model, out, options)
    return replace(
        cast(QuantizationReport, trained.student),
        out=Path(out),
        training=replace(trained, student=None),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=trained.peak_memory_bytes,
    )


def _phases(chooses: bool, two_sided: bool) -> list[tuple[str, float]]:
    """Return what is done, and what that usually takes."""
    estimating = [("estimating sensitivities", 2.0)] if chooses else []
    gradients = [("gradients of outputs", 3.0)] if two_sided else []
    return [*estimating, *gradients, ("quantizing", 2.0), ("teaching", 1.0), ("distilling", 12.0)]


def _can_choose(original: Model, asked: PrecisionOptions) -> bool:
    """Tell whether layers may differ: layers that are left out because they have no whole groups cannot be
    compared in them either."""
    kind, channels = asked.kind, original.input_channels()
    precision = kind.precision(asked.bits, asked.group_size, asked.grid, channels)
    fits = all(kind.fits(each, precision) for each in channels)
    alone = precision.grid in TABLES  # has no neighbours of other bits
    return fits and not kind.one_precision and not asked.overrides and not alone


def _estimated(options: QuantizationOptions) -> dict[str, Any]:
    """Return what sensitivities are estimated on."""
    assert options.calibration is not None
    known = vars(options.calibration)
    return {name: known[name] for name in ("length", "seed", "bos")} | {
        "memory": options.limits.memory
    }


def _require_room(
    original: Model,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizationOptions,
    chooses: bool,
) -> WholeSize | None:
    """Raise, before anything is computed, what one of the stages would; return what precisions are chosen
    within where the size of whole files is asked for."""
    assert options.calibration is not None
    source = given_or_builtin(options.calibration.source)
    estimated = _estimated(options)
    quiet = replace(options, limits=replace(options.limits, progress=False))
    asked, whole = options.precision, None
    if asked.target_size is not None:  # which only a recipe fills
        if not chooses:
            raise ValueError(
                "target_size: with these options all layers have one precision; leave out target_size or "
                "what says so (recipe, overrides, grid, format)"
            )
        whole = WholeSize.of(original, asked, options.method.method)
    plans: list[Callable[[], object]] = [
        lambda: (
            check_high(original, out, quiet) if options.two_sided else check_run(model, out, quiet)
        ),
        lambda: check_training(original, source, *estimated.values()),
    ]
    if chooses:
        plans.append(lambda: check_estimate(original, source, samples=None, **estimated))
    require_all(plans)
    return whole


def _chosen(
    original: Model, options: QuantizationOptions, work: WorkFolder, whole: WholeSize | None
) -> Recipe:
    """Return precisions around the one asked for, so that all layers take no more than they would have."""
    assert options.calibration is not None
    asked, limits = options.precision, options.limits
    kind, method = asked.kind, options.method.method
    precision = kind.precision(asked.bits, asked.group_size, asked.grid, original.input_channels())
    candidates = _candidates(kind, precision, original.input_channels())
    if whole is not None:
        candidates = list(whole.choices.candidates)
    found = estimate_sensitivities(
        original,
        options.calibration.source,
        *min(candidates, key=fineness),
        *max(candidates, key=fineness),
        **_estimated(options),
        out=work,
        resume=limits.resume,
        progress=limits.progress,
    )
    if whole is not None:
        return whole.chosen(found, options.calibration.load(original).tokens)
    dtype = kind.chosen_scale_dtype(original.dtype, asked.scale_dtype)
    shapes = list(original.linear_shapes().values())
    weights = [out_channels * channels for out_channels, channels in shapes]
    size = precision.group_size
    taken = sum(
        weight * stored_bits(asked.bits, size or shape[1], precision.grid, dtype)
        for weight, shape in zip(weights, shapes, strict=True)
    )
    chosen = choose_precisions(
        original,
        found,
        taken / sum(weights),
        candidates,
        format=asked.format,
        grid=precision.grid,
        scale_dtype=dtype,
        allow_unfused=asked.allow_unfused,
    )
    plan = asked.for_model(original, method).target(original, method).plan
    # What goes with the precision asked for, whatever most layers get.
    ends = {
        name: (each.bits, each.group_size)
        for name in (original.names.embedding, original.names.head)
        if (each := plan.get(name)) is not None
    }
    return replace(chosen, layers={**chosen.layers, **ends})


def _trained(
    model: str | os.PathLike[str], out: str | os.PathLike[str], options: QuantizationOptions
) -> DwqReport:
    """Quantize, and train the scales of what comes of it."""
    assert options.calibration is not None
    calibration, limits, recipe = options.calibration, options.limits, options.precision.recipe

    def make(folder: Path) -> QuantizationReport:
        quantize = high_quantization if options.two_sided else run_quantization
        return quantize(model, folder, replace(options, limits=replace(limits, overwrite=False)))

    layers = sorted(recipe.layers.items()) if isinstance(recipe, Recipe) else None
    chosen = hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:16]
    return dwq_quantize(
        model,
        make,
        out,
        calibration.source,
        made_with={**options.identity(), "precisions": chosen},
        length=calibration.length,
        tokens=TRAINED_TOKENS,
        seed=calibration.seed or 0,
        bos=calibration.bos,
        learning_rate=LEARNING_RATE,
        memory=limits.memory,
        overwrite=limits.overwrite,
        resume=limits.resume,
        progress=limits.progress,
    )


def _candidates(kind: type[Format], asked: Precision, channels: set[int]) -> list[Candidate]:
    """Return precisions around the one asked for, that the format stores."""
    near, size = [other for other in kind.bits if abs(other - asked.bits) <= 1], asked.group_size
    if asked.grid == "k":
        return [(each, K_GRIDS[each].group_size) for each in near if each in K_GRIDS]
    groups: list[int | None] = [size]
    if (
        size is not None
        and 2 * size in kind.group_sizes
        and not any(n % (2 * size) for n in channels)
    ):
        groups.append(2 * size)
    return [(each, group) for each in near for group in groups]
