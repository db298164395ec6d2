"""DWQ and dynamic precision: what they win on the models of shared/QUALITY.md, and what a step costs.

Usage::

    python bench/suites/dwq.py quality SHARED [--only story]
    python bench/suites/dwq.py dynamic SHARED

    python3 -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 transformers==5.23.0
    python bench/models/make_llama.py /tmp/llama98
    python bench/suites/dwq.py step /tmp/llama98 --peer-python /tmp/peer/bin/python \\
        [--rounds 5] [--repeats 3]

``quality`` trains the scales of students that were rounded or made by GPTQ, and judges them by
``evaluate`` on text that neither saw. ``dynamic`` compares layers of different precision with uniform
ones, and with random choices, of the same size. ``step`` measures in a process of its own: in every round
a forward pass with its loss and then a training step on the same tokens. With a peer, whole processes of
both take turns; the peer's time and memory are those of ``peer_torch_dwq.py``.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bitwright
from bitwright.distill.adam import Adam
from bitwright.distill.losses import DistillationLoss, TopTokens, next_tokens
from bitwright.distill.student import Student
from bitwright.distill.targets import DEFAULT_K
from bitwright.evaluation import parameter_count
from bitwright.loading.model import Model
from bitwright.models.network import Network
from bitwright.process.memory import peak_memory_bytes

PEERS = Path(__file__).parents[1] / "peers"
# model -> (its texts' name, calibration samples, what to train on, tokens per sample, tokens)
MODELS = {
    "small": ("small", 64, "wikitext2_valid.txt", 512, 102_400),
    "story": ("story", 32, "story_calibration.npy", 256, 98_304),
}
# start -> (options of bitwright.quantize, learning rate)
STARTS: dict[str, tuple[dict[str, Any], float]] = {
    "rtn": ({"method": "rtn"}, 1e-3),
    "plain gptq": ({"method": "gptq", "grid_search": False, "act_order": False}, 3e-4),
    "gptq": ({"method": "gptq"}, 3e-4),
}
TARGET_BPW = 4 + 32 / 64  # uniform 4 bits in groups of 64, with bfloat16 scales and biases
SEEDS = range(5)
LEARNING_RATE = 1e-4  # of the steps that are measured
TARGET_ROWS = 128  # of random logits that exist at one time
STUDENT, BATCH = "student", "batch.npz"  # in the folder of what is measured


def row(*cells: object) -> None:
    """Print a row of a markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def heading(*cells: str) -> None:
    """Print the first two rows of a markdown table."""
    row(*cells)
    row(*("---" for _ in cells))


def divergence(model: str, original: Path, text: Path, samples: int | None) -> float:
    """Return KL(original ‖ model) on a text."""
    result = bitwright.evaluate(model, text, reference=original, samples=samples)
    assert result.kl_divergence is not None
    return result.kl_divergence


def run_quality(options: argparse.Namespace) -> None:
    """Print KL before and after DWQ, for every model and start."""
    models, texts = options.shared / "models", options.shared / "text"
    print(f"{bitwright.build_info()}\n")
    heading("model", "start", "KL before", "KL after", "share removed", "seconds", "tokens/s")
    for name in options.only or MODELS:
        text, samples, data, length, tokens = MODELS[name]
        original, judge = models / name, texts / f"{text}_eval.npy"
        calibration = np.load(texts / f"{text}_calibration.npy")[:samples]
        for start, (how, rate) in STARTS.items():
            with tempfile.TemporaryDirectory() as scratch:
                bitwright.quantize(
                    original,
                    f"{scratch}/start",
                    bits=3,
                    group_size=64,
                    calibration=None if start == "rtn" else calibration,
                    float_embeddings=True,
                    progress=False,
                    **how,
                )
                report = bitwright.dwq_quantize(
                    original,
                    f"{scratch}/start",
                    f"{scratch}/dwq",
                    texts / data,
                    length=length,
                    tokens=options.tokens or tokens,
                    batch_size=4,
                    learning_rate=rate,
                    progress=False,
                )
                before, after = (
                    divergence(f"{scratch}/{each}", original, judge, options.samples)
                    for each in ("start", "dwq")
                )
            row(
                *(name, start, f"{before:.4f}", f"{after:.4f}"),
                *(f"{100 * (1 - after / before):.1f} %", f"{report.seconds:.1f}"),
                f"{report.tokens_per_second:,.0f}",
            )


def random_recipe(model: Model, seed: int) -> bitwright.Recipe:
    """Return 3 or 5 bits for every layer at random, in no more than the target.

    Costs are random per weight, or layers with few weights would always get 5 bits.
    """
    shapes = model.linear_shapes()
    weights = np.array([math.prod(shape) for shape in shapes.values()], np.float64)
    costs = np.zeros((len(weights), 2))
    costs[:, 0] = np.random.default_rng(seed).random(len(weights)) * weights
    sizes = weights[:, None] * np.array([[3.5, 5.5]])
    picked = bitwright.allocate(costs, sizes, TARGET_BPW * weights.sum())
    layers = {name: (3 + 2 * int(each), 64) for name, each in zip(shapes, picked, strict=True)}
    reached = float(sizes[np.arange(len(sizes)), picked].sum() / weights.sum())
    return bitwright.Recipe(layers, TARGET_BPW, reached)


def run_dynamic(options: argparse.Namespace) -> None:
    """Print KL of dynamic precision, of uniform precision and of random choices."""
    models, texts = options.shared / "models", options.shared / "text"
    original = models / "small"
    calibration = np.load(texts / "small_calibration.npy")
    loaded = bitwright.load_model(original)
    found = bitwright.estimate_sensitivities(loaded, calibration[:16], progress=False)

    def measure(how: dict[str, Any]) -> tuple[float, float, float]:
        """Return bits per weight, and KL by rtn and by gptq."""
        results, size = [], 0.0
        for method, tokens in (("rtn", None), ("gptq", calibration)):
            with tempfile.TemporaryDirectory() as scratch:
                report = bitwright.quantize(
                    original,
                    f"{scratch}/out",
                    method,  # type: ignore[arg-type]
                    calibration=tokens,
                    float_embeddings=True,
                    progress=False,
                    **how,
                )
                size = report.layer_bits_per_weight
                results.append(
                    divergence(
                        f"{scratch}/out", original, texts / "small_eval.npy", options.samples
                    )
                )
        return size, results[0], results[1]

    def dynamic(*bits: int) -> dict[str, Any]:
        candidates = [(each, 64) for each in bits]
        return {"recipe": bitwright.choose_precisions(loaded, found, TARGET_BPW, candidates)}

    def table(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[float, float]]:
        """Print a table; return both columns of KL."""
        heading("small", "bits per weight", "KL, rtn", "KL, gptq")
        columns = []
        for name, how in rows:
            size, rounded, solved = measure(how)
            row(name, f"{size:.4f}", f"{rounded:.5f}", f"{solved:.5f}")
            columns.append((rounded, solved))
        return columns

    print(f"{bitwright.build_info()}\n")
    uniform, chosen = table(
        [("uniform 4", {"bits": 4, "group_size": 64}), ("dynamic 3, 4, 5", dynamic(3, 4, 5))]
    )
    row("of uniform", "", *(f"{chosen[each] / uniform[each]:.3f}" for each in (0, 1)))
    print()
    randoms = [
        (f"random 3, 5, seed {seed}", {"recipe": random_recipe(loaded, seed)}) for seed in SEEDS
    ]
    chosen, *others = table([("dynamic 3, 5", dynamic(3, 5)), *randoms])
    for name, pick in (("of the random ones' least", min), ("of their median", median)):
        row(name, "", *(f"{chosen[i] / pick([each[i] for each in others]):.3f}" for i in (0, 1)))

    story = bitwright.load_model(models / "story")
    tokens = np.load(texts / "story_calibration.npy")[:16]
    seconds = []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        bitwright.estimate_sensitivities(story, tokens, progress=False)
        seconds.append(time.perf_counter() - start)
    samples, length = tokens.shape
    print(
        f"\nestimate_sensitivities, story, {samples} x {length} tokens: {median(seconds[1:]):.2f} s "
        f"(median of {options.rounds} after one to warm up)"
    )


def activation_bytes(model: Model, tokens: int) -> int:
    """Return the bytes in float32 of what one Llama block computes for so many tokens: both normed inputs,
    q, k, v, attention's output, gate, up, their product, and the hidden states before and after."""
    config = model.config
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    per_token = 4 * config.hidden_size + 2 * query + 2 * key + 3 * config.intermediate_size
    return 4 * tokens * per_token


def random_batch(vocabulary: int, samples: int, length: int) -> dict[str, NDArray[Any]]:
    """Return random tokens, and the most likely tokens of random logits, as `TopTokens` has them."""
    rng = np.random.default_rng(0)
    count = min(DEFAULT_K, vocabulary)
    parts = [
        TopTokens.of(rng.standard_normal((TARGET_ROWS, vocabulary), dtype=np.float32), count)
        for _ in range(-(-samples * length // TARGET_ROWS))
    ]
    result: dict[str, NDArray[Any]] = {
        name: np.concatenate([getattr(part, name) for part in parts])[: samples * length]
        for name in ("ids", "log_probabilities", "rest")
    }
    result["tokens"] = rng.integers(0, vocabulary, (samples, length), dtype=np.int32)
    return result


def run_prepare(options: argparse.Namespace) -> None:
    """Write a rounded model and a random batch into a folder."""
    bitwright.quantize(
        options.model,
        options.folder / STUDENT,
        "rtn",
        bits=options.bits,
        group_size=options.group_size,
        float_embeddings=True,
        progress=False,
    )
    vocabulary = bitwright.load_model(options.model).config.vocab_size
    batch = random_batch(vocabulary, options.batch, options.length)
    np.savez(options.folder / BATCH, **batch)  # type: ignore[arg-type]


def run_measure(options: argparse.Namespace) -> None:
    """Measure forward passes and steps of what was prepared; print one JSON line."""
    bitwright.set_num_threads(options.threads)
    batch = np.load(options.folder / BATCH)
    ids: NDArray[np.int32] = batch["tokens"]
    targets = TopTokens(batch["ids"], batch["log_probabilities"], batch["rest"])
    model = bitwright.load_model(options.folder / STUDENT)
    student = Student(model)
    network, adam = Network(model, student.weight, rows=student.rows), Adam(student.parameters)
    loss = DistillationLoss(targets.rows, next_tokens(ids), factor=1 / ids.size)
    loaded = peak_memory_bytes()
    forward, step, losses = [], [], []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        losses.append(float(network.losses(ids, loss).mean()))
        forward.append(time.perf_counter() - start)
        start = time.perf_counter()
        network.gradients(
            ids,
            loss,
            student.add_gradient,
            on_embedding=student.add_row_gradient,
            on_head=student.add_gradient,
        )
        adam.step(student.gradients(), LEARNING_RATE)
        step.append(time.perf_counter() - start)
    # The first round warms up.
    ratio = median(b / a for a, b in zip(forward[1:], step[1:], strict=True))
    result = {
        "forward_seconds": median(forward[1:]),
        "seconds": median(step[1:]),
        "ratio": ratio,
        "first_loss": losses[0],
        "loaded_memory_bytes": loaded,
        "peak_memory_bytes": peak_memory_bytes(),
        "dense_bytes": 4 * parameter_count(model),
        "activation_bytes": activation_bytes(model, ids.size),
        "version": f"bitwright {bitwright.__version__}",
    }
    print(json.dumps(result))


def call(*command: object) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def figures(*command: object) -> dict[str, Any]:
    """Run a command whose last line is a JSON object of figures."""
    result: dict[str, Any] = json.loads(call(*command).splitlines()[-1])
    return result


def run_step(options: argparse.Namespace) -> None:
    """Print medians of forward passes and steps, memory with its bound, and how a peer compares."""
    # A child's peak memory begins as its parent's, so this process does nothing itself.
    grid = ("--bits", options.bits, "--group-size", options.group_size)
    shape = ("--batch", options.batch, "--length", options.length)
    measuring = ("--rounds", options.rounds, "--threads", options.threads)
    peer = (options.peer_python, PEERS / "peer_torch_dwq.py", options.model)
    ours, peers = [], []
    with tempfile.TemporaryDirectory() as scratch:
        call(sys.executable, __file__, "prepare", options.model, scratch, *grid, *shape)
        for _ in range(options.repeats):
            ours.append(figures(sys.executable, __file__, "measure", scratch, *measuring))
            print(ours[-1], flush=True)
            if options.peer_python:
                peers.append(figures(*peer, Path(scratch, BATCH), *grid, *measuring))
                print(peers[-1], flush=True)

    def middle(results: list[dict[str, Any]], key: str) -> float:
        return float(median(each[key] for each in results))

    bound = ours[0]["dense_bytes"] + ours[0]["activation_bytes"]
    peak, loaded = middle(ours, "peak_memory_bytes"), middle(ours, "loaded_memory_bytes")
    print(
        f"\n{ours[0]['version']}, {options.batch} x {options.length} tokens, {options.threads} threads: "
        f"forward with loss {middle(ours, 'forward_seconds'):.3f} s, step "
        f"{middle(ours, 'seconds'):.3f} s, ratio {middle(ours, 'ratio'):.2f}"
    )
    print(
        f"peak memory {peak / 1e6:.0f} MB, of which {loaded / 1e6:.0f} MB before the first pass; bound "
        f"{bound / 1e6:.0f} MB: dense model {ours[0]['dense_bytes'] / 1e6:.0f} MB, one block's "
        f"activations {ours[0]['activation_bytes'] / 1e6:.0f} MB"
    )
    if peers:
        pairs = list(zip(ours, peers, strict=True))
        slower, larger = (
            median(theirs[key] / mine[key] for mine, theirs in pairs)
            for key in ("seconds", "peak_memory_bytes")
        )
        print(
            f"{peers[0]['version']}: step {middle(peers, 'seconds'):.3f} s, ratio {slower:.2f}; peak "
            f"memory {middle(peers, 'peak_memory_bytes') / 1e6:.0f} MB, ratio {larger:.2f}"
        )


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    quality = commands.add_parser("quality", help="KL before and after DWQ")
    quality.set_defaults(run=run_quality)
    quality.add_argument("shared", type=Path)
    quality.add_argument(
        "--only", choices=list(MODELS), action="append", help="default: all models"
    )
    quality.add_argument("--tokens", type=int, help="to train on; default: each model's own number")
    quality.add_argument("--samples", type=int, help="to evaluate on; default: all")

    dynamic = commands.add_parser("dynamic", help="KL of dynamic, uniform and random precision")
    dynamic.set_defaults(run=run_dynamic)
    dynamic.add_argument("shared", type=Path)
    dynamic.add_argument("--samples", type=int, help="to evaluate on; default: all")
    dynamic.add_argument("--rounds", type=int, default=5, help="of timing the sensitivities")

    step = commands.add_parser("step", help="time and memory of a training step")
    step.set_defaults(run=run_step)
    step.add_argument("model", type=Path)
    step.add_argument("--repeats", type=int, default=1, help="processes, of each side")
    step.add_argument("--peer-python", help="with torch and transformers")

    prepare = commands.add_parser("prepare", help="what step runs first")
    prepare.set_defaults(run=run_prepare)
    prepare.add_argument("model", type=Path)
    prepare.add_argument("folder", type=Path)

    measure = commands.add_parser("measure", help="what step runs in a process of its own")
    measure.set_defaults(run=run_measure)
    measure.add_argument("folder", type=Path)

    for command in (step, prepare):
        command.add_argument("--batch", type=int, default=4)
        command.add_argument("--length", type=int, default=512)
        command.add_argument("--bits", type=int, default=3)
        command.add_argument("--group-size", type=int, default=64)
    for command in (step, measure):
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
