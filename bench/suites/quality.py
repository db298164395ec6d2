"""The quality table: every method of ours and of the peers on the models and tokens of shared/QUALITY.md.

Usage::

    python bench/suites/quality.py SHARED --out results.json \\
        --peers llmcompressor=/tmp/llmc/bin/python autoround=/tmp/autoround/bin/python \\
                mlx=/tmp/mlx/bin/python gptqmodel=/tmp/gptqmodel/bin/python
    python bench/suites/quality.py SHARED --out results.json --resume --peers …
    python bench/suites/quality.py SHARED --models story --methods gptq,rtn --settings 3:64,2:32
    python bench/suites/quality.py --table results.json

The docstring of each peer script says how to make its environment. Without --methods all of ours run, and
all of the peers whose Python is given. Results go to --out after every cell; --resume skips what is there,
failures too (a cell is a method on a model at a setting). --table prints Markdown tables and draws a plot
per model into bench/plots, from a file of results; a run ends with the same.

Everyone gets the same calibration tokens and the same CPUs, quantizes the linear layers of the blocks
alone and is judged by `bitwright.evaluate` next to the original, the peers by their dequantized weights.
Each cell is a process of its own. Seconds are ours from folder to folder, and the peers' of their algorithm
alone; memory is the peak of the process. Bits per weight are those of the quantized layers: 16 bits for a
scale and, where the grid is affine, for a bias; as many bits as the codes for an integer zero point. Peers
that keep their scales in float32 are judged with these.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bitwright

BENCH = Path(__file__).resolve().parents[1]
PLOTS = BENCH / "plots"
# model -> (its texts' name, calibration samples)
MODELS = {"story": ("story", 32), "small": ("small", 64), "small-outliers": ("small", 64)}
SETTINGS = ((3, 64), (2, 32), (2, 64), (4, 64))
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq-fast": {"preset": "fast"},
    "gptq": {"preset": "default"},
    "gptq-high": {"preset": "high"},
    "gptq-best": {"preset": "best"},
    "awq+gptq": {"method": "awq+gptq"},
}


@dataclass(frozen=True)
class PeerMethod:
    """A peer's script with its options; its grid is affine, or has integer zero points."""

    tool: str
    options: tuple[str, ...]
    affine: bool = False

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        """Return what a weight takes, its share of scale and zero point or bias included."""
        return bits + (16 + (16 if self.affine else bits)) / group_size


PEERS = {
    "llm-compressor GPTQ": PeerMethod("llmcompressor", ("--method", "gptq")),
    "llm-compressor AWQ": PeerMethod("llmcompressor", ("--method", "awq")),
    "auto-round": PeerMethod("autoround", ("--iterations", "200")),
    "mlx-lm GPTQ": PeerMethod("mlx", ("--method", "gptq"), affine=True),
    "mlx-lm AWQ": PeerMethod("mlx", ("--method", "awq"), affine=True),
    "GPTQModel": PeerMethod("gptqmodel", ()),
}
TOOLS = tuple(dict.fromkeys(peer.tool for peer in PEERS.values()))

Cell = dict[str, Any]


class CellError(Exception):
    """A cell's process gave no result; the message is one line."""


def figures_of(
    command: list[str], time_limit: float, threads: int, folder: Path | None
) -> dict[str, Any]:
    """Run a command, in a folder, and return the figures in its last line that is a JSON object."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=time_limit,
            env=environment,
            cwd=folder,
        )
    except subprocess.TimeoutExpired as error:
        raise CellError(f"no result in {time_limit:.0f} s") from error
    except OSError as error:
        raise CellError(str(error)) from error
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise CellError(said[-1][:300] if said else f"exit status {done.returncode}")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            figures: dict[str, Any] = json.loads(line)
            return figures
    raise CellError("it printed no figures")


class Bench:
    """Runs cells on the models and texts of one folder."""

    def __init__(
        self, shared: Path, peers: dict[str, str], time_limit: float, threads: int, scratch: Path
    ) -> None:
        self.shared = shared.absolute()
        self.peers = {tool: os.path.abspath(python) for tool, python in peers.items()}
        self.time_limit = time_limit
        self.threads = threads
        self.scratch = scratch

    def calibration(self, model: str) -> Path:
        """Return the file of the model's calibration tokens."""
        text, samples = MODELS[model]
        path = self.scratch / f"{model}.npy"
        if not path.exists():
            np.save(path, np.load(self.shared / "text" / f"{text}_calibration.npy")[:samples])
        return path

    def judge(self, folder: Path, model: str) -> dict[str, float | None]:
        """Return how a folder compares with the original."""
        result = bitwright.evaluate(
            folder,
            self.shared / "text" / f"{MODELS[model][0]}_eval.npy",
            reference=self.shared / "models" / model,
        )
        return {
            "perplexity": result.perplexity,
            "kl": result.kl_divergence,
            "top1": result.top1_agreement,
        }

    def cell(self, model: str, bits: int, group_size: int, method: str) -> Cell:
        """Quantize and judge; what fails is part of the result."""
        cell: Cell = {"model": model, "bits": bits, "group_size": group_size, "method": method}
        original, tokens = self.shared / "models" / model, self.calibration(model)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            out = Path(folder, "out")
            if method in OURS:
                settings = {
                    "model": str(original),
                    "out": str(out),
                    "bits": bits,
                    "group_size": group_size,
                    "calibration": str(tokens),
                    "scale_dtype": "float16",
                    "threads": self.threads,
                }
                working = None  # so that a relative PYTHONPATH holds
                command = [
                    *(sys.executable, str(BENCH / "peers" / "ours.py")),
                    json.dumps(settings | OURS[method]),
                ]
            else:
                peer = PEERS[method]
                working = self.scratch  # some peers leave logs where they run
                cell["bits_per_weight"] = peer.bits_per_weight(bits, group_size)
                command = [
                    *(self.peers[peer.tool], str(BENCH / "peers" / f"peer_{peer.tool}.py")),
                    *(str(original), str(tokens), str(out), *peer.options),
                    *("--bits", str(bits), "--group-size", str(group_size)),
                    *("--threads", str(self.threads)),
                ]
            try:
                cell |= figures_of(command, self.time_limit, self.threads, working)
                cell |= self.judge(out, model)
            except (CellError, ValueError, OSError) as error:
                said = str(error).strip() or type(error).__name__
                cell["failed"] = said.splitlines()[-1]
        return cell


def key_of(cell: Cell) -> tuple[Any, ...]:
    """Return what identifies a cell."""
    return cell["model"], cell["bits"], cell["group_size"], cell["method"]


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results so that an interrupted run leaves a whole file."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


def line_of(cell: Cell) -> str:
    """Return a cell as a row of a Markdown table."""
    setting = f"| {cell['method']} | {cell['bits']} | {cell['group_size']} |"
    if "failed" in cell:
        return f"{setting} failed: {cell['failed'].replace('|', '/')} | | | | | |"
    return (
        f"{setting} {cell['bits_per_weight']:.3f} | {cell['perplexity']:.3f} | {cell['kl']:.5f} | "
        f"{100 * cell['top1']:.2f} % | {cell['seconds']:.1f} | "
        f"{cell['peak_memory_bytes'] / 1e6:.0f} |"
    )


def print_tables(results: dict[str, Any]) -> None:
    """Print a Markdown table per model, settings from few bits to many, the best first."""
    for model in MODELS:
        cells = [cell for cell in results["cells"] if cell["model"] == model]
        if not cells:
            continue
        original = results["originals"].get(model)
        print(f"\n{model}, perplexity of the original {original:.3f}\n" if original else model)
        print(
            "| method | bits | group | bits per weight | perplexity | KL | top-1 | s | MB |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        )
        cells.sort(key=lambda c: (c["bits"], c["group_size"], "failed" in c, c.get("kl", 0.0)))
        print(*map(line_of, cells), sep="\n")
    versions = {cell["version"] for cell in results["cells"] if "version" in cell}
    print("\n" + ", ".join(sorted(versions)))


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in bits without losing in KL, fewest bits first."""
    front: list[tuple[float, float]] = []
    for bits, kl in sorted(points):
        if not front or kl < front[-1][1]:
            front.append((bits, kl))
    return front


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw KL over bits per weight, a plot per model."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    folder.mkdir(exist_ok=True)
    order = [*OURS, *PEERS]
    for model in MODELS:
        cells = [c for c in results["cells"] if c["model"] == model and "failed" not in c]
        if not cells:
            continue
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for index, method in enumerate(order):
            points = [(c["bits_per_weight"], c["kl"]) for c in cells if c["method"] == method]
            if points:
                marker = "o" if method in OURS else "x"
                label = method if method in PEERS else f"bitwright {method}"
                axes.plot(*zip(*points, strict=True), marker, color=f"C{index % 10}", label=label)
        front = pareto([(c["bits_per_weight"], c["kl"]) for c in cells])
        axes.step(*zip(*front, strict=True), where="post", color="gray", lw=1, label="Pareto front")
        axes.set(
            title=model,
            xlabel="bits per weight of the quantized layers",
            ylabel="KL, nats per token",
            yscale="log",
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
        # Text as text and no date or random ids: a small file that is the same for the same results.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bitwright"}):
            figure.savefig(folder / f"quality-{model}.svg", metadata={"Date": None})


def named(text: str, known: tuple[str, ...], parser: argparse.ArgumentParser) -> list[str]:
    """Return the names in a list with commas, which must be known."""
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    return names


def main() -> None:
    """Run the cells that are asked for, then print and draw all that the file has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path, nargs="?", help="folder of models and texts")
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="NAME=PYTHON", help=", ".join(TOOLS)
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", help=", ".join((*OURS, *PEERS)))
    parser.add_argument("--settings", default=",".join(f"{b}:{g}" for b, g in SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=7200.0, help="seconds per cell")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="only print and draw these")
    options = parser.parse_args()
    if options.table:
        results = json.loads(options.table.read_text())
        print_tables(results)
        draw(results, PLOTS)
        return

    if options.shared is None:
        parser.error("the folder of models and texts is missing")
    peers = dict(each.split("=", 1) for each in options.peers if "=" in each)
    if len(peers) < len(options.peers) or not peers.keys() <= set(TOOLS):
        parser.error(f"--peers: expected NAME=PYTHON, each name one of {', '.join(TOOLS)}")
    runnable = (*OURS, *(name for name, peer in PEERS.items() if peer.tool in peers))
    methods = list(runnable)
    if options.methods:
        methods = named(options.methods, (*OURS, *PEERS), parser)
        for method in methods:
            if method not in runnable:
                parser.error(f"{method}: needs --peers {PEERS[method].tool}=PYTHON")
    models = named(options.models, tuple(MODELS), parser)
    try:
        settings = [tuple(map(int, each.split(":"))) for each in options.settings.split(",")]
    except ValueError:
        settings = []
    if not settings or any(len(each) != 2 for each in settings):
        parser.error("--settings: expected BITS:GROUP_SIZE, with commas between them")
    results = {"originals": {}, "cells": []}
    if options.out.exists():
        if not options.resume:
            parser.error(f"{options.out}: is there already; --resume goes on with it")
        results = json.loads(options.out.read_text())
    there = {key_of(cell) for cell in results["cells"]}
    if hasattr(os, "sched_setaffinity"):  # some peers take all CPUs that they find
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    bitwright.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.shared, peers, options.time_limit, options.threads, Path(scratch))
        for model in models:
            if model not in results["originals"]:
                judged = bench.judge(options.shared / "models" / model, model)
                results["originals"][model] = judged["perplexity"]
            for bits, group_size in settings:
                for method in methods:
                    if (model, bits, group_size, method) in there:
                        continue
                    cell = bench.cell(model, bits, group_size, method)
                    results["cells"].append(cell)
                    save(results, options.out)
                    print(model, line_of(cell), flush=True)
    print_tables(results)
    draw(results, PLOTS)


if __name__ == "__main__":
    main()
