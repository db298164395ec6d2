"""What embedding and head are stored in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_models import k_model
from shared_data import TESTS

import bitwright
from bitwright.blocks.gathering import tied_gram
from bitwright.checkpoint.gguf_file import TYPE_NAMES
from bitwright.errors import RecipeError
from bitwright.formats import FORMATS, Precision
from bitwright.formats.gguf import GgufFormat
from bitwright.formats.mlx import MlxFormat
from bitwright.loading.model import Model
from bitwright.quantization.live import LiveStatistics

TINY = TESTS / "data" / "tiny"
UNTIED = TINY / "llama-llama3"  # rows of 64
DEMO = bitwright.demo_folder()
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model whose rows are whole superblocks."""
    return k_model(tmp_path_factory.mktemp("wide") / "model")


def made(model: Path, out: Path, method: str = "rtn", **options: Any) -> Model:
    bitwright.quantize(model, out, method, progress=False, **options)
    return bitwright.load_model(out)


def precisions(model: Model, *names: str) -> list[tuple[int, int] | None]:
    found = [model.quantized(name) for name in names or (EMBEDDING, HEAD)]
    return [None if each is None else (each.bits, each.group_size) for each in found]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bits": 4, "group_size": 32}, [(4, 32), (4, 32)]),
        ({"bits": 3, "group_size": 32}, [(3, 32), (3, 32)]),
        ({"grid": "mxfp4"}, [(4, 32), (4, 32)]),
        ({"group_size": 32, "float_embeddings": True}, [None, None]),
        ({"group_size": 32, "embedding_bits": 8}, [(8, 32), (4, 32)]),
        ({"group_size": 32, "head_bits": 6, "float_embeddings": True}, [None, (6, 32)]),
        ({"group_size": 32, "exclude": ["lm_head"]}, [(4, 32), None]),
        ({"group_size": 32, "include": ["*.down_proj"]}, [None, None]),
        ({"group_size": 32, "overrides": {"lm_head": "8:64"}}, [(4, 32), (8, 64)]),
    ],
)
def test_mlx_has_them_in_the_precision_of_the_layers(
    tmp_path: Path, options: dict[str, Any], wanted: list[tuple[int, int] | None]
) -> None:
    assert precisions(made(UNTIED, tmp_path / "q", **options)) == wanted


@pytest.mark.parametrize("format", [each.name for each in FORMATS.values() if not each.embeddings])
def test_other_formats_keep_them_in_float(wide: Path, tmp_path: Path, format: str) -> None:
    found = made(wide, tmp_path / "q", format=format)
    assert precisions(found) == [None, None]
    assert found.checkpoint.dtype(f"{HEAD}.weight").itemsize == 2


@pytest.mark.parametrize(
    ("bits", "options", "wanted"),
    [
        (2, {}, "Q5_K"),
        (3, {}, "Q6_K"),
        (4, {"grid": "iq4_xs"}, "Q6_K"),
        (6, {}, "Q6_K"),
        (8, {}, "Q8_0"),
        (4, {"embedding_bits": 5, "head_bits": 5}, "Q5_K"),
    ],
)
def test_gguf_has_them_as_llama_quantize_has_the_head(
    wide: Path, tmp_path: Path, bits: int, options: dict[str, Any], wanted: str
) -> None:
    found = made(wide, tmp_path / "q", bits=bits, format="gguf", **options)
    stored = {TYPE_NAMES[found.checkpoint.dtype(f"{name}.weight")] for name in (EMBEDDING, HEAD)}
    assert stored == {wanted}


@pytest.mark.parametrize(
    ("channels", "bits", "wanted"),
    [(256, 4, ("k", 6)), (192, 4, ("symmetric", 8)), (192, 2, ("affine", 5)), (200, 4, None)],
)
def test_rows_that_are_no_whole_blocks_fall_back(
    channels: int, bits: int, wanted: tuple[str, int] | None
) -> None:
    default = Precision(bits, 32, "affine")
    for each in GgufFormat.ends("llama", default, channels):
        assert (None if each is None else (each.grid, each.bits)) == wanted


def test_heads_that_mlx_lm_has_in_eight_bits() -> None:
    default = Precision(4, 32, "affine")
    assert MlxFormat.ends("granite", default, 64) == (default, Precision(8, 64, "affine"))
    assert MlxFormat.ends("llama", default, 64) == (default, default)


@pytest.mark.parametrize("format", ["mlx", "gguf"])
def test_a_method_with_one_number_of_bits_has_the_head_in_it(
    wide: Path, tmp_path: Path, format: str
) -> None:
    tokens = np.random.default_rng(0).integers(0, 96, (4, 32))
    found = made(wide, tmp_path / "q", "salient", format=format, calibration=tokens)
    embedding, head = precisions(found)
    assert head is not None
    assert (embedding is not None, head[0]) == (True, 4)


def test_a_head_without_activations_is_rounded(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 96, (4, 32))
    bitwright.collect_activations(UNTIED, tmp_path / "a.npz", tokens)
    with pytest.warns(bitwright.BitwrightWarning, match="no activations of lm_head"):
        made(UNTIED, tmp_path / "q", "gptq", group_size=32, activations=tmp_path / "a.npz")
    rounded = made(UNTIED, tmp_path / "r", group_size=32)
    found = bitwright.load_model(tmp_path / "q").quantized(HEAD)
    wanted = rounded.quantized(HEAD)
    assert found is not None
    assert wanted is not None
    np.testing.assert_array_equal(found.codes, wanted.codes)


def test_recipes_may_name_them(tmp_path: Path) -> None:
    shapes = bitwright.load_model(UNTIED).linear_shapes()
    layers: dict[str, tuple[int, int | None]] = dict.fromkeys(shapes, (3, 32))
    recipe = bitwright.Recipe({**layers, HEAD: (6, 32)}, 4, 4)
    assert precisions(made(UNTIED, tmp_path / "q", recipe=recipe)) == [(3, 32), (6, 32)]
    float_ones = made(UNTIED, tmp_path / "f", recipe=recipe, float_embeddings=True)
    assert precisions(float_ones) == [None, None]
    with pytest.raises(RecipeError, match="names lm_head, which the gptq format keeps in float"):
        made(UNTIED, tmp_path / "g", recipe=recipe, format="gptq")


def test_an_embedding_that_is_the_head_is_quantized_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = bitwright.load_tokens(DEMO / "calibration.txt", tokenizer=DEMO, length=64, samples=64)
    options: dict[str, Any] = {"bits": 3, "group_size": 64, "calibration": ids}

    def lost(name: str, **more: Any) -> float:
        made(DEMO, tmp_path / name, "gptq", **{**options, **more})
        found = bitwright.evaluate(
            tmp_path / name,
            DEMO / "evaluation.txt",
            reference=DEMO,
            length=64,
            samples=32,
            progress=False,
        )
        assert found.kl_divergence is not None
        return found.kl_divergence

    together, kept = lost("together"), lost("kept", float_embeddings=True)
    monkeypatch.setattr(LiveStatistics, "tied_solver", lambda *_: None)
    assert together - kept < 0.8 * (lost("rounded") - kept)


def test_the_metric_of_a_tied_embedding_is_of_the_first_tokens() -> None:
    model = bitwright.load_model(DEMO)
    ids = np.random.default_rng(0).integers(0, 512, (80, 64)).astype(np.int32)
    *_, states = model.hidden_states(ids[:64])
    seen = states.reshape(-1, states.shape[-1]).astype(np.float64)
    expected = seen.T @ seen
    expected = expected / np.trace(expected) * len(expected) + np.eye(len(expected))
    np.testing.assert_allclose(tied_gram(model, ids), expected, 1e-3, 1e-3)
