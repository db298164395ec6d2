"""Time and peak memory as the work grows, beside the planner's forecast.

    python bench/suites/scaling.py FOLDER [--only parameters tokens ...] [--plot bench/plots/scaling.svg]

Random checkpoints of real shapes are made in FOLDER (models/make_llama.py; those of 8 and 70 B with two
blocks and one, since time grows with their number and memory does not), and one of parameters, tokens,
bits, threads, ranks and method varies at a time. Every run is a process of its own, and a line of
FOLDER/scaling.jsonl; those that are there are not repeated. For the whole of each shape there is a
forecast, without a run."""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import bitwright
from bitwright.quantization import plan as planner
from bitwright.quantization import run as planned_run
from bitwright.ranks import launched, spread_over, world

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import make_llama

BLOCKS = {"8b": 2, "70b": 1}  # the others are whole
USUAL = {"shape": "0.1b", "method": "gptq", "preset": "fast", "bits": 4, "tokens": 8192}
USUAL |= {"threads": 2, "ranks": 1}
LENGTH = 512
VARIED: dict[str, list[dict[str, Any]]] = {
    "parameters": [
        *({"shape": shape, "tokens": 4096} for shape in ("0.1b", "0.5b", "1b", "8b", "70b")),
    ],
    "tokens": [{"tokens": tokens} for tokens in (2048, 4096, 8192, 16_384, 32_768)],
    "bits": [{"bits": bits} for bits in (2, 3, 4, 8)],
    "threads": [{"threads": threads} for threads in (1, 2)],
    "ranks": [{"ranks": ranks, "threads": 1} for ranks in (1, 2, 4)],
    "method": [
        {"method": method, "preset": preset}
        for method in ("rtn", "gptq", "awq", "awq+gptq")
        for preset in ("fast", "default")
    ],
}


def model_folder(folder: Path, case: dict[str, Any]) -> Path:
    """Return where the checkpoint of a case is."""
    return folder / f"{case['shape']}-{BLOCKS.get(case['shape'], 'all')}"


def quantize(model: Path, out: Path, case: dict[str, Any]) -> bitwright.QuantizationReport:
    """Quantize as a case says, by random tokens."""
    vocabulary = bitwright.load_model(model).config.vocab_size
    rng = np.random.default_rng(0)
    return bitwright.quantize(
        model,
        out,
        case["method"],
        case["bits"],
        calibration=rng.integers(0, vocabulary, (case["tokens"] // LENGTH, LENGTH)),
        preset=case["preset"],
        threads=case["threads"],
        overwrite=True,
        float_embeddings=True,
        progress=False,
    )


def figures_of(case: dict[str, Any], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of the figures that are of a case."""
    return [each for each in known if all(each[key] == value for key, value in case.items())]


def run(folder: Path, case: dict[str, Any]) -> None:
    """Quantize, in this process, and print what was planned and what it took."""
    model = model_folder(folder, case)
    plans: list[planner.RunPlan] = []
    plan_run = planner.plan_run

    def planned(work: planner.Work, memory: Any, out: Any, timed: bool = True) -> planner.RunPlan:
        plans.append(plan_run(work, memory, out, timed=True))
        return plans[-1]

    planned_run.plan_run = planned
    shapes = bitwright.load_model(model).linear_shapes()
    with spread_over(world() if launched() else None) as ranks:
        report = quantize(model, folder / "out", case)
        peaks = ranks.gather(report.peak_memory_bytes)
        if ranks.is_first:
            figures = {
                "seconds": report.seconds,
                "peak_gb": max(peaks) / 1e9,
                "planned_seconds": plans[0].seconds,
                "planned_gb": plans[0].memory_bytes / 1e9,
                "parameters": sum(math.prod(shapes[layer.name]) for layer in report.layers),
            }
            print(json.dumps(case | figures))


def measure(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Run what is missing; return all figures."""
    place = folder / "scaling.jsonl"
    known = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    for name in names:
        for changes in VARIED[name]:
            case = USUAL | changes
            if figures_of(case, known):
                continue
            model = model_folder(folder, case)
            if not model.exists():
                make_llama.make(model, case["shape"], BLOCKS.get(case["shape"]))
            command = [sys.executable, __file__, str(folder), "--case", json.dumps(case)]
            if case["ranks"] > 1:
                mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
                command = [str(mpiexec or "mpiexec"), "-n", str(case["ranks"]), *command]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            known.append(json.loads(done.stdout.splitlines()[-1]))
            with open(place, "a") as file:
                file.write(json.dumps(known[-1]) + "\n")
            print(json.dumps(known[-1]), flush=True)
    return known


class OnlyPlannedError(Exception):
    """Ends a run that was only to be planned."""


def plan_whole(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Return what the planner says of all blocks of a shape, whose weights need not be there."""
    model, plan_run = folder / "hollow", planner.plan_run
    parameters = make_llama.make_hollow(model, case["shape"])

    def planned(work: planner.Work, memory: Any, out: Any, timed: bool = True) -> planner.RunPlan:
        raise OnlyPlannedError(plan_run(work, memory, None, timed=True))

    planned_run.plan_run = planned
    try:
        quantize(model, folder / "unwritten", case)
    except OnlyPlannedError as found:
        plan = found.args[0]
    finally:
        planned_run.plan_run = plan_run
        shutil.rmtree(model)
    return {
        "shape": case["shape"],
        "parameters": parameters,
        "planned_seconds": plan.seconds,
        "planned_gb": plan.memory_bytes / 1e9,
        "planned_disk_gb": plan.disk_bytes / 1e9,
    }


def plot(figures: list[dict[str, Any]], whole: list[dict[str, Any]], out: Path) -> None:
    """Draw measurement and forecast against each thing that varies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grown = {"parameters": "shape", **{n: n for n in ("tokens", "bits", "threads", "ranks")}}
    picture, axes = plt.subplots(2, len(grown), figsize=(3.6 * len(grown), 6))
    for column, (name, key) in enumerate(grown.items()):
        cases = [USUAL | changes for changes in VARIED[name]]
        found = [each for case in cases for each in figures_of(case, figures)]
        for axis, measured, planned, unit in (
            (axes[0, column], "seconds", "planned_seconds", "s"),
            (axes[1, column], "peak_gb", "planned_gb", "GB"),
        ):
            places = [str(e[key]) for e in found]  # evenly spaced, whatever they are
            axis.plot(places, [e[measured] for e in found], "o-", label="measured")
            axis.plot(places, [e[planned] for e in found], "x--", label="forecast")
            if key == "shape":
                axis.plot(
                    [e["shape"] for e in whole],
                    [e[planned] for e in whole],
                    "s:",
                    label="all blocks",
                )
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
            axis.set_xlabel(key)
            axis.set_ylabel(unit)
    axes[0, 0].legend()
    picture.tight_layout()
    picture.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=VARIED, default=list(VARIED))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.case is not None:
        return run(options.folder, options.case)
    figures = measure(options.folder, options.only)
    whole = [plan_whole(options.folder, USUAL | case) for case in VARIED["parameters"]]
    for each in whole:
        print(json.dumps(each))
    if options.plot is not None:
        plot(figures, whole, options.plot)
    return None


if __name__ == "__main__":
    main()
