"""Every long command takes a budget, refuses one that is too small before it reads anything, and keeps one
that is not: peaks of whole processes next to plans."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import TESTS
from sized_models import make_sized

import bitwright
from bitwright.cli.main import cli
from bitwright.loading.model import load_model
from bitwright.precision.estimate import plan_estimate
from bitwright.runs import budget as budget_module
from bitwright.runs.budget import Budget, one_budget, require_all

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
LONG = (
    *("quantize", "salient", "sensitivities", "dynamic", "dwq", "convert", "refine", "evaluate"),
    *("statistics collect", "statistics merge"),
)
SCRIPT = """
import json, sys
import numpy as np
import bitwright
from bitwright.precision import estimate as sensitivity
from bitwright.process.memory import peak_memory_bytes
model, samples, length, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
plan, plans = sensitivity.plan_estimate, []
def planned(*arguments):
    plans.append(plan(*arguments))
    return plans[-1]
sensitivity.plan_estimate = planned
vocabulary = bitwright.load_model(model).config.vocab_size
ids = np.random.default_rng(0).integers(0, vocabulary, (samples, length))
options = {"batch_size": samples, "threads": 1, "progress": False}
if memory == "least":
    try:
        bitwright.estimate_sensitivities(model, ids, memory=1e-3, **options)
    except bitwright.MemoryBudgetError as error:
        options["memory"] = error.least / 1e9 + 1e-3
found = bitwright.estimate_sensitivities(model, ids, **options)
print(json.dumps([
    plans[-1].memory_bytes, peak_memory_bytes(), options.get("memory"), plans[-1].samples,
    dict(found.alignments), found.kl_divergence,
]))
"""
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
# A large vocabulary; long samples; backward passes of wide blocks; experts.
SHAPES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "vocabulary": ("llama-linear", {"vocab_size": 152_064}, 2, 64),
    "32,000 words": ("gemma2", {"vocab_size": 32_000, "hidden_size": 256}, 4, 64),
    "long samples": ("llama-linear", {"max_position_embeddings": 2048}, 2, 2048),
    "backward": ("llama-linear", {**WIDE, "vocab_size": 4096}, 3, 512),
    "experts": (
        "qwen3_moe",
        {**WIDE, "moe_intermediate_size": 256, "num_local_experts": 16, "num_experts": 16},
        4,
        256,
    ),
}


def estimate(model: Path, samples: int, length: int, memory: str) -> list[Any]:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            SCRIPT,
            str(model),
            str(samples),
            str(length),
            memory,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize("name", SHAPES)
def test_sensitivities_take_what_is_planned(name: str, tmp_path: Path) -> None:
    family, changes, samples, length = SHAPES[name]
    model = make_sized(tmp_path / "model", family, **({"intermediate_size": 128} | changes))
    forecast, peak, _, _, *whole = estimate(model, samples, length, "all")
    assert 0.88 < forecast / peak < 1.15
    _, peak, memory, _, *pieces = estimate(model, samples, length, "least")
    assert peak < 1.05 * 1e9 * memory
    assert pieces == whole  # to the last bit


PROCESS = """
import json, sys
import numpy as np
import bitwright
from bitwright.runs.budget import Budget
from bitwright.process.memory import peak_memory_bytes
folder, command = sys.argv[1:]
bitwright.set_num_threads(1)
model, q, out, plans, require = f"{folder}/model", f"{folder}/q", f"{folder}/out", [], Budget.require
def required(budget, least, *others):
    plans.append(least)
    require(budget, least, *others)
Budget.require = required
ids = np.random.default_rng(0).integers(0, 100_000, (8, 128))
head = {"embedding_bits": 4, "head_bits": 4, "progress": False}
{
    "rtn": lambda: bitwright.quantize(model, out, "rtn", 4, **head),
    "gptq": lambda: bitwright.quantize(model, out, "gptq", 4, calibration=ids, **head),
    "refine": lambda: bitwright.refine_model(model, q, out, ids, progress=False),
    "convert": lambda: bitwright.convert(q, out, "float", progress=False),
    "evaluate": lambda: bitwright.evaluate(q, ids, reference=model),
    "dwq": lambda: bitwright.dwq_quantize(
        model, q, out, ids, tokens=512, validation_samples=2, progress=False
    ),
    "statistics": lambda: bitwright.collect_statistics(model, out, ids, progress=False),
}[command]()
print(json.dumps([max(plans), peak_memory_bytes()]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a large vocabulary, and what it is quantized to."""
    folder = tmp_path_factory.mktemp("large")
    changes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 1}
    model = make_sized(folder / "model", "llama-linear", vocab_size=100_000, **changes)
    matrices = {"embedding_bits": 4, "head_bits": 4}
    bitwright.quantize(model, folder / "q", "rtn", 4, 64, progress=False, **matrices)
    return folder


@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize(
    "name", ["rtn", "gptq", "refine", "convert", "evaluate", "dwq", "statistics"]
)
def test_commands_take_what_is_planned_on_a_large_vocabulary(name: str, large: Path) -> None:
    """No head is ever whole in float32, but where such a head is what is written."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROCESS, str(large), name],
        capture_output=True,
        text=True,
    )
    shutil.rmtree(large / "out", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    plan, peak = json.loads(done.stdout)
    assert peak < 1.05 * plan
    assert 0.9 < plan / peak < 1.15


def test_batches_are_cut_where_chunks_end() -> None:
    """Sums then have the same terms in the same order."""
    model = load_model(DEMO)
    ids = np.zeros((64, 64), np.int32)
    plan = plan_estimate(model, ids, 64, None)
    assert plan.samples == 64
    smallest = plan_estimate(model, ids, 64, plan.least_bytes / 1e9 + 0.001)
    assert smallest.samples == 16
    rope = model.rotation(64)
    assert smallest.samples * 64 % rope.chunk_rows == 0
    assert smallest.samples * 64 % rope.tape_rows == 0


def command(words: str) -> Any:
    found: Any = cli
    for word in words.split():
        found = found.get_command(None, word)
    return found


@pytest.mark.parametrize("words", LONG)
def test_long_commands_take_a_budget(words: str) -> None:
    assert "memory" in {option.name for option in command(words).params}


def quantized(folder: Path) -> Path:
    bitwright.quantize(DEMO, folder, "rtn", 4, 64, progress=False)
    return folder


def collected(folder: Path) -> Path:
    bitwright.collect_statistics(DEMO, folder, TEXT, samples=2, length=64, progress=False)
    return folder


REFUSED: dict[str, Callable[[Path, Path], object]] = {
    "sensitivities": lambda folder, out: bitwright.estimate_sensitivities(
        DEMO, TEXT, samples=2, length=64, out=out, memory=1e-3
    ),
    "dynamic": lambda folder, out: bitwright.dynamic_quantize(
        DEMO, out, 4.5, [(3, 64), (5, 64)], calibration=TEXT, length=64, memory=1e-3
    ),
    "best": lambda folder, out: bitwright.quantize_best(
        DEMO, out, bits=3, calibration=TEXT, length=64, memory=1e-3
    ),
    "dwq": lambda folder, out: bitwright.dwq_quantize(
        DEMO, quantized(folder / "q"), out, TEXT, length=64, memory=1e-3
    ),
    "convert": lambda folder, out: bitwright.convert(
        quantized(folder / "q"), out, "gptq", memory=1e-3
    ),
    "merge": lambda folder, out: bitwright.merge_statistics(
        [collected(folder / "a")], out, memory=1e-3
    ),
    "activations": lambda folder, out: bitwright.collect_activations(
        DEMO, out, TEXT, length=64, memory=1e-3
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_small_budgets_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        bitwright.MemoryBudgetError, match=r"needs at least .*--memory \d"
    ) as caught:
        REFUSED[name](tmp_path, out)
    assert caught.value.least > 1e6
    assert not out.exists()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".out")]


@pytest.mark.slow
def test_the_budget_of_dynamic_is_that_of_all_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float | None] = []
    real = Budget.of.__func__  # type: ignore[attr-defined]

    def of(kind: type[Budget], memory: float | None) -> Budget:
        given.append(memory)
        return real(kind, memory)  # type: ignore[no-any-return]

    monkeypatch.setattr(Budget, "of", classmethod(of))
    run: dict[str, Any] = {
        "calibration": TEXT,
        "samples": 4,
        "sensitivity_samples": 4,
        "length": 64,
    }
    run |= {"evaluation": DEMO / "evaluation.txt", "progress": False}
    precisions = [(3, 64), (5, 64)]
    with pytest.raises(bitwright.MemoryBudgetError) as caught:
        bitwright.dynamic_quantize(DEMO, tmp_path / "q", 4.5, precisions, memory=1e-3, **run)
    memory = caught.value.least / 1e9 + 0.03  # this process may have grown since
    given.clear()
    bitwright.dynamic_quantize(DEMO, tmp_path / "q", 4.5, precisions, memory=memory, **run)
    assert len(given) > 5
    assert set(given) == {memory}


def test_stages_have_the_budget_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [100_000_000]
    monkeypatch.setattr(budget_module, "resident_bytes", lambda: taken[0])
    with one_budget(1):
        first = Budget.of(1)
        taken[0] *= 3
        assert Budget.of(1) == first
    assert Budget.of(1).base > first.base


def test_of_several_refusals_the_largest_is_told() -> None:
    small = Budget(1e6, 0, 1e12, "the budget", group=False)
    folder, known = Path("model"), [2_000_000, 8_000_000, 5_000_000]
    plans = [lambda least=least: small.require(least, folder) for least in known]
    with pytest.raises(bitwright.MemoryBudgetError) as caught:
        require_all(plans)
    assert caught.value.least == 8_000_000
    require_all([lambda: None])


def test_transformers_takes_a_budget() -> None:
    parameters = inspect.signature(bitwright.quantize_with_transformers).parameters
    assert "memory" in parameters
    pytest.importorskip("torch", reason='needs pip install ".[transformers]"')
    pytest.importorskip("transformers", reason='needs pip install ".[transformers]"')
    script = """
import sys, bitwright
from bitwright.adapter import torch_model
torch_model.TorchModel._load = None  # is not come to
try:
    bitwright.quantize_with_transformers(sys.argv[1], sys.argv[2], "rtn", memory=1e-3)
except bitwright.MemoryBudgetError as error:
    print(error)
"""
    model = TESTS / "data/tiny/qwen2"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(model), "nowhere"],
        capture_output=True,
        text=True,
    )
    assert re.search(r"qwen2: this run needs at least .* GB", done.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "length"), [(4, 32), (64, 64), (64, 256)])
def test_salient_says_at_first_what_both_its_stages_need(
    tmp_path: Path, samples: int, length: int
) -> None:
    """Whichever takes more, what is said is enough for both."""

    def run(memory: str) -> subprocess.CompletedProcess[str]:
        words = ["salient", "--model-path", str(DEMO), "--output-path", str(tmp_path / "out")]
        words += ["--activations-path", str(tmp_path / "a.npz"), "--group-size", "32"]
        words += ["--calibration", str(TEXT), "--samples", str(samples), "--length", str(length)]
        call = [sys.executable, "-m", "bitwright", *words, "--memory", memory]
        return subprocess.run(call, capture_output=True, text=True, check=False)

    refused = run("0.001")
    assert refused.returncode == 1
    said = re.search(r"--memory ([\d.]+)", refused.stderr)
    assert said is not None
    assert list(tmp_path.iterdir()) == []
    done = run(said[1])
    assert done.returncode == 0, done.stderr
