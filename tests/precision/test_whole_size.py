"""Precisions chosen within the size of whole files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_models import k_model
from shared_data import SHARED, needs_shared

import bitwright
from bitwright.cli.main import cli
from bitwright.precision.byte_count import size_in_bytes
from bitwright.precision.whole_size import divergences

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = np.random.default_rng(0).integers(0, 512, (4, 32))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return k_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def known(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the sensitivities of a model, made once."""
    made: dict[Path, bitwright.Sensitivities] = {}

    def of(model: Path) -> bitwright.Sensitivities:
        if model not in made:
            made[model] = bitwright.estimate_sensitivities(model, IDS, progress=False)
        return made[model]

    return of


def dynamic(known: Any, model: Path, out: Path, size: Any, **options: Any) -> tuple[int, Any]:
    report = bitwright.dynamic_quantize(
        model,
        out,
        target_size=size,
        method="rtn",
        calibration=IDS,
        sensitivities=known(model),
        progress=False,
        **options,
    )
    written = [path for path in out.iterdir() if path.suffix in (".safetensors", ".gguf")]
    return sum(path.stat().st_size for path in written), report


@pytest.mark.parametrize(
    ("size", "bytes"),
    [
        ("3.2GB", 3_200_000_000),
        ("3.2 gb", 3_200_000_000),
        ("2GiB", 2 << 30),
        ("1.5MiB", 3 << 19),
        ("500M", 500_000_000),
        ("7kB", 7000),
        ("0.1GB", 100_000_000),
        ("12345", 12345),
        (12345, 12345),
    ],
)
def test_sizes_as_people_write_them(size: int | str, bytes: int) -> None:
    assert size_in_bytes(size) == bytes


@pytest.mark.parametrize(
    "size", ["", "GB", "-1GB", "3,2GB", "1e9", "3XB", "0", "0.0GB", "nan", "3iB", "²", -1]
)
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        size_in_bytes(size)


@pytest.mark.parametrize(
    ("format", "size"),
    [
        ("mlx", 700_000),
        ("mlx", "850kB"),
        ("mlx", 1_300_000),
        ("gguf", 750_000),
        ("gguf", 1_000_000),
        ("gptq", 1_400_000),
    ],
)
def test_files_are_no_larger_and_little_smaller(
    known: Any, wide: Path, tmp_path: Path, format: str, size: Any
) -> None:
    written, report = dynamic(known, wide, tmp_path / "q", size, format=format)
    assert 0.97 * size_in_bytes(size) < written <= size_in_bytes(size)
    chosen = {EMBEDDING, HEAD} & report.recipe.layers.keys()
    assert chosen == ({EMBEDDING, HEAD} if format in ("mlx", "gguf") else set())
    stored = {layer.name: (layer.bits, layer.group_size) for layer in report.quantization.layers}
    assert stored == dict(report.recipe.layers)


def test_a_tied_matrix_is_chosen_for_once(known: Any, tmp_path: Path) -> None:
    written, report = dynamic(known, DEMO, tmp_path / "q", 140_000, format="mlx")
    assert 0.95 * 140_000 < written <= 140_000
    assert EMBEDDING in report.recipe.layers
    assert HEAD not in report.recipe.layers


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"embedding_bits": 8}, 8),
        ({"float_embeddings": True}, None),
        ({"exclude": [EMBEDDING]}, None),
        ({"overrides": {EMBEDDING: "6:64"}}, 6),
    ],
)
def test_what_options_say_is_left_as_it_is(
    known: Any, wide: Path, tmp_path: Path, options: dict[str, Any], bits: int | None
) -> None:
    size = 1_250_000
    written, _ = dynamic(known, wide, tmp_path / "q", size, format="mlx", **options)
    assert 0.96 * size < written <= size
    found = bitwright.load_model(tmp_path / "q").quantized(EMBEDDING)
    assert (None if found is None else found.bits) == bits


@pytest.mark.parametrize("format", ["mlx", "gguf"])
@pytest.mark.parametrize("size", ["1kB", "1GB"])
def test_the_reachable_range_is_told(
    known: Any, wide: Path, tmp_path: Path, format: str, size: str
) -> None:
    with pytest.raises(ValueError, match=r"target_size: .* out of reach; .* from .* to ") as caught:
        dynamic(known, wide, tmp_path / "q", size, format=format)
    told = re.search(r"from ([\d.]+) MB to ([\d.]+) MB", str(caught.value))
    assert told is not None
    for number in map(float, told.groups()):  # what it tells is within reach but for the figures
        inside = number * (1.01 if number == float(told[1]) else 0.99)
        written, _ = dynamic(known, wide, tmp_path / f"{number}", f"{inside}MB", format=format)
        assert written <= inside * 1e6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "target_bpw: give it, or target_size"),
        ({"target_bpw": 4.5, "target_size": "1MB"}, "target_bpw: give it, or target_size"),
        ({"target_size": "1XB"}, "target_size: .* is not a number of bytes"),
        ({"target_size": "1MB", "candidates": [(4, 48)]}, "48"),
        ({"target_size": "1MB", "format": "awq"}, "format: awq has one precision"),
        ({"target_size": "1MB", "exclude": ["*"]}, "no layer"),
    ],
)
def test_bad_targets(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bitwright.dynamic_quantize(
            DEMO, tmp_path / "q", calibration=TEXT, progress=False, **options
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "default"}, "target_size: asks for a choice"),
        ({"preset": "best", "bits": 3}, "bits: target_size decides that"),
        ({"preset": "best", "group_size": 32}, "group_size: target_size decides that"),
        ({"preset": "best", "format": "gguf", "type": "Q4_K_M"}, "Q4_K_M"),
        ({"preset": "best", "overrides": {"*.up_proj": "4"}}, "one precision"),
        ({"preset": "best", "target_size": "1kB"}, "out of reach"),
    ],
)
def test_quantize_takes_a_size_with_preset_best(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    given = {"target_size": "150kB", "calibration": TEXT, "length": 64, "progress": False}
    with pytest.raises(ValueError, match=words):
        bitwright.quantize(DEMO, tmp_path / "q", **{**given, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_best_within_a_size(tmp_path: Path) -> None:
    size = 150_000
    bitwright.quantize(
        *(DEMO, tmp_path / "q"),
        preset="best",
        target_size=size,
        calibration=TEXT,
        samples=8,
        length=64,
        progress=False,
    )
    assert 0.95 * size < (tmp_path / "q" / "model.safetensors").stat().st_size <= size


def test_the_command(tmp_path: Path) -> None:
    command = ["dynamic", str(DEMO), "--out", str(tmp_path / "q"), "-m", "rtn", "--length", "64"]
    command += ["--calibration", str(TEXT), "--sensitivity-samples", "4"]
    for wrong in ([], ["--target-size", "1MB", "--target-bpw", "4"], ["--target-size", "1 pound"]):
        assert CliRunner().invoke(cli, command + wrong).exit_code == 2
    found = CliRunner().invoke(cli, [*command, "--target-size", "150kB"])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "q" / "model.safetensors").stat().st_size <= 150_000


def test_divergences_are_those_of_models_that_are_rounded_so(tmp_path: Path) -> None:
    names = [f"model.layers.{index}.*" for index in range(3)]
    bitwright.quantize(DEMO, tmp_path / "q", "rtn", 3, 64, exclude=names, progress=False)
    judged = bitwright.evaluate(tmp_path / "q", IDS, reference=DEMO)
    found = divergences(
        bitwright.load_model(DEMO), IDS.astype(np.int32), {EMBEDDING: ((3, 64), "affine")}
    )
    assert found[EMBEDDING] == pytest.approx(judged.kl_divergence, rel=0.05)


@pytest.mark.slow
@needs_shared
def test_it_beats_uniform_bits_of_the_same_size(tmp_path: Path) -> None:
    model, text = SHARED / "models" / "small", SHARED / "text"
    tokens, judge = np.load(text / "small_calibration.npy"), np.load(text / "small_eval.npy")[:3]
    bitwright.quantize(model, tmp_path / "u", "rtn", 4, progress=False)
    size = (tmp_path / "u" / "model.safetensors").stat().st_size
    bitwright.dynamic_quantize(
        *(model, tmp_path / "d"),
        target_size=size,
        method="rtn",
        calibration=tokens,
        sensitivity_samples=8,
        progress=False,
    )
    uniform, chosen = (
        bitwright.evaluate(tmp_path / name, judge, reference=model).kl_divergence for name in "ud"
    )
    assert uniform is not None
    assert chosen is not None
    assert chosen < 0.8 * uniform
