"""``bitwright dwq``."""

from pathlib import Path
from typing import Any

import click

import bitwright
from bitwright.checkpoint.fingerprint import digest
from bitwright.cli import options
from bitwright.cli.grouped import (
    Command,
    calibration_option,
    file_option,
    is_given,
    training_option,
)
from bitwright.cli.parameters import Model, NewFile
from bitwright.cli.telling import tell
from bitwright.distill.losses import LOSSES
from bitwright.distill.student import ZEROS
from bitwright.distill.training import SCHEDULES
from bitwright.files.inputs import InputFiles, same_inputs
from bitwright.files.seals import file_checksum
from bitwright.files.text_file import TEXT_LIMIT, read_bytes
from bitwright.methods.registry import METHODS
from bitwright.report.printing import print_dwq_report
from bitwright.spellings import Old
from bitwright.text.samples import existing_file, is_array, mapped
from bitwright.text.text_files import TextFiles

# What says how to quantize the original.
MAKING = (
    *("method", "format", "candidates", "student_calibration", "samples", "bits", "group_size"),
    "target_bpw",
    "float_embeddings",
)


@click.command(
    cls=Command,
    old=(
        Old("--teacher", "--reference", beside="--student"),
        Old("--teacher", "MODEL"),
        Old("--student", "MODEL"),
        Old("--calibration", "--student-calibration", beside="--teacher"),
        Old("--calibration", "--student-calibration", beside="--data"),
        Old("--data", "--calibration"),
    ),
)
@options.model
@file_option(
    "--reference",
    type=Model(),
    help="The original, which teaches. Without it MODEL is the original, and quantized first.",
)
@options.out
@options.push
@options.page
@options.format("mlx")
@file_option(
    "--targets",
    type=options.PATH,
    help="Keep the teacher's targets in this folder, and use those that are there.",
)
@file_option("--plot", type=NewFile(), help="Plot loss and KL to this file (.png, .svg, .pdf).")
@options.overwrite
@options.links
@options.calibration(", to train on and to quantize the original with")
@calibration_option(
    "--student-calibration",
    type=options.PATH,
    help="Quantize the original with this in place of --calibration.",
)
@options.samples(128)
@options.length(2)
@options.seed
@options.bos()
@options.bits
@options.group_size
@options.target_bpw("Quantize the original to dynamic precision; see bitwright dynamic.")
@options.candidates
@options.float_embeddings
@options.method
@training_option(
    "--tokens", type=click.IntRange(1), help="Tokens to train on; by default all of the data once."
)
@training_option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=5e-4,
    help="The highest, of Adam.",
)
@training_option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    default="cosine",
    help="How the learning rate falls after its rise.",
)
@training_option(
    "--warmup", type=click.FloatRange(0, 1), default=0.1, help="Share of the steps that rise."
)
@training_option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Both models' logits are divided by it.",
)
@training_option("--batch-size", type=click.IntRange(1), default=4, help="Samples per pass.")
@training_option("--accumulate", type=click.IntRange(1), default=1, help="Passes per step.")
@training_option("--loss", type=click.Choice(LOSSES), default="kl", help="What is made small.")
@training_option(
    "--k", type=click.IntRange(1), help="The teacher's tokens per position; by default up to 1024."
)
@training_option(
    "--zeros", type=click.Choice(ZEROS), default="fixed", help="Whether integer zeros move, too."
)
@training_option(
    "--validation", type=options.PATH, help="Validate on this; by default on a part of the data."
)
@training_option(
    "--validation-samples", type=click.IntRange(1), help="How many; by default up to 8."
)
@training_option(
    "--validate-every", type=click.IntRange(1), help="Steps; by default 1/8 of the run."
)
@training_option(
    "--patience", type=click.IntRange(1), help="Stop after so many without a new best."
)
@training_option("--checkpoint-every", type=click.IntRange(1), help="Steps; as --validate-every.")
@options.resumable
@options.threads
@same_inputs()
def dwq(
    model: Path,
    reference: Path | None,
    out: Path,
    calibration: Path | None,
    student_calibration: Path | None,
    method: Any,
    format: Any,
    candidates: tuple[tuple[int, int | None], ...] | None,
    samples: int | None,
    bits: int,
    group_size: Any,
    target_bpw: float | None,
    float_embeddings: bool,
    **given: Any,
) -> None:
    """Train the scales of the quantized MODEL to say what the original, --reference, says.

    Without --reference MODEL is the original. It is quantized first, by --method to --bits and
    --group-size, or with --target-bpw to dynamic precision from --candidates.
    """
    context = click.get_current_context()
    if reference is not None:
        for name in MAKING:
            if is_given(context, name):
                option = name.replace("_", "-")
                raise click.UsageError(
                    f"--{option} says how to quantize the original, but with --reference MODEL is "
                    f"quantized already"
                )
    elif bitwright.load_model(model).format is not None:
        raise click.UsageError(
            f"{model} is quantized already: --reference, its original, is missing"
        )
    shared: dict[str, Any] = {
        "samples": samples,
        **{name: given[name] for name in ("length", "seed", "bos")},
    }
    source = calibration if student_calibration is None else student_calibration

    def make(folder: Path) -> None:
        limits: dict[str, Any] = {name: given[name] for name in ("memory", "resume")}
        limits["float_embeddings"] = float_embeddings
        if target_bpw is not None:
            bitwright.dynamic_quantize(
                model, folder, target_bpw, candidates, method, format, source, **shared, **limits
            )  # fmt: skip
        else:
            calibrated = source if METHODS[method].needs_inputs else None
            bitwright.quantize(
                model, folder, method, bits, group_size, format, calibrated, **shared, **limits
            )  # fmt: skip

    made_with = {
        "method": method,
        "format": format,
        "candidates": None if target_bpw is None else candidates,
        "bits": bits,
        "group_size": group_size,
        "target_bpw": target_bpw,
        "float_embeddings": float_embeddings,
        "calibration": None if student_calibration is None else _digest(student_calibration),
        **shared,
    }
    report = bitwright.dwq_quantize(
        model if reference is None else reference,
        make if reference is None else model,
        out,
        calibration,
        made_with=made_with,
        **given,
    )
    tell(report, lambda console: print_dwq_report(report, console))


def _digest(source: Any) -> str:
    """Return what tells the contents of files of texts apart."""
    inputs, known = InputFiles(), []
    given = TextFiles.of(source)
    for place, share in given.files:
        inputs.watch([existing_file(place)], recorded=True)
        if is_array(place):
            mapped(place)  # which refuses what is no array, however long
            found = f"{file_checksum(place, 0, place.stat().st_size):08x}"
        else:
            found = digest(read_bytes(place, TEXT_LIMIT))
        known.append(found if len(given.files) == 1 else f"{found}:{share:g}")
    inputs.take_checksums()
    return ",".join(known) if given.text_key is None else f"{','.join(known)} {given.text_key}"
