"""Several ranks, each a process that mpiexec starts, next to one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import TESTS
from told import TOLD

import bitwright
from bitwright import _kernels
from bitwright.ranks import spread_over

# That of the mpich wheel lies beside python.
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
HAS_MPI = MPIEXEC is not None and importlib.util.find_spec("mpi4py") is not None
needs_mpi = pytest.mark.skipif(
    not HAS_MPI, reason='mpi4py or mpiexec is not there: pip install "bitwright[mpi]"'
)
DEMO = bitwright.demo_folder()
IDS = bitwright.load_tokens(DEMO / "calibration.txt", tokenizer=DEMO, length=32, samples=26)


@pytest.fixture(scope="module", autouse=True)
def as_ranks_program_does() -> Iterator[None]:
    """Samples that are in one file of targets are computed together, which their last bits show; so are
    the rows of a piece, of which every layer here has several."""
    before = _kernels.num_threads()
    bitwright.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitwright.distill.targets.SHARD_BYTES", 1 << 18)
        patch.setattr("bitwright.ranks.FIXED_ROWS", 16)
        yield
    bitwright.set_num_threads(before)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "student"
    bitwright.quantize(DEMO, out, "rtn", 3, 32, progress=False)
    return out


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, IDS)
    return path


def spread(
    count: int,
    function: str,
    fixed_order: bool = False,
    kill: int | None = None,
    check: bool = True,
    **arguments: Any,
) -> list[Any]:
    """Call a function of bitwright on so many ranks and return what they say of the result."""
    call = {
        "function": function,
        "fixed_order": fixed_order,
        "kill": kill,
        "arguments": arguments,
    }
    done = subprocess.run(
        [
            *(str(MPIEXEC), "-n", str(count), sys.executable),
            *(str(TESTS / "support" / "ranks_program.py"), json.dumps(call, default=str)),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(bitwright.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if not check:
        assert done.returncode != 0
        return []
    assert done.returncode == 0, done.stderr
    said: list[Any] = json.loads(done.stdout)
    return said


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint but for its card, which names the folder."""
    paths = (path for path in folder.iterdir() if path.name not in TOLD)
    return {path.name: path.read_bytes() for path in sorted(paths)}


def training(ids: Path, **more: Any) -> dict[str, Any]:
    """10 steps of 2 samples."""
    options: dict[str, Any] = {
        "calibration": ids,
        "reference": DEMO,
        "batch_size": 2,
        "progress": False,
    }
    return options | {"checkpoint_every": 2, "validate_every": 5, "validation_samples": 5} | more


# Quantizes, and tells how many of the model's bytes each rank reads for checksums. But for "shared" the
# second rank has a file of its own under the same name: a copy, or "another" one.
READERS = """
import json, sys
import bitwright
from bitwright.files import inputs
from bitwright.ranks import spread_over, world

model, out, case = sys.argv[1:]
read, checksum, stamp = [0], inputs.file_checksum, inputs._Stamp.of
with spread_over(world()) as ranks:
    def counted(path, start, end):
        read[0] += end * (path.name == "model.safetensors")
        return checksum(path, start, end) ^ (case == "another" and ranks.rank)
    inputs.file_checksum = counted
    if case != "shared":
        inputs._Stamp.of = lambda place: stamp(place)._replace(changed=ranks.rank)
    try:
        said = bitwright.quantize(model, out, "rtn", 4, 32, progress=False).method
    except bitwright.BitwrightError as error:
        said = f"{type(error).__name__}: {error}"
    found = ranks.gather([said, read[0]])
    if ranks.is_first:
        print(json.dumps(found))
"""


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("case", ["shared", "copies", "another"])
def test_the_first_rank_reads_inputs_for_all(tmp_path: Path, case: str) -> None:
    done = subprocess.run(
        [
            *(str(MPIEXEC), "-n", "2", sys.executable, "-c", READERS),
            *(str(DEMO), str(tmp_path / "out"), case),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(bitwright.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, read = zip(*json.loads(done.stdout), strict=True)
    size = (DEMO / "model.safetensors").stat().st_size
    if case == "another":
        assert said[0] == said[1]
        assert "RankError: " in said[0]
        assert "is another file for MPI rank 1 than for the first" in said[0]
        assert not (tmp_path / "out").exists()
    else:
        assert said == ("rtn", "rtn")
        assert read == (size, 0 if case == "shared" else size)


@pytest.mark.slow
@needs_mpi
def test_sensitivities_of_any_number_of_ranks(tmp_path: Path, ids: Path) -> None:
    options = {"model": DEMO, "calibration": ids, "batch_size": 4, "progress": False}
    bitwright.estimate_sensitivities(out=tmp_path / "1.json", **options)
    for count in (2, 3):
        spread(count, "estimate_sensitivities", out=tmp_path / f"{count}.json", **options)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"1.json", "2.json", "3.json"}


@pytest.mark.slow
@needs_mpi
def test_targets_of_several_ranks(tmp_path: Path, ids: Path) -> None:
    bitwright.compute_dwq_targets(DEMO, ids, tmp_path / "one")
    spread(2, "compute_dwq_targets", model=DEMO, calibration=ids, out=tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(content(tmp_path / "two")) > 4
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.slow
@needs_mpi
def test_ranks_distil_as_one_does(tmp_path: Path, ids: Path, student: Path) -> None:
    options = training(ids, model=student)
    one = bitwright.dwq_quantize(out=tmp_path / "one", **options)
    for said in spread(2, "dwq_quantize", out=tmp_path / "two", **options):
        assert [step for step, _ in said] == [0, 5, 10]
        np.testing.assert_allclose(
            [kl for _, kl in said], [kl for _, kl in one.validations], atol=1e-4
        )
    results = [
        bitwright.evaluate(tmp_path / name, ids, reference=DEMO).kl_divergence
        for name in ("one", "two")
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@needs_mpi
@pytest.mark.slow
def test_ranks_that_add_up_in_a_fixed_order(tmp_path: Path, ids: Path, student: Path) -> None:
    """4 ranks have more than 2 samples' worth of work for none; one that is killed ends all."""
    options = training(ids, model=student)
    with spread_over(fixed_order=True):
        bitwright.dwq_quantize(out=tmp_path / "1", **options)
    known = content(tmp_path / "1")
    for count in (2, 4):
        spread(count, "dwq_quantize", True, out=tmp_path / f"{count}", **options)
        assert content(tmp_path / f"{count}") == known
    for kill, count, after in ((1, 2, 3), (0, 3, 1)):
        out = tmp_path / f"{count} then {after}"
        spread(count, "dwq_quantize", True, kill, check=False, out=out, **options)
        assert not out.exists()
        assert (tmp_path / f".{out.name}.work/training.safetensors").exists()
        spread(after, "dwq_quantize", True, out=out, **options)
        assert content(out) == known
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@needs_mpi
def test_what_ranks_are_refused_all_are(tmp_path: Path, ids: Path, student: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    options = training(ids, model=student, out=tmp_path / "taken")
    said = spread(2, "dwq_quantize", **options)
    assert said[0] == said[1]
    assert said[0].startswith("OutputExistsError: ")
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}


def quantizing(**more: Any) -> dict[str, Any]:
    """Chunks of 16 samples, which 4 ranks can share."""
    ids = bitwright.load_tokens(DEMO / "calibration.txt", tokenizer=DEMO, length=64, samples=60)
    options = {"model": DEMO, "calibration": ids.tolist(), "threads": 1, "progress": False}
    return options | more


def as_one(out: Path, fixed_order: bool = False, **options: Any) -> dict[str, bytes]:
    options["calibration"] = np.asarray(options["calibration"])
    with spread_over(fixed_order=fixed_order):
        bitwright.quantize(out=out, **options)
    return content(out)


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "salient"])
def test_ranks_that_quantize_in_a_fixed_order(tmp_path: Path, method: str) -> None:
    options = quantizing(method=method)
    known = as_one(tmp_path / "1", True, **options)
    for count in (2, 3, 4) if method == "gptq" else (2,):
        spread(count, "quantize", True, out=tmp_path / f"{count}", **options)
        assert content(tmp_path / f"{count}") == known
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@needs_mpi
def test_ranks_that_refine_in_a_fixed_order(tmp_path: Path, student: Path) -> None:
    """Each piece goes on from its own rows' codes."""
    options = quantizing()
    original, options["model"] = options["model"], student
    spread(2, "refine_model", True, out=tmp_path / "2", reference=original, **options)
    options["calibration"] = np.asarray(options["calibration"])
    with spread_over(fixed_order=True):
        bitwright.refine_model(original, out=tmp_path / "1", **options)
    bitwright.refine_model(original, out=tmp_path / "free", **options)
    assert content(tmp_path / "2") == content(tmp_path / "1")
    kl = [
        bitwright.evaluate(tmp_path / name, DEMO / "evaluation.txt", reference=DEMO, samples=4)
        for name in ("1", "free")
    ]
    assert kl[0].kl_divergence == pytest.approx(kl[1].kl_divergence, rel=0.05)


@pytest.mark.slow
@needs_mpi
def test_ranks_refine_in_the_metrics_of_all_gradients(tmp_path: Path) -> None:
    """Parts of the samples are shared, and blocks of a metric are never cut."""
    options = quantizing(preset="high", bits=3)
    spread(2, "quantize", True, out=tmp_path / "2", **options)
    options["calibration"] = np.asarray(options["calibration"])
    with spread_over(fixed_order=True):
        bitwright.quantize(out=tmp_path / "1", **options)
    assert content(tmp_path / "2") == content(tmp_path / "1")
    bitwright.quantize(out=tmp_path / "default", **{**options, "preset": "default"})
    assert content(tmp_path / "1") != content(tmp_path / "default")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@needs_mpi
def test_ranks_collect_the_same_statistics(tmp_path: Path) -> None:
    options = quantizing()
    for count in (2, 3):
        spread(count, "collect_statistics", True, out=tmp_path / f"{count}", **options)
    options["calibration"] = np.asarray(options["calibration"])
    with spread_over(fixed_order=True):
        bitwright.collect_statistics(out=tmp_path / "1", **options)
    known = content(tmp_path / "1")
    assert len(known) == 3 + 2
    assert [content(tmp_path / name) for name in ("2", "3")] == [known, known]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@needs_mpi
def test_ranks_quantize_as_one_does(tmp_path: Path) -> None:
    """Sums in another order change the last bits, and these a few codes, but not how good they are."""
    options = quantizing(method="gptq", preset="fast", bits=8, embedding_bits=8)
    as_one(tmp_path / "1", **options)
    spread(2, "quantize", out=tmp_path / "2", **options)
    results = [
        bitwright.evaluate(
            tmp_path / name, DEMO / "evaluation.txt", reference=DEMO, samples=4
        ).kl_divergence
        for name in ("1", "2")
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-4)


@needs_mpi
@pytest.mark.slow
def test_a_rank_that_dies_while_it_quantizes(tmp_path: Path) -> None:
    """All end, and any number of ranks goes on."""
    options = quantizing(method="gptq")
    known = as_one(tmp_path / "1", True, **options)
    for kill, count, after in ((1, 2, 3), (0, 2, 1)):
        out = tmp_path / f"{count} then {after}"
        spread(count, "quantize", True, kill, check=False, out=out, **options)
        assert not out.exists()
        assert (tmp_path / f".{out.name}.work/state.json").exists()
        spread(after, "quantize", True, out=out, **options)
        assert content(out) == known
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@needs_mpi
def test_the_command_under_mpi(tmp_path: Path) -> None:
    """What is wrong is said once, by the first rank; other commands run there alone."""
    command = (str(MPIEXEC), "-n", "2", sys.executable, "-m", "bitwright")
    wrong = subprocess.run(
        [*command, "quantize", "nowhere", "--out", str(tmp_path / "out"), "--method", "rtn"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert wrong.returncode != 0
    assert wrong.stderr.count("nowhere: there is no such folder") == 1
    told = subprocess.run([*command, "info"], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0
    assert told.stdout.count("instruction_set") == 1
    done = subprocess.run(
        [*command, "quantize", str(DEMO), "--out", str(tmp_path / "out"), "--method", "rtn"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fixed_order_changes_little(tmp_path: Path, ids: Path, student: Path) -> None:
    options = training(ids, model=student)
    free = bitwright.dwq_quantize(out=tmp_path / "free", **options)
    with spread_over(fixed_order=True):
        fixed = bitwright.dwq_quantize(out=tmp_path / "fixed", **options)
    assert fixed.kl_after == pytest.approx(free.kl_after, abs=1e-4)


@pytest.mark.parametrize(
    "run",
    [
        lambda out, ids, student: bitwright.dwq_quantize(out=out, **training(ids, model=student)),
        lambda out, ids, student: bitwright.compute_dwq_targets(DEMO, ids, out),
        lambda out, ids, student: bitwright.estimate_sensitivities(
            DEMO, ids, out=out, progress=False
        ),
    ],
)
def test_two_runs_on_one_output(
    tmp_path: Path, ids: Path, student: Path, run: Callable[[Path, Path, Path], object]
) -> None:
    """The second refuses while the first, here a process of its own, holds the folder."""
    out = tmp_path / "out"
    program = (
        "import sys, time; from bitwright.checkpoint.work_folder import WorkFolder\n"
        "with WorkFolder(sys.argv[1]): print(flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(out)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(bitwright.__file__).parents[1])},
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    said = f"out: another run .process {holder.pid}. is writing it"
    with pytest.raises(bitwright.OutputError, match=said):
        run(out, ids, student)
    assert (tmp_path / ".out.work/lock").exists()
    assert not out.exists()
    holder.kill()
    holder.communicate()
    run(out, ids, student)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
