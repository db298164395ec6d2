"""The small model and text that the package carries, and the whole job done on them."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock
from rich.console import Console

from bitwright.checkpoint.work_folder import remove_tree
from bitwright.evaluation import evaluate
from bitwright.presets.quantize import quantize
from bitwright.report.printing import print_evaluations, print_report
from bitwright.report.tables import print_sentence


def demo_folder() -> Path:
    """Return the folder of the demo model: a Llama of 0.2 M parameters that tells children's stories.

    It holds calibration.txt and evaluation.txt beside the checkpoint.

    Examples
    --------
    >>> import bitwright
    >>> (bitwright.demo_folder() / "config.json").is_file()
    True
    """
    return Path(__file__).parent / "demo_data"


def run_demo(console: Console) -> dict[str, object]:
    """Evaluate the demo model, quantize it by both methods, evaluate the results, compare; return the
    figures."""
    folder = demo_folder()
    text = folder / "evaluation.txt"
    print_sentence(f"The model is {folder}; 3 bits in groups of 64.", console)
    console.print()
    rows = {"original": evaluate(folder, text, length=256, progress=False)}
    with _scratch() as scratch:
        jobs: tuple[tuple[Literal["rtn", "gptq"], Path | None], ...] = (
            ("rtn", None),
            ("gptq", folder / "calibration.txt"),
        )
        for method, calibration in jobs:
            out = scratch / method
            report = quantize(
                folder, out, method, bits=3, calibration=calibration, length=256, progress=False
            )
            rows[method] = evaluate(out, text, reference=folder, length=256, progress=False)
        print_report(report, console)
    print_evaluations(rows, console)
    console.print(
        "GPTQ stores as many bytes as rounding to nearest (rtn) and stays closer to the original.\n"
        "Next: bitwright quantize MODEL --out DIR --bits 4 --calibration FILE"
    )
    return {"quantization": report, "evaluations": rows}


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a temporary folder; those of runs that were killed, which hold them no longer, are removed."""
    prefix = "bitwright-demo-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # Timeout is one: it is in use
            found = left.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                with FileLock(left / "lock", blocking=False):
                    remove_tree(left)
    with (
        tempfile.TemporaryDirectory(prefix=prefix) as folder,
        FileLock(Path(folder) / "lock"),
    ):
        yield Path(folder)
