"""The plan of a run: budgets that are kept or refused, and forecasts next to what runs then take."""

import gc
import importlib
import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import pytest
from shared_data import TESTS

import bitwright
from bitwright.models.operations import BlockWeights
from bitwright.process import memory
from bitwright.runs.journal import Journal

DEMO = bitwright.demo_folder()
evaluate_module = importlib.import_module("bitwright.evaluation")  # not the function of that name
TEXT = DEMO / "calibration.txt"


def quantize(out: Path, **options: object) -> bitwright.QuantizationReport:
    settings = {"calibration": TEXT, "samples": 8, "length": 64, "progress": False} | options
    return bitwright.quantize(DEMO, out, **settings)


def test_small_budgets_are_refused_with_one_that_works(tmp_path: Path) -> None:
    with pytest.raises(bitwright.MemoryBudgetError, match=r"needs at least .* GB") as caught:
        quantize(tmp_path / "out", memory=0.01)
    assert list(tmp_path.iterdir()) == []
    words = str(caught.value).split()
    least = float(words[words.index("--memory") + 1].rstrip("),"))
    quantize(tmp_path / "out", memory=least + 0.02)  # this process may have grown since


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:samples of 512 tokens are longer")
def test_evaluations_in_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that do not fit together are evaluated one part after the other, with the same figures."""
    final_states, rows = evaluate_module.final_states, list[int]()

    def counted(model: Any, tokens: Any, step: Any) -> Any:
        rows.append(len(tokens))
        return final_states(model, tokens, step)

    monkeypatch.setattr(evaluate_module, "final_states", counted)
    ids = np.random.default_rng(0).integers(0, 512, (64, 512))
    whole = bitwright.evaluate(DEMO, ids, reference=DEMO)
    assert rows == [64, 64]  # of the model and of the reference
    monkeypatch.setattr(evaluate_module, "LOGIT_BYTES", 1)  # a quarter of a sample at a time
    with pytest.raises(bitwright.MemoryBudgetError, match=r"demo.*needs at least .* GB") as caught:
        bitwright.evaluate(DEMO, ids, reference=DEMO, memory=0.01)
    least = float(str(caught.value).split("needs at least ")[1].split()[0])
    shares: list[float] = []
    part = bitwright.evaluate(
        DEMO, ids, reference=DEMO, memory=least + 0.008, on_progress=shares.append
    )
    assert len(rows) > 4
    assert sum(rows[2:]) == 2 * 64
    assert all(count % 2 == 0 for count in rows)
    assert part.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert (part.kl_divergence, part.top1_agreement) == (0, 1)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    with pytest.raises(ValueError, match="memory: expected gigabytes"):
        bitwright.evaluate(DEMO, ids, memory=0)


@pytest.mark.parametrize("memory", [0, -1, math.nan])
def test_budgets_are_positive(tmp_path: Path, memory: float) -> None:
    with pytest.raises(ValueError, match="memory: expected gigabytes"):
        quantize(tmp_path / "out", memory=memory)


@pytest.mark.parametrize("short", [1, 1_000, 10**9])
def test_disks_that_are_too_small_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    """Also if a byte is missing, and then the numbers differ."""
    monkeypatch.setattr("bitwright.quantization.plan._free_disk", lambda _: 1_000_000_000 - short)
    monkeypatch.setattr("bitwright.quantization.plan._written_bytes", lambda _: 1_000_000_000)
    with pytest.raises(bitwright.OutputError, match=r"out: the result takes .* of the disk") as one:
        quantize(tmp_path / "out")
    found = re.search(r"takes ([\d.]+) GB, but only ([\d.]+) GB", str(one.value))
    assert found
    assert float(found[1]) > float(found[2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.memory
def test_limits_of_the_process_count() -> None:
    script = "from bitwright.process.memory import process_memory; print(process_memory(2))"
    limit = 3 << 30
    assert memory.process_memory(2) == math.inf

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=limited
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < limit


@pytest.mark.parametrize(
    ("line", "folder", "files", "left"),
    [
        ("0::/", "", {"memory.max": 1000, "memory.current": 900, "memory.stat": (0, 0)}, 100),
        ("0::/a/b", "a/b", {"memory.max": 70, "memory.current": 90, "memory.stat": (0, 0)}, -20),
        ("0::/a/b", "a", {"memory.max": 1000, "memory.current": 900, "memory.stat": (300, 7)}, 407),
        ("0::/a/b", "a", {"memory.max": "max", "memory.current": 900, "memory.stat": (0, 0)}, None),
        (
            "5:cpu,memory:/of/the/machine",
            "memory",
            {
                "memory.limit_in_bytes": 50,
                "memory.usage_in_bytes": 30,
                "memory.stat": (4, 5, "total_"),
            },
            29,
        ),
    ],
)
def test_limits_of_control_groups_count(
    tmp_path: Path, line: str, folder: str, files: dict[str, Any], left: float | None
) -> None:
    """Pages of files do not: they are given up as soon as somebody needs memory."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:pids:/\n{line}\n")
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    for name, value in files.items():
        if isinstance(value, tuple):
            active, inactive, *prefix = value
            start = prefix[0] if prefix else ""
            value = f"anon 5\n{start}active_file {active}\n{start}inactive_file {inactive}"
        (group / name).write_text(f"{value}\n")
    assert memory.group_memory(tmp_path) == (math.inf if left is None else left)


SCRIPT = """
import json, sys
import numpy as np
import bitwright, bitwright.quantization.run, bitwright.quantization.plan
model, out, method, preset, tokens, resident = sys.argv[1:]
plan_run = bitwright.quantization.plan.plan_run
plans = []
def planned(*arguments, **options):
    plans.append(plan_run(*arguments, **options))
    return plans[0]
bitwright.quantization.run.plan_run = planned
memory = None
if resident != "all":
    try:
        ids = np.zeros((int(tokens) // 512, 512), int)
        bitwright.quantize(model, out, method, memory=1e-3, calibration=ids, progress=False)
    except bitwright.MemoryBudgetError as error:
        words = str(error).split()
        memory = float(words[words.index("--memory") + 1].rstrip("),")) + 0.01
vocabulary = bitwright.load_model(model).config.vocab_size
ids = np.random.default_rng(0).integers(0, vocabulary, (int(tokens) // 512, 512))
report = bitwright.quantize(
    model, out, method, calibration=ids, preset=preset, memory=memory, threads=1, progress=False
)
plan = plans[-1]
print(json.dumps([plan.memory_bytes, report.peak_memory_bytes, plan.resident, plan.budget_bytes]))
"""


def make_wide(folder: Path, blocks: int) -> Path:
    """Make a model whose weights and statistics outweigh the interpreter."""
    import ml_dtypes

    sys.path.insert(0, str(TESTS.parent / "bench" / "models"))
    try:
        import make_llama
    finally:
        sys.path.pop(0)
    make_llama.SHAPES["wide"] = (1024, 4096, blocks, 8, 8, 128, 512, False)
    make_llama.make(folder, "wide")
    assert bitwright.load_model(folder).dtype == ml_dtypes.bfloat16
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wide(tmp_path_factory.mktemp("wide") / "model", 1)


def run_planned(
    model: Path,
    out: Path,
    method: str,
    preset: str,
    tokens: int,
    resident: str,
    script: str = SCRIPT,
) -> tuple[int, int, int | None, int]:
    """Quantize in a process of its own; return forecast, peak, chunks in memory and budget."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", script, str(model), str(out), method, preset),
            *(str(tokens), resident),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    forecast, peak, chunks, budget = json.loads(done.stdout)
    return forecast, peak, chunks, budget


@pytest.mark.memory
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "preset", "resident", "fixed_order"),
    [
        ("gptq", "fast", "all", False),
        ("gptq", "default", "all", False),
        ("gptq", "default", "all", True),
        ("awq", "fast", "all", False),
        ("awq", "fast", "all", True),
        ("rtn", "fast", "least", False),
    ],
)
def test_forecasts_of_memory(
    tmp_path: Path, wide: Path, method: str, preset: str, resident: str, fixed_order: bool
) -> None:
    tokens = 4096 if resident == "all" else 16384
    opening = f"import bitwright\nwith bitwright.spread_over(None, {fixed_order}):\n"
    script = opening + indent(SCRIPT, "    ")
    forecast, peak, chunks, budget = run_planned(
        wide, tmp_path / "q", method, preset, tokens, resident, script
    )
    assert 0.85 < forecast / peak < 1.4  # small things that no forecast counts weigh here
    assert (chunks is None) == (resident == "all")
    assert peak < budget


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group of memory, in either version of their interface."""
    top = Path("/sys/fs/cgroup/memory")
    group = (top if top.exists() else top.parent) / f"bitwright-{os.getpid()}"
    try:
        group.mkdir()
        place = "memory.limit_in_bytes" if top.exists() else "memory.max"
        (group / place).write_text(str(1 << 40))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group / place
    group.rmdir()


@pytest.mark.slow
@pytest.mark.memory
def test_control_groups_that_hold_what_was_planned(
    tmp_path: Path, wide: Path, control_group: Path
) -> None:
    """A run in less is refused with how much more it needs, and one in that much is not killed."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 512, (32, 512)))
    command = [
        *(sys.executable, "-m", "bitwright", "quantize", str(wide), "--out", str(tmp_path / "q")),
        *("--calibration", str(ids), "--preset", "fast", "--threads", "1", "--memory", "4"),
    ]

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        control_group.write_text(str(limit))
        procs = control_group.parent / "cgroup.procs"
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            preexec_fn=lambda: procs.write_text(str(os.getpid())),
        )

    limit = 200_000_000
    refused = run(limit)
    assert refused.returncode == 1, refused.stderr
    words = refused.stderr.split()
    assert "control group" in refused.stderr
    more = float(words[words.index("by") + 1])
    done = run(limit + int(more * 1e9))
    assert done.returncode == 0, done.stderr
    assert "hidden states that do not fit go to disk" in done.stderr


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    missing = BlockWeights.__missing__

    def read(weights: BlockWeights, name: str) -> np.ndarray[Any, Any]:
        array = missing(weights, name)
        held = {match[1] for each in weights if (match := re.search(r"experts\.(\d+)\.", each))}
        seen.add(len(held))
        return array

    monkeypatch.setattr(BlockWeights, "__missing__", read)
    model = TESTS / "data/tiny/qwen3_moe"
    vocabulary = bitwright.load_model(model).config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (24, 64))
    for method in ("gptq", "awq", "awq+gptq"):
        bitwright.quantize(model, tmp_path / method, method, 4, 32, calibration=ids, progress=False)
    bitwright.evaluate(tmp_path / "awq", ids, reference=model)
    assert seen == {0, 1}


@pytest.mark.slow
@pytest.mark.memory
def test_peak_memory_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    """From two on: of the last one's states less is kept."""
    models = {blocks: make_wide(tmp_path / f"model{blocks}", blocks) for blocks in (2, 5)}
    for method in ("gptq", "awq"):
        peaks = [
            run_planned(model, tmp_path / f"{method}{blocks}", method, "fast", 1024, "all")[1]
            for blocks, model in models.items()
        ]
        assert peaks[1] < 1.05 * peaks[0], method


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_no_array_waits_for_the_garbage_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, preset: str
) -> None:
    """It counts objects, not their bytes: a block's grams in a cycle of references stay for long."""
    commit, held = Journal.commit, list[tuple[object, ...]]()

    def committed(journal: Journal, *arguments: Any) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        for waiting in gc.garbage:
            arrays = [each for each in gc.get_referents(waiting) if isinstance(each, np.ndarray)]
            held.extend((type(waiting), each.shape) for each in arrays)
        gc.garbage.clear()
        commit(journal, *arguments)

    gc.collect()
    gc.disable()
    try:
        monkeypatch.setattr(Journal, "commit", committed)
        quantize(tmp_path / "q", method=method, preset=preset)
    finally:
        gc.enable()
    assert not held


@pytest.mark.slow
@pytest.mark.memory
def test_peak_memory_does_not_grow_with_the_calibration(tmp_path: Path) -> None:
    """Beyond a budget, the states are in files."""
    two_chunks = SCRIPT.replace("plans[0]", "replace(plans[-1], resident=2)")
    script = f"from dataclasses import replace{two_chunks}"
    peaks = [
        run_planned(DEMO, tmp_path / f"q{tokens}", "rtn", "fast", tokens, "all", script)[1]
        for tokens in (8192, 32_768)
    ]
    assert peaks[1] < peaks[0] + (4 << 20)
