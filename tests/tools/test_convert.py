"""From format to format: the same weights, or an error that tells the loss; quantized models as input."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from shared_data import TESTS, TINY

import bitwright
from bitwright.checkpoint import Checkpoint
from bitwright.formats import FORMATS
from bitwright.formats.gptq import GptqFormat
from bitwright.grids.regrid import regrid
from bitwright.grids.tensor import GRIDS, Grid, QuantizedTensor
from bitwright.report.format_table import format_table

DEMO = bitwright.demo_folder()
TOKENS = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=DEMO, length=64, samples=4)
CALIBRATION = bitwright.load_tokens(DEMO / "calibration.txt", tokenizer=DEMO, length=64, samples=16)
HALF = np.dtype(np.float16)
DTYPES = [HALF, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]


def made(out: Path, format: Any, **options: Any) -> Path:
    """Quantize the demo model by rounding."""
    options = {"method": "rtn", "float_embeddings": True, "progress": False, **options}
    bitwright.quantize(DEMO, out, format=format, **options)
    return out


def weights(folder: Path) -> dict[str, Any]:
    """Return all matrices of a model, dequantized."""
    model = bitwright.load_model(folder)
    matrix = (model.config.vocab_size, model.config.hidden_size)
    shapes = {**model.linear_shapes(), model.embedding_name: matrix}
    return {name: model.weight(name, shape) for name, shape in shapes.items()}


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    # A tied matrix may have been stored under the head's name.
    for left, right in zip(first.values(), second.values(), strict=True):
        np.testing.assert_array_equal(left, right)


# one tensor


def exactly(
    tensor: QuantizedTensor, bits: int, group_size: int, grid: Grid, dtypes: list[Any]
) -> QuantizedTensor | None:
    """Return what holds the very weights of a tensor, in the first dtype that does."""
    for dtype in dtypes:
        found = regrid(tensor, bits, group_size, grid, dtype)
        if found is not None and np.array_equal(found.dequantize(), tensor.dequantize()):
            return found
    return None


@given(
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    size=st.sampled_from([32, 64, 128]),
    grid=st.sampled_from(GRIDS),
    target=st.tuples(
        st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.sampled_from(GRIDS)
    ),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=st.integers(0, 99),
)
def test_what_is_regridded_has_the_same_weights(
    bits: int, size: int, grid: Grid, target: tuple[int, int, Grid], dtype: Any, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((4, 128), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, bits, size, grid=grid, scale_dtype=dtype)
    found = exactly(tensor, *target, DTYPES)
    if found is not None:
        assert (found.bits, found.group_size, found.grid) == target
        assert found.codes.max() < 2 ** target[0]
    holds = target[0] >= bits and size % target[1] == 0
    if not holds:
        assert found is None
    elif grid == target[2] or grid == "symmetric" or (grid, target[2]) == ("zero_point", "affine"):
        assert found is not None


def test_integer_zeros_are_found_in_biases_and_in_more_bits() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, 4, 32, grid="zero_point", scale_dtype=HALF)
    affine = exactly(tensor, 4, 32, "affine", DTYPES)
    assert affine is not None
    back = exactly(affine, 4, 32, "zero_point", [HALF])
    assert back is not None
    np.testing.assert_array_equal(back.codes, tensor.codes)
    np.testing.assert_array_equal(back.zeros, tensor.zeros)
    assert regrid(tensor, 4, 32, "symmetric", HALF) is None
    assert exactly(tensor, 5, 32, "symmetric", [HALF]) is not None


def test_reordered_groups_stay_together() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    index = np.random.default_rng(1).permutation(np.repeat(np.arange(2, dtype=np.int32), 32))
    tensor = bitwright.quantize_rtn(weight, 4, 32, grid="zero_point", scale_dtype=HALF)
    tensor = replace(tensor, group_index=index)
    assert exactly(tensor, 8, 32, "symmetric", [HALF]) is not None
    assert regrid(tensor, 8, 16, "symmetric", HALF) is None


# whole models

LOSSLESS = [
    ("gptq", {"bits": 4, "group_size": 64}, ["mlx", "awq", "compressed-tensors", "gguf", "gptq"]),
    ("gptq", {"bits": 3, "grid": "zero_point"}, ["mlx", "awq", "compressed-tensors", "gguf"]),
    ("awq", {"group_size": 32}, ["mlx", "gptq", "compressed-tensors", "gguf"]),
    ("mlx", {"bits": 4, "embedding_bits": 5, "scale_dtype": "float16"}, ["gguf", "mlx"]),
    ("compressed-tensors", {"bits": 8, "group_size": None}, ["gptq", "gguf", "mlx"]),
    (
        "compressed-tensors",
        {"scale_dtype": "float16", "exclude": ["*.0.*"]},
        ["gptq", "awq", "gguf"],
    ),
    ("gguf", {"bits": 4, "grid": "affine"}, ["mlx"]),
    ("gguf", {"bits": 8, "embedding_bits": 8}, ["mlx", "gptq", "compressed-tensors", "gguf"]),
]


@pytest.mark.parametrize(("source", "options", "targets"), LOSSLESS)
def test_conversion_loses_nothing_where_grids_allow(
    tmp_path: Path, source: str, options: dict[str, Any], targets: list[str]
) -> None:
    folder = made(tmp_path / "source", source, **options)
    figures = bitwright.evaluate(folder, TOKENS).perplexity
    for target in [*targets, "float"]:
        report = bitwright.convert(folder, tmp_path / target, target, progress=False)  # type: ignore[arg-type]
        assert not report.lossy
        assert len(report.layers) == len(bitwright.load_model(folder).quantized_layers())
        assert_same_weights(folder, tmp_path / target)
        assert bitwright.evaluate(tmp_path / target, TOKENS).perplexity == figures
        found = bitwright.load_model(tmp_path / target).format
        assert (None if found is None else found.name) == (None if target == "float" else target)
        assert (tmp_path / target / "tokenizer.json").is_file()


def test_there_and_back_gives_the_same_tensors(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", "gptq", bits=4, group_size=32)
    for number, target in enumerate(["mlx", "compressed-tensors", "awq", "gguf", "gptq"]):
        bitwright.convert(
            tmp_path / "abcdef"[number],
            tmp_path / "abcdef"[number + 1],
            target,
            progress=False,  # type: ignore[arg-type]
        )
    with Checkpoint(folder) as one, Checkpoint(tmp_path / "f") as other:
        assert one.names() == other.names()
        for name in one.names():
            np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)
        # mlx-lm needs the keys of transformers 4, too.
        assert one.config == {key: other.config[key] for key in one.config}


def test_what_would_be_lost_is_told_and_allowed(tmp_path: Path) -> None:
    folder = made(tmp_path / "q", "mlx", bits=4)
    with pytest.raises(ValueError, match="cannot be stored in the awq format") as caught:
        bitwright.convert(folder, tmp_path / "out", "awq", progress=False)
    for word in ("21 of 21", "q_proj", "4 bits in groups of 64", "--allow-requantize", "gguf"):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = bitwright.convert(
        folder, tmp_path / "out", "awq", allow_requantize=True, progress=False
    )
    assert len(report.lossy) == 21
    judged = bitwright.evaluate(tmp_path / "out", TOKENS, reference=folder)
    assert judged.kl_divergence is not None
    assert 0 < judged.kl_divergence < 0.1
    before, after = weights(folder), weights(tmp_path / "out")
    layer = report.lossy[0]
    change = np.square(before[layer.name] - after[layer.name]).sum()
    assert change / np.square(before[layer.name]).sum() == pytest.approx(layer.error, rel=1e-3)


def test_shapes_that_a_format_does_not_have_are_told(tmp_path: Path) -> None:
    folder = made(tmp_path / "q", "gptq", bits=4)
    with pytest.raises(ValueError, match="q_proj.*64"):
        bitwright.convert(folder, tmp_path / "out", "marlin", progress=False)
    assert not (tmp_path / "out").exists()


def test_act_order_is_kept_and_declared(tmp_path: Path) -> None:
    folder = made(tmp_path / "q", "gptq", bits=4, group_size=32)
    rng = np.random.default_rng(0)
    model = bitwright.load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in model.linear_shapes():
        tensors[f"{name}.g_idx"] = rng.permutation(tensors[f"{name}.g_idx"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bitwright.convert(folder, tmp_path / "gptq", "gptq", progress=False)
    assert_same_weights(folder, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["desc_act"] is True
    assert GptqFormat.reorders
    with pytest.raises(ValueError, match="awq format as they are"):
        bitwright.convert(folder, tmp_path / "awq", "awq", progress=False)
    with pytest.raises(ValueError, match="act-order"):
        bitwright.refine_model(DEMO, folder, tmp_path / "out", CALIBRATION, progress=False)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
def test_float_folders(tmp_path: Path, dtype: Any) -> None:
    folder = made(tmp_path / "q", "gptq", bits=4)
    report = bitwright.convert(folder, tmp_path / "f", "float", dtype=dtype, progress=False)
    with Checkpoint(tmp_path / "f") as checkpoint:
        stored = {str(checkpoint.dtype(f"{name}.weight")) for name in weights(folder)}
        assert "quantization_config" not in checkpoint.config
    assert stored <= ({"bfloat16", "float32"} if dtype is None else {dtype})
    assert bool(report.lossy) == (dtype in ("float16", "bfloat16"))
    original = bitwright.convert(DEMO, tmp_path / "g", "float", dtype=dtype, progress=False)
    assert original.layers == ()


def test_gguf_of_a_model_in_float(tmp_path: Path) -> None:
    bitwright.convert(DEMO, tmp_path / "f", "gguf", progress=False)
    assert_same_weights(DEMO, tmp_path / "f")
    ours = bitwright.load_model(tmp_path / "f" / "model.gguf").logits(TOKENS[:1])
    np.testing.assert_array_equal(ours, bitwright.load_model(DEMO).logits(TOKENS[:1]))


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2"])
def test_families(tmp_path: Path, name: str) -> None:
    folder = next(each for each in TINY if each.name == name)
    bitwright.quantize(folder, tmp_path / "mlx", "rtn", 4, 32, "mlx", progress=False)
    bitwright.convert(tmp_path / "mlx", tmp_path / "float", "float", progress=False)
    assert_same_weights(tmp_path / "mlx", tmp_path / "float")
    bitwright.quantize(folder, tmp_path / "gptq", "rtn", 4, 32, "gptq", progress=False)
    bitwright.convert(tmp_path / "gptq", tmp_path / "back", "mlx", progress=False)
    assert_same_weights(tmp_path / "gptq", tmp_path / "back")


def test_a_gguf_file_may_lie_beside_what_is_made_of_it(tmp_path: Path) -> None:
    made(tmp_path / "q", "gguf", bits=4, grid="affine")
    (tmp_path / "q" / "model.gguf").rename(tmp_path / "demo.gguf")
    bitwright.convert(tmp_path / "demo.gguf", tmp_path / "out", "mlx", progress=False)
    assert_same_weights(tmp_path / "demo.gguf", tmp_path / "out")
    with pytest.raises(OSError, match="overlaps"):
        bitwright.convert(tmp_path / "demo.gguf", tmp_path, "mlx", overwrite=True)


@pytest.mark.parametrize("target", ["gptq", "mlx", "float"])
def test_damaged_layers_are_named(tmp_path: Path, target: Any) -> None:
    """Also where the format stays, and tensors could be copied as they are."""
    folder = made(tmp_path / "q", "gptq", bits=4, group_size=64)
    sound = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for changed, word in (
        (np.full_like(sound[f"{name}.scales"], np.nan), "NaN"),
        (sound[f"{name}.scales"][:, :32], "contradict"),
    ):
        tensors = {**sound, f"{name}.scales": np.ascontiguousarray(changed)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for run in (
            lambda: bitwright.convert(folder, tmp_path / "out", target, progress=False),
            lambda: bitwright.refine_model(DEMO, folder, tmp_path / "out", CALIBRATION),
        ):
            with pytest.raises(ValueError, match=name) as caught:
                run()
            assert word in str(caught.value)
            assert not (tmp_path / "out").exists()
    # Another layer's tensors, sound by themselves, but not what config.json asks for.
    other = "model.layers.1.mlp.down_proj"
    parts = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {**sound, **{f"{name}.{each}": sound[f"{other}.{each}"] for each in parts}}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}.*config.json asks for"):
        bitwright.convert(folder, tmp_path / "out", target, progress=False)
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format.*magic"):
        bitwright.convert(DEMO, tmp_path / "out", "magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not quantized"):
        bitwright.convert(DEMO, tmp_path / "out", "gptq")
    with pytest.raises(ValueError, match="dtype"):
        bitwright.convert(DEMO, tmp_path / "out", "float", dtype="int8")
    assert not (tmp_path / "out").exists()


# quantized models as input


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("mlx", {"bits": 3, "embedding_bits": 4}),
        ("gptq", {"bits": 3, "grid": "zero_point"}),
        ("compressed-tensors", {"bits": 4, "exclude": ["*.0.*"]}),
        ("awq", {}),
        ("gguf", {"bits": 4, "grid": "affine"}),
    ],
)
def test_refinement_improves_any_quantized_model(
    tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    folder = made(tmp_path / "q", format, **options)
    report = bitwright.refine_model(DEMO, folder, tmp_path / "out", CALIBRATION, progress=False)
    before, after = (
        bitwright.evaluate(each, TOKENS, reference=DEMO).kl_divergence
        for each in (folder, tmp_path / "out")
    )
    assert after is not None
    assert before is not None
    assert after < 0.8 * before
    one, other = bitwright.load_model(folder), bitwright.load_model(tmp_path / "out")
    assert one.checkpoint.names() == other.checkpoint.names()
    assert one.checkpoint.nbytes() == other.checkpoint.nbytes()
    assert len(report.layers) == len(one.quantized_layers())


def test_refinement_needs_the_model_it_was_made_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of its layers is quantized"):
        bitwright.refine_model(DEMO, DEMO, tmp_path / "out", CALIBRATION)
    folder = made(tmp_path / "q", "mlx")
    other = next(each for each in TINY if each.name == "llama-linear")
    with pytest.raises(ValueError, match="is not made from"):
        bitwright.refine_model(other, folder, tmp_path / "out", CALIBRATION)


@pytest.mark.parametrize(
    ("source", "target"), list(product(["mlx", "gptq", "gguf"], ["mlx", "compressed-tensors"]))
)
def test_quantizing_again_is_asked_for(tmp_path: Path, source: str, target: Any) -> None:
    grid = "affine" if source == "gguf" else None
    folder = made(tmp_path / "q", source, bits=8 if source != "gguf" else 5, grid=grid)
    with pytest.raises(ValueError, match="--allow-requantize"):
        bitwright.quantize(folder, tmp_path / "out", "rtn", format=target)
    bitwright.quantize(
        folder,
        tmp_path / "out",
        "rtn",
        4,
        32,
        target,
        allow_requantize=True,
        exclude=["*.down_proj"],
        progress=False,
    )
    model = bitwright.load_model(tmp_path / "out")
    assert model.format is not None
    assert model.format.name == target
    layers = model.quantized_layers()
    assert layers
    assert not any("down_proj" in name for name in layers)
    judged = bitwright.evaluate(tmp_path / "out", TOKENS, reference=DEMO).kl_divergence
    assert judged is not None
    assert judged < 0.2


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (TESTS.parent / "docs" / "formats.md").read_text()
    assert text.split("<!-- table -->\n")[1].split("<!-- end -->")[0] == format_table()
    assert set(FORMATS) == {line.split("|")[1].strip() for line in format_table().splitlines()[2:]}


@pytest.mark.parametrize("name", ["one by one", "stacked"])
def test_experts_in_float_become_stacks_of_gguf(name: str, tmp_path: Path) -> None:
    """Which has nothing else; transformers 5 stores gate and up of all experts as one tensor."""
    source = tmp_path / "source"
    source.mkdir()
    folder = next(each for each in TINY if each.name == "qwen3_moe")
    config = {
        **json.loads((folder / "config.json").read_text()),
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
        "layer_types": None,
    }
    (source / "config.json").write_text(json.dumps(config))
    content = json.loads((DEMO / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    kept = {key: vocab[key] for key in vocab if vocab[key] < config["vocab_size"]}
    content["model"] |= {"vocab": kept, "merges": []}
    (source / "tokenizer.json").write_text(json.dumps(content))
    tensors = {  # of the block that has experts
        key.replace(".layers.1.", ".layers.0."): array
        for key, array in load_file(folder / "model.safetensors").items()
        if ".layers.0." not in key
    }
    if name == "stacked":
        prefix = "model.layers.0.mlp.experts."
        count = sum(key.startswith(prefix) and "gate_proj" in key for key in tensors)
        parts = {
            role: [tensors.pop(f"{prefix}{index}.{role}_proj.weight") for index in range(count)]
            for role in ("gate", "up", "down")
        }
        both = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{prefix}gate_up_proj"] = np.stack([np.concatenate(pair) for pair in both])
        tensors[f"{prefix}down_proj"] = np.stack(parts["down"])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    bitwright.convert(source, tmp_path / "gguf", "gguf", progress=False)
    (tmp_path / "gguf" / "config.json").unlink()  # the file tells all
    assert_same_weights(source, tmp_path / "gguf")
    options: dict[str, Any] = {"format": "gguf", "bits": 8, "exclude": ["*.experts.*"]}
    bitwright.quantize(source, tmp_path / "mixed", "rtn", **options, progress=False)
    found, expected = (bitwright.load_model(tmp_path / each) for each in ("mixed", "source"))
    for key, place in expected.experts.items():
        shape = expected.linear_shapes()[key]
        np.testing.assert_array_equal(found.weight(key, shape), expected.weight(key, shape))
        assert place.role in ("gate", "up", "down")
