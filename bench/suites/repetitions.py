"""Whether every command writes the same bytes each time, on one thread and on two, wherever memory lies.

python bench/suites/repetitions.py [--repeats 20] [--threads 1 2] [NAME …]

The commands are those of tests/kill_at_events.py, over tiny models. Each run is a child of a process that
has imported everything; before the command it takes and gives back memory at random, so that NumPy's arrays
lie at other distances from whole cache lines each time. All files that are there afterwards must be the
same in all runs, and what was printed, but for figures of time and memory, where a command writes no file.
"""

import argparse
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bitwright import _kernels

TESTS = Path(__file__).parents[2] / "tests"
# Figures of one run, which no other has again: memory and tokens per second, times, temporary folders, and
# the blanks that make room for them.
FIGURES = re.compile(
    r"(?:[\d,]+ +)?[\d.]+ [kMG]B|\d[\d.,:]* ?(?:tokens/s|s\b|min\b|h\b)|\d+:\d+:\d+|demo-\w+|\s+"
)
THREADS = re.compile(rb"--threads \d+")  # in the command that a card tells
_kept: list[Any] = []  # memory that a child has taken


def disturb(seed: int, threads: int, patch: Callable[[], object]) -> Callable[[], None]:
    """Return what a child does before a command: it takes memory in random pieces, gives some of it back,
    and sets the number of threads, whatever the processors."""

    def before() -> None:
        rng = random.Random(seed)
        pieces = [np.empty(rng.randrange(1, 40_000), np.uint8) for _ in range(300)]
        rng.shuffle(pieces)
        _kept.extend(pieces[:150])
        _kernels.set_num_threads(threads)
        patch()

    return before


def main() -> None:
    """Run everything and print a row for each command."""
    sys.path.insert(0, str(TESTS))
    from kill_at_events import Place, Trial, commands, is_there, make_inputs, make_runs_short

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    make_runs_short()
    table = Table("Command", "Runs", "Equal to the first", "Seconds")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(os.path.realpath(folder)))
        known = {each.name: each for each in commands(place.inputs)}
        make_inputs(place)
        for command in [known[name] for name in given.names or known]:
            if not all(map(is_there, command.needs)):
                table.add_row(command.name, f"needs {', '.join(command.needs)}")
                continue
            start = time.perf_counter()
            Trial(command, place, 0)  # which makes what is there when it starts
            found = []
            for threads in given.threads:
                run = command.run
                if isinstance(run, list):
                    run = [
                        str(threads) if before == "--threads" else each
                        for before, each in zip(["", *run], run, strict=False)
                    ]
                for repeat in range(given.repeats):
                    place.begin()
                    patch = disturb(1000 * threads + repeat, threads, command.patch)
                    status, _ = place.run(replace(command, run=run, patch=patch))
                    files = place.content()
                    written = {
                        name: THREADS.sub(b"", data) if data else data
                        for name, data in files.items()
                    }
                    printed = FIGURES.sub("", place.log.read_text())
                    found.append((status, written, printed if "place/out" not in files else ""))
            equal = sum(each == found[0] and each[0] == command.status for each in found)
            good &= equal == len(found)
            seconds = f"{time.perf_counter() - start:.0f}"
            table.add_row(command.name, str(len(found)), str(equal), seconds)
            print(command.name, equal, "of", len(found), file=sys.stderr, flush=True)
    Console().print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
