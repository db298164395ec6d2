"""Threads: their number, several Python threads at once, and fork."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import CASES, NAMES, bits
from numpy.typing import NDArray

import bitwright
from bitwright import _kernels

Float32 = NDArray[np.float32]


pytestmark = pytest.mark.usefixtures("all_processors", "restored_threads")


def gaussian(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def gram() -> Float32:
    return bitwright.gram(gaussian(300, 260))


def linear() -> Float32:
    result = np.empty((200, 150), np.float32)
    _kernels.linear(gaussian(200, 300), gaussian(150, 300, seed=1), None, result, False)
    return result


def attention() -> Float32:
    result = np.empty((300, 64), np.float32)
    query, key, value = (gaussian(300, 64, seed=seed) for seed in range(3))
    _kernels.attention(query, key, value, 150, 4, 4, 0.25, result)
    return result


def factor() -> Float32:
    """LAPACK, which shares OpenBLAS' buffers with the products of other threads."""
    return bitwright.factor_gram(gram(), damping=1.0).upper


def layer() -> tuple[Float32, Float32]:
    return gaussian(200, 256), bitwright.gram(gaussian(300, 256, seed=1))


def refine() -> Float32:
    """The objectives: of two codes that are as good, rounding picks one."""
    weight, moments = layer()
    _, objectives = bitwright.refine(bitwright.quantize_rtn(weight, 3), weight, moments)
    return objectives.astype(np.float32)


def clip() -> Float32:
    weight, moments = layer()
    change = bitwright.quantize_clipped(weight, moments, 3).dequantize() - weight
    return _kernels.row_quadratic_forms(change, moments).astype(np.float32)


KERNELS = [gram, linear, attention, factor, refine, clip]
REPEATS = 30


def test_build_info_describes_the_build() -> None:
    info = bitwright.build_info()
    assert info.instruction_set in {"x86-64-v2", "x86-64-v3", "x86-64-v4", "plain"}
    assert info.blas
    assert 1 <= info.threads <= 1024


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_is_what_was_set(threads: int) -> None:
    _kernels.set_num_threads(threads)
    assert bitwright.build_info().threads == threads


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_numbers_of_threads_out_of_range_are_refused(threads: int) -> None:
    before = bitwright.build_info().threads
    with pytest.raises(ValueError, match=f"threads: .*1 to 1024.*{threads}"):
        bitwright.set_num_threads(threads)
    assert bitwright.build_info().threads == before


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=NAMES)
def test_bits_do_not_depend_on_the_number_of_threads(name: str, arguments: tuple[Any, ...]) -> None:
    wanted: list[Any] = []
    for threads in (1, 2, 3, 5, 8):
        _kernels.set_num_threads(threads)
        # A kernel may write to an array; a grid cannot change.
        copies = (each.copy() if isinstance(each, np.ndarray) else each for each in arguments)
        found = bits(name, tuple(copies))
        wanted = wanted or found
        assert found == wanted, f"{name} on {threads} threads"


TEXT = bitwright.demo_folder() / "calibration.txt"
FEW: dict[str, Any] = {"length": 32, "samples": 12, "progress": False}
COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "default": lambda model, out: bitwright.quantize(
        model, out, "gptq", 3, 32, calibration=TEXT, **FEW
    ),
    "awq": lambda model, out: bitwright.quantize(
        model, out, "awq+gptq", 4, 32, metric="mae", calibration=TEXT, **FEW
    ),
    "salient": lambda model, out: bitwright.quantize(
        model, out, "salient", 4, 32, format="awq", calibration=TEXT, **FEW
    ),
    "statistics": lambda model, out: bitwright.collect_statistics(model, out, TEXT, **FEW),
    "sensitivities": lambda model, out: bitwright.estimate_sensitivities(
        model, TEXT, out=out, **FEW
    ),
    "dwq": lambda model, out: bitwright.dwq_quantize(
        model,
        lambda place: bitwright.quantize(model, place, "rtn", 3, 32, progress=False),
        out,
        TEXT,
        made_with={},
        length=32,
        tokens=256,
        batch_size=2,
        k=32,
        progress=False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_write_the_same_bytes_on_any_threads(name: str, tmp_path: Path) -> None:
    model = bitwright.demo_folder()
    found = []
    for threads in (1, 2, 4):
        _kernels.set_num_threads(threads)
        out = tmp_path / str(threads) / "out"
        COMMANDS[name](model, out)
        files = (
            [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
        )
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0]
    assert found[1] == found[0]
    assert found[2] == found[0]
    judged = []
    for threads in (1, 2, 4):
        _kernels.set_num_threads(threads)
        judged.append(bitwright.evaluate(model, TEXT, reference=model, length=32, samples=12))
    assert len({(each.perplexity, each.kl_divergence) for each in judged}) == 1


def test_python_threads_do_not_disturb_each_other() -> None:
    _kernels.set_num_threads(2)
    wanted = [kernel() for kernel in KERNELS]
    found: list[list[Float32]] = [[] for _ in KERNELS]
    start = threading.Barrier(len(KERNELS))

    def repeat(kernel: Callable[[], Float32], results: list[Float32]) -> None:
        start.wait()
        results.extend(kernel() for _ in range(REPEATS))

    # Daemons: a deadlock then fails this test and does not keep Python from ending.
    workers = [
        threading.Thread(target=repeat, args=pair, daemon=True)
        for pair in zip(KERNELS, found, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    for results, result in zip(found, wanted, strict=True):
        assert len(results) == REPEATS
        for other in results:
            np.testing.assert_array_equal(other, result)


def test_other_python_threads_run_during_a_kernel() -> None:
    go, ran = threading.Event(), threading.Event()
    activations, sums = gaussian(2000, 300), np.zeros((300, 300), np.float32)

    def wait_and_run() -> None:
        go.wait()
        ran.set()

    worker = threading.Thread(target=wait_and_run)
    worker.start()
    interval = sys.getswitchinterval()
    # Nobody is made to let go of the interpreter: the worker gets it only if a kernel does.
    sys.setswitchinterval(1000)
    try:
        go.set()
        for _ in range(500):
            _kernels.accumulate_gram(activations, sums)
            if ran.is_set():
                break
        released = ran.is_set()
    finally:
        sys.setswitchinterval(interval)
    worker.join()
    assert released


FORK = """
import os, sys
import numpy as np
import bitwright
from bitwright import _kernels

_kernels.set_num_threads(2)
activations = np.random.default_rng(0).standard_normal((300, 260), dtype=np.float32)
before = bitwright.gram(activations)
child = os.fork()
if child == 0:
    os._exit(0 if np.allclose(bitwright.gram(activations), before, atol=1e-4) else 3)
_, status = os.waitpid(child, 0)
assert np.allclose(bitwright.gram(activations), before, atol=1e-4)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_kernels_work_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)
