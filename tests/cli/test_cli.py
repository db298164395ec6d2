"""The command as a user runs it: a process of its own, its exit codes and what it leaves behind."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import bitwright
from bitwright.demo import _scratch

DEMO = bitwright.demo_folder()
TEXT = str(DEMO / "calibration.txt")


def bitwright_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bitwright", *arguments], capture_output=True, text=True, check=False
    )


def test_quantize_and_evaluate(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = bitwright_command(
        *("quantize", str(DEMO), "--out", out, "--method", "gptq", "--bits", "3"),
        *("--group-size", "64", "--format", "mlx", "--calibration", TEXT, "--samples", "8"),
        *("--length", "128", "--seed", "0", "--threads", "2"),
        *("--override", "*.down_proj=bits:4,group_size:32"),
    )
    assert done.returncode == 0, done.stderr
    for word in ("bits per weight", "peak memory", "worst layers", "relative error"):
        assert word in done.stdout
    judged = bitwright_command(
        *("evaluate", out, "--reference", str(DEMO), "--evaluation", str(DEMO / "evaluation.txt")),
        *("--length", "128", "--samples", "8", "--json"),
    )
    assert judged.returncode == 0, judged.stderr
    figures = json.loads(judged.stdout)
    assert set(figures) == {
        "perplexity",
        "kl_divergence",
        "top1_agreement",
        "bits_per_weight",
        "tokens",
        "seconds",
        "peak_memory_bytes",
        "warnings",
        "reference_perplexity",
        "windows",
        "first_tokens",
    }
    assert figures["tokens"] == 8 * 128
    assert (figures["windows"], figures["first_tokens"]) == ("whole", [])
    table = bitwright_command(
        "evaluate", out, "--evaluation", TEXT, "--length", "64", "--samples", "4"
    )
    assert "tokens/s" in table.stdout


def test_demos_clear_what_killed_ones_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("bitwright-demo-killed", "bitwright-demo-other", "bitwright-else"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("one")
    (tmp_path / "bitwright-demo-file").write_text("is no folder")
    (tmp_path / "bitwright-demo-link").symlink_to("bitwright-else")
    other = FileLock(tmp_path / "bitwright-demo-other" / "lock")
    other.acquire()
    with _scratch() as folder:
        kept = {"bitwright-demo-other", "bitwright-else", "bitwright-demo-file"}
        kept.add("bitwright-demo-link")
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, *kept}
        with _scratch() as second:
            assert folder.is_dir()
            assert second != folder
    assert {path.name for path in tmp_path.iterdir()} == kept
    other.release()


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    done = bitwright_command("demo")
    assert done.returncode == 0, done.stderr
    rows = {
        line.split()[0]: line.split()
        for line in done.stdout.splitlines()
        if line.split()[:1] in (["original"], ["rtn"], ["gptq"])
    }
    assert float(rows["original"][1]) < float(rows["gptq"][1]) < float(rows["rtn"][1])
    assert rows["rtn"][2] == rows["gptq"][2] == rows["original"][1]  # of the reference
    assert "KL (nats/token)" in done.stdout


@pytest.mark.slow
def test_sensitivities_recipe_and_dwq(tmp_path: Path) -> None:
    """The four commands of dynamic precision and DWQ, each on what the one before has written."""
    evaluation = str(DEMO / "evaluation.txt")
    data = ("--calibration", TEXT, "--samples", "8", "--length", "64")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = bitwright_command(
            *(str(tmp_path / word[1:]) if word[0] == "@" else word for word in arguments)
        )
        assert done.returncode == 0, done.stderr
        return done

    run(
        "sensitivities",
        str(DEMO),
        "--out",
        "@s.json",
        *data,
        "--low",
        "3:64",
        "--high",
        "5:64",
        "--plot",
        "@s.svg",
    )
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["low"], found["high"]) == ("3:64", "5:64")

    done = run(
        *(
            "dynamic",
            str(DEMO),
            "--out",
            "@mixed",
            "--target-bpw",
            "4.5",
            "--candidates",
            "3:64,4:64,5:64",
        ),
        *("--method", "gptq", "--format", "mlx", *data, "--sensitivities", "@s.json"),
        *("--recipe", "@recipe.json", "--evaluation", evaluation),
    )
    assert "kl" in done.stdout.lower()
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    bits = {layer["bits"] for layer in recipe["layers"].values()}
    assert len(bits) > 1

    run(
        *("quantize", str(DEMO), "--out", "@again", "--method", "gptq", "--recipe", "@recipe.json"),
        *("--calibration", TEXT, "--samples", "8", "--length", "64"),
    )
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "mixed" / name).read_bytes()

    done = run(
        *("dwq", "@mixed", "--reference", str(DEMO), "--out", "@trained", "--calibration", TEXT),
        *("--length", "32", "--tokens", "1024", "--learning-rate", "5e-4", "--seed", "1"),
        *("--plot", "@dwq.svg"),
    )
    assert "tokens/s" in done.stderr
    for plot in ("s.svg", "dwq.svg"):
        assert "<svg" in (tmp_path / plot).read_text()

    run(
        *("dwq", str(DEMO), "--out", "@cascade", "--target-bpw", "4.5", *data),
        *("--method", "gptq", "--tokens", "512"),
    )
    sizes = [
        bitwright.evaluate(tmp_path / name, evaluation, samples=2, length=64)
        for name in ("mixed", "trained", "cascade")
    ]
    assert sizes[0].bits_per_weight == sizes[1].bits_per_weight
    assert abs(sizes[2].bits_per_weight - sizes[0].bits_per_weight) < 0.1


def test_info_and_version() -> None:
    assert bitwright.build_info().instruction_set in bitwright_command("info").stdout
    assert bitwright.__version__ in bitwright_command("--version").stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("quantize", "nowhere", "--out", "OUT", "--calibration", TEXT), "nowhere"),
        (("quantize", str(DEMO), "--out", "OUT", "--calibration", "absent.txt"), "absent.txt"),
        (("quantize", str(DEMO), "--out", "OUT", "--bits", "7"), "7"),
        (("quantize", str(DEMO), "--out", "OUT", "--override", "a=b"), "a=b"),
        (("quantize", str(DEMO), "--out", "/proc/out", "--method", "rtn"), "/proc/out"),
        (
            ("quantize", str(DEMO), "--out", "OUT", "--backend", "transformers", "--metric", "mae"),
            "--metric is not an option",
        ),
        (("evaluate", str(DEMO), "--evaluation", TEXT, "--reference", "nowhere"), "nowhere"),
        (("evaluate", str(DEMO), "--evaluation", TEXT, "--samples", "99999"), "99999"),
        (("sensitivities", str(DEMO), "--out", "/absent/s.json", "--calibration", TEXT), "/absent"),
    ],
)
def test_errors_are_one_message_without_a_traceback(
    tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    out = str(tmp_path / "out")
    done = bitwright_command(*(out if argument == "OUT" else argument for argument in arguments))
    assert done.returncode in (1, 2)
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_missing_torch_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (
        lambda: bitwright.quantize_with_transformers(DEMO, tmp_path / "out", method="rtn"),
        lambda: bitwright.collect_grams(DEMO, np.zeros((1, 4), np.int32)),
    ):
        with pytest.raises(bitwright.MissingExtraError, match=r"bitwright\[transformers\]"):
            call()


def long_run(out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "bitwright", "quantize", str(DEMO), "--out", str(out)),
        *("--calibration", str(out.parent / "tokens.npy")),
    ]


@pytest.mark.slow
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 512, (128, 1024)))
    process = subprocess.Popen(
        long_run(tmp_path / "out"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not (tmp_path / ".out.work/scratch").is_dir():  # the run itself has begun
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "interrupted; nothing was written" in messages
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk without room: writing fails half-way."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 512, (8, 64)))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        long_run(tmp_path / "out"), capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert done.returncode == 1
    assert f"{tmp_path}/.out.work/hidden-1: cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]
