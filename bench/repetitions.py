"""Whether every command writes the same bytes each time, on one thread and on two, wherever memory lies.

python bench/repetitions.py [--repeats 20] [--threads 1 2] [NAME …]

Each run is a child of a process that has imported everything; before the command it takes and gives back
memory at random, so that NumPy's arrays lie at other distances from whole cache lines each time. What a
command writes, its card's figures of time and memory left out, must be the same in all runs.
"""

import argparse
import contextlib
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import bitwright
import bitwright.best
import bitwright.cli
from bitwright import _kernels

DEMO = bitwright.demo_folder()
MOE = Path(__file__).parents[1] / "tests" / "data" / "tiny" / "qwen3_moe"
# Figures of one run, which no other has again: seconds, tokens per second, memory.
FIGURES = re.compile(rb"[\d,]+ +[\d.]+ [MG]B|\d[\d.,]*(?: tokens/s| s\b| min\b| h\b| MB\b| GB\b)")


def commands(place: Path) -> dict[str, list[str]]:
    """Return the arguments of every command; OUT stands for what it writes."""
    text, ids = place / "text.txt", place / "ids.npy"
    text.write_text((DEMO / "calibration.txt").read_text()[:9000])
    vocabulary = bitwright.load_model(MOE).config.vocab_size
    np.save(ids, np.random.default_rng(0).integers(0, vocabulary, (8, 64)))
    made = place / "made"
    bitwright.quantize(DEMO, made, "rtn", 3, 32, progress=False)
    data = ["--calibration", str(text), "--length", "64", "--samples", "24"]
    for part, samples in (("one", "16"), ("two", "24")):
        collect = ["statistics", "collect", str(DEMO), "--calibration", str(text)]
        call([*collect, "--length", "64", "--samples", samples, "--out", str(place / part)])
    short = ["--data", str(text), "--length", "32"]
    quantize = ["quantize", str(DEMO), "--out", "OUT", *data]
    distil = ["dwq", "--teacher", str(DEMO), "--out", "OUT", *short, "--batch-size", "2"]
    found = {
        **{
            f"quantize {method}": [*quantize, "--method", method]
            for method in ("rtn", "gptq", "awq", "awq+gptq", "salient")
        },
        **{
            f"quantize to {format}": [*quantize, "--format", format, "--group-size", size]
            for format, size in (
                *(("gptq", "32"), ("awq", "32"), ("compressed-tensors", "32")),
                ("gguf", "32"),
            )
        },
        "quantize fast": [*quantize, "--preset", "fast"],
        "quantize best": [
            *("quantize", str(DEMO), "--out", "OUT", "--preset", "best", "--bits", "3"),
            *("--calibration", str(text), "--length", "32", "--samples", "8"),
        ],
        "quantize experts": [
            *("quantize", str(MOE), "--calibration", str(ids), "--bits", "3", "--out", "OUT"),
            *("--samples", "8", "--group-size", "32"),
        ],
        "quantize statistics": [
            "quantize",
            str(DEMO),
            "--out",
            "OUT",
            "--statistics",
            str(place / "one"),
        ],
        "dynamic": [
            *("dynamic", str(DEMO), "--out", "OUT", *short, "--target-bpw", "4.5"),
            *("--samples", "8", "--sensitivity-samples", "16", "--evaluate", str(text)),
        ],
        "sensitivities": [
            *("sensitivities", str(DEMO), "--out", "OUT", *short, "--batch-size", "2"),
            *("--samples", "8"),
        ],
        "dwq": [*distil, "--student", str(made), "--tokens", "640"],
        "dwq made": [*distil, "--tokens", "320", "--bits", "3", "--target-bpw", "4.5"],
        "salient": [
            *("salient", "--model-path", str(DEMO), "--output-path", "OUT", "--group-size", "32"),
            *("--calibration", str(text), "--length", "64", "--samples", "8"),
            *("--activations-path", str(place / "activations.npz")),
        ],
        "refine": ["refine", str(made), "--original", str(DEMO), "--out", "OUT", *data],
        "convert": ["convert", str(made), "--out", "OUT", "--to", "gptq", "--allow-requantize"],
        "statistics collect": ["statistics", "collect", str(DEMO), "--out", "OUT", *data],
        "statistics merge": [
            *("statistics", "merge", str(place / "one"), str(place / "two"), "--out", "OUT"),
        ],
        "evaluate": ["evaluate", str(made), "--text", str(text), "--reference", str(DEMO)],
    }
    return found


def call(arguments: list[str]) -> None:
    """Run a command in this process."""
    sys.argv = ["bitwright", *arguments]
    with contextlib.suppress(SystemExit):
        bitwright.cli.main()


def disturb(rng: random.Random) -> list[Any]:
    """Take memory in random pieces and give some of it back."""
    pieces = [np.empty(rng.randrange(1, 40_000), np.uint8) for _ in range(300)]
    rng.shuffle(pieces)
    return pieces[:150]


def written(out: Path, log: Path) -> dict[str, str]:
    """Return a digest of every file, and of what was printed where nothing was written."""
    files = sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else []
    found = {
        str(path.relative_to(out)): path.read_bytes() for path in (files or [out] * out.exists())
    }
    found = found or {"printed": log.read_bytes()}
    return {
        name: hashlib.sha256(FIGURES.sub(b"", value)).hexdigest() for name, value in found.items()
    }


def repeated(
    arguments: list[str], place: Path, threads: int, seed: int
) -> tuple[int, dict[str, str]]:
    """Run a command in a child; return its exit status and what it wrote."""
    out, log, errors = place / "out", place / "log", place / "errors"
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    (place / "activations.npz").unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        for descriptor, file in ((1, log), (2, errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        _kernels.set_num_threads(threads)
        kept = disturb(random.Random(seed))
        sys.argv = ["bitwright", *(str(out) if each == "OUT" else each for each in arguments)]
        status = 70
        try:
            bitwright.cli.main()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status if kept else 71)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(errors.read_text(), file=sys.stderr)
    return status, written(out, log)


def main() -> None:
    """Run everything and print a row for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    bitwright.best.TRAINED_TOKENS = 1024
    table = Table("Command", "Runs", "Equal to the first", "Files that differ", "Seconds")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        known = commands(Path(folder))
        chosen = {name: known[name] for name in given.names or known}
        for name, arguments in chosen.items():
            start = time.perf_counter()
            found = [
                repeated(arguments, Path(folder), threads, 1000 * threads + repeat)
                for threads in given.threads
                for repeat in range(given.repeats)
            ]
            first = found[0]
            equal = sum(each == first and not first[0] for each in found)
            differ = Counter(
                file
                for _, files in found
                for file in files.keys() | first[1].keys()
                if files.get(file) != first[1].get(file)
            )
            good &= equal == len(found)
            seconds = f"{time.perf_counter() - start:.0f}"
            table.add_row(name, str(len(found)), str(equal), ", ".join(differ) or "none", seconds)
            print(name, equal, "of", len(found), dict(differ), file=sys.stderr)
    Console().print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
