"""The preset that takes its time: dynamic precision of the same size, then scales that are trained."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from bitwright.budget import one_budget, require_all
from bitwright.build import set_num_threads
from bitwright.calibration import TokenSource
from bitwright.card import made_by, python_call
from bitwright.checkpoint import CheckpointWriter
from bitwright.checkpoint.inputs import same_inputs
from bitwright.checkpoint.reader import require_model
from bitwright.checkpoint.work_folder import SENSITIVITIES, WorkFolder, kept_until_written
from bitwright.distributed import current
from bitwright.dwq import check_training, dwq_quantize
from bitwright.dynamic import Candidate, choose_precisions, fineness
from bitwright.formats import FORMATS, Format, FormatName, GroupSize, Precision
from bitwright.home import expands_home
from bitwright.models.model import load_model
from bitwright.pipeline import check_quantization, quantize
from bitwright.recipe import Recipe
from bitwright.report import QuantizationReport
from bitwright.sensitivity import check_estimate, estimate_sensitivities
from bitwright.tensor import K_GRIDS, Grid, stored_bits
from bitwright.warned import reports_warnings

TRAINED_TOKENS = 100_000
LEARNING_RATE = 3e-4  # what is known to suit students that are good already


@reports_warnings
@expands_home
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
    progress: bool = True,
    **options: Any,
) -> QuantizationReport:
    """Quantize as well as is known within the size that `bits` and `group_size` would take.

    Sensitivities are estimated, and every layer gets a precision around the one asked for, in groups of the
    same or twice the size, so that all layers together take no more than they would have. Then come the
    method with refinement and drift correction, and DWQ on as many as 100,000 tokens of `calibration`.
    Where the format has one precision for all layers, or a recipe is given, that is what is used.

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
    started = time.perf_counter()
    require_model(model)
    if threads is not None:
        set_num_threads(threads)
    if calibration is None:
        raise ValueError("calibration: preset best needs text or token ids")
    original = load_model(model)
    kind = FORMATS[format]
    asked = kind.precision(bits, group_size, grid, original.input_channels())
    size = asked.group_size
    # Layers that are left out because they have no whole groups cannot be compared in them either.
    fits = all(kind.fits(channels, asked) for channels in original.input_channels())
    writer = CheckpointWriter(out, overwrite, source=original.checkpoint.source)
    with (
        made_by(python_call(quantize_best, arguments)),
        kept_until_written(WorkFolder(out, SENSITIVITIES)) as work,
        one_budget(memory),
    ):
        current().on_first(writer.check_place)
        making = {
            "method": method,
            "bits": bits,
            "group_size": group_size,
            "format": format,
            "samples": samples,
            "length": length,
            "seed": seed,
            "bos": bos,
            "grid": grid,
            **options,
        }
        if recipe is not None and not isinstance(recipe, Recipe):
            recipe = Recipe.load(recipe)
        limits = {"calibration": calibration, "memory": memory, "overwrite": overwrite}
        chooses = recipe is None and not kind.one_precision and fits
        chooses = chooses and not options.get("overrides")
        estimated: dict[str, Any] = {
            "length": length,
            "seed": seed,
            "bos": bos,
            "memory": memory,
        }
        plans: list[Callable[[], object]] = [
            lambda: check_quantization(model, out, recipe=recipe, **limits, **making),
            lambda: check_training(original, calibration, length, seed, bos, memory),
        ]
        if chooses:
            plans.append(lambda: check_estimate(original, calibration, samples=None, **estimated))
        require_all(plans)
        if chooses:
            shapes = list(original.linear_shapes().values())
            candidates = _candidates(kind, asked, original.input_channels())
            found = estimate_sensitivities(
                original,
                calibration,
                *min(candidates, key=fineness),
                *max(candidates, key=fineness),
                **estimated,
                out=work,
                resume=resume,
                progress=progress,
            )
            given = options.get("scale_dtype")
            dtype = kind.scale_dtype(original.dtype) if given is None else np.dtype(given)
            weights = [out_channels * channels for out_channels, channels in shapes]
            taken = sum(
                weight * stored_bits(bits, size or shape[1], asked.grid, dtype)
                for weight, shape in zip(weights, shapes, strict=True)
            )
            recipe = choose_precisions(
                original,
                found,
                taken / sum(weights),
                candidates,
                format=format,
                grid=asked.grid,
                scale_dtype=dtype,
                allow_unfused=options.get("allow_unfused", False),
            )

        def make(folder: Path) -> QuantizationReport:
            return quantize(
                model,
                folder,
                calibration=calibration,
                recipe=recipe,
                memory=memory,
                resume=resume,
                threads=threads,
                progress=progress,
                **making,
            )

        layers = None if recipe is None else sorted(recipe.layers.items())
        chosen = hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:16]
        trained = dwq_quantize(
            model,
            make,
            out,
            calibration,
            made_with={**making, "precisions": chosen},
            length=length,
            tokens=TRAINED_TOKENS,
            seed=seed,
            bos=bos,
            learning_rate=LEARNING_RATE,
            memory=memory,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    return replace(
        cast(QuantizationReport, trained.student),
        out=Path(out),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=trained.peak_memory_bytes,
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
