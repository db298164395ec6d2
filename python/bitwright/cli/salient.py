"""``bitwright salient``."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
from rich.console import Console

import bitwright
from bitwright.checkpoint.work_folder import WorkFolder, kept_until_written
from bitwright.cli import options
from bitwright.cli.grouped import (
    Command,
    calibration_option,
    file_option,
    method_option,
    precision_option,
    run_option,
)
from bitwright.cli.telling import tell
from bitwright.files.home import expanded
from bitwright.files.inputs import same_inputs
from bitwright.methods.method import ACTIVATION_METHODS
from bitwright.presets.quantize import check_quantization
from bitwright.report.printing import print_report
from bitwright.report.tables import print_sentence
from bitwright.runs.budget import one_budget, require_all
from bitwright.runs.progress import in_phases
from bitwright.spellings import Old
from bitwright.text.calibration import CalibrationOptions
from bitwright.tools.collect_activations import DEFAULT_SAMPLES, planned_samples

_COLLECTING = (("collecting", 1),)


@click.command(
    cls=Command,
    old=(
        Old("--model-path", "MODEL"),
        Old("--output-path", "--out"),
        Old("--activations-path", "--activations"),
    ),
)
@options.model
@file_option("-o", "--out", type=options.PATH, help="Folder to write; only --dry-run does without.")
@file_option(
    "--activations",
    required=True,
    type=options.PATH,
    help=".npz of layer inputs; made from --calibration where it is given.",
)
@options.page
@options.format("awq")
@file_option("--overwrite", is_flag=True, help="Replace what is there.")
@options.links
@calibration_option(
    "--calibration",
    type=options.PATH,
    help=f"{options.TEXT}: run the model on it, and write the activations first.",
)
@options.text_key
@options.samples(DEFAULT_SAMPLES)
@options.length(1)
@options.seed
@options.bos()
@precision_option(
    "-g", "--group-size", type=int, default=128, metavar="SIZE", help="Input channels per scale."
)
@options.exceptions
@options.salient_ratio
@method_option(
    "--activation-method",
    type=click.Choice(ACTIVATION_METHODS),
    default="rms",
    help="How inputs are measured to find these weights.",
)
@run_option("--dry-run", is_flag=True, help="Only write the activations.")
@options.resumable
@options.threads
@same_inputs()
def salient(
    model: Path,
    out: Path | None,
    activations: Path,
    calibration: Path | None,
    samples: int | None,
    length: int | None,
    seed: int,
    bos: bool,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    memory: float | None,
    threads: int | None,
    overrides: tuple[tuple[str, dict[str, int]], ...],
    **given: Any,
) -> None:
    """Quantize MODEL to symmetric INT4, protecting the weights that large activations meet."""
    if threads is not None:
        bitwright.set_num_threads(threads)
    if dry_run and calibration is None:
        raise click.UsageError("--dry-run writes the activations, so it needs --calibration")
    if not dry_run and out is None:
        raise click.UsageError("--out is missing; only --dry-run does without")
    given["overrides"] = dict(overrides)
    chosen: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "bos": bos}

    limits: dict[str, Any] = {"memory": memory, "overwrite": overwrite, "resume": resume}

    def collect(place: Any) -> int:
        text = cast(Path, calibration)
        return bitwright.collect_activations(model, place, text, **chosen, **limits)

    if out is None or dry_run:
        count = collect(activations)
        collected = {"activations": activations, "groups": count}
        tell(collected, lambda console: _print_collected(count, activations, console))
        return

    def check() -> None:
        check_quantization(
            model,
            out,
            method="salient",
            calibration=np.zeros((1, 2), np.int32),
            memory=memory,
            overwrite=overwrite,
            **{**given, "activation_method": "rms"},
        )

    def check_collecting() -> None:
        chosen_samples = CalibrationOptions(expanded(cast(Path, calibration)), **chosen)
        planned_samples(bitwright.load_model(model), chosen_samples, memory)

    with (
        one_budget(memory),
        in_phases(True, *(_COLLECTING if calibration is not None else ()), ("quantizing", 1)),
        nullcontext()
        if calibration is None
        else kept_until_written(WorkFolder(expanded(activations))) as work,
    ):
        if calibration is not None:
            # Whether the format takes such a model, and there is memory for all, is known before it is run.
            require_all([check, check_collecting])
            _print_collected(collect(work), activations, Console())
        report = bitwright.awq_quantize_model(model, out, activations, **limits, **given)
    tell(report, lambda console: print_report(report, console))


def _print_collected(count: int, activations: Path, console: Console) -> None:
    print_sentence(f"wrote the inputs of {count} groups of layers to {activations}", console)
