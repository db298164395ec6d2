"""Conversion keeps codes and zeros where only the dtype of scales does not fit, and tells the loss."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, TINY, needs_shared

import bitwright
from bitwright.cli.main import cli
from bitwright.grids.regrid import ROUNDING, is_rounding, lost, regrid
from bitwright.grids.tensor import GRIDS, Grid, QuantizedTensor

DEMO = bitwright.demo_folder()
HALF = np.dtype(np.float16)
FLOAT = np.dtype(np.float32)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = "model.layers.0.mlp.up_proj"
TARGETS = ("mlx", "marlin", "gptq", "awq", "compressed-tensors", "gguf")
MOE = next(each for each in TINY if each.name == "qwen3_moe")

# One tensor


@given(
    bits=st.sampled_from([2, 4, 8]),
    grid=st.sampled_from(GRIDS),
    target=st.sampled_from(GRIDS),
    size=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_rounding_scales_stays_in_the_bound(
    bits: int, grid: Grid, target: Grid, size: float, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((8, 128), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight * np.float32(size), bits, 64, grid=grid)
    found = regrid(tensor, bits, 32, target, HALF)
    if found is None:
        assert (grid, target) in {("affine", "symmetric"), ("zero_point", "symmetric")}
        return
    before, after = tensor.dequantize(), found.dequantize()
    change = np.square(after.astype(np.float64) - before).sum()
    assert lost(before, after) == pytest.approx(change / np.square(before.astype(np.float64)).sum())
    assert is_rounding(tensor, before, after)
    assert 0 < lost(before, after) <= ROUNDING
    np.testing.assert_array_equal(levels(found), levels(tensor))


@pytest.mark.parametrize("factor", [1e-9, 1e-7, 3e-6, 1e6])
@pytest.mark.parametrize("grid", GRIDS)
def test_scales_that_float16_does_not_have_are_no_rounding(grid: Grid, factor: float) -> None:
    """However small the share of the energy is: one group of many."""
    weight = np.random.default_rng(0).standard_normal((64, 128), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, 4, 32, grid=grid)
    scaled = np.where(np.arange(64)[:, None] == 3, np.float32(factor), np.float32(1))
    biases = None if tensor.biases is None else tensor.biases * scaled
    tensor = replace(tensor, scales=tensor.scales * scaled, biases=biases)
    found = regrid(tensor, 4, 32, grid, HALF)
    assert found is not None
    before, after = tensor.dequantize(), found.dequantize()
    assert not is_rounding(tensor, before, after)
    assert factor > 1 or lost(before, after) < ROUNDING


def test_groups_of_zeros_are_held_whatever_their_scale() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    weight[2, :32] = 0
    for grid in GRIDS:
        tensor = bitwright.quantize_rtn(weight, 4, 32, grid=grid)
        scales = tensor.scales.copy()
        scales[2, 0] = 1e-30
        tensor = replace(tensor, scales=scales)
        found = regrid(tensor, 4, 32, grid, HALF)
        assert found is not None
        assert is_rounding(tensor, tensor.dequantize(), found.dequantize())
    scales[2, 0] = 0  # as other tools write it
    affine = replace(tensor, scales=scales).as_affine()
    found = regrid(affine, 4, 32, "zero_point", FLOAT)
    assert found is not None
    assert is_rounding(affine, affine.dequantize(), found.dequantize())


def test_biases_between_integers_are_no_zeros() -> None:
    """Also where only one group of many is off, whose share of the energy is nothing."""
    weight = np.random.default_rng(0).standard_normal((256, 128), dtype=np.float32)
    tensor = bitwright.quantize_rtn(weight, 4, 32, grid="zero_point")
    affine = regrid(tensor, 4, 32, "affine", FLOAT)
    assert affine is not None
    assert affine.biases is not None
    for shift in (0.5, 0.1, 0.01):
        biases = affine.biases.copy()
        biases[7, 2] += np.float32(shift) * affine.scales[7, 2]
        moved = replace(affine, biases=biases)
        found = regrid(moved, 4, 32, "zero_point", FLOAT)
        assert found is not None
        assert not is_rounding(moved, moved.dequantize(), found.dequantize())


# All formats


def levels(tensor: QuantizedTensor) -> Any:
    """How many steps each weight is from zero, whatever the grid."""
    if tensor.zeros is not None:
        zeros = tensor.zeros.astype(np.int64)
    else:
        biases = np.asarray(tensor.biases, np.float64)
        zeros = np.rint(-biases / tensor.scales.astype(np.float64)).astype(np.int64)
    index = tensor.group_index
    if index is None:
        index = np.arange(tensor.shape[1]) // tensor.group_size
    return tensor.codes - zeros[:, index]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one block, whose shapes all formats hold."""
    folder = tmp_path_factory.mktemp("small") / "model"
    size, rng = 128, np.random.default_rng(0)
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1}
    config |= {"head_dim": 32, "num_key_value_heads": 4, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))

    def normal(rows: int) -> Any:
        return 0.05 * rng.standard_normal((rows, size), dtype=np.float32)

    tensors = {}
    for name in load_file(DEMO / "model.safetensors"):
        if ".layers." not in name or ".layers.0." in name:
            kind = name.split(".")[-2]
            tensors[name] = normal(size) if kind in LINEARS else np.ones(size, np.float32)
    tensors["model.embed_tokens.weight"] = normal(config["vocab_size"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made(model: Path, out: Path, format: Any, **options: Any) -> Path:
    options |= {"float_embeddings": True, "progress": False}
    bitwright.quantize(model, out, "rtn", format=format, **options)
    return out / "model.gguf" if format == "gguf" else out


def changed(folder: Path, change: Callable[[str, Any], Any]) -> Path:
    """Change the tensors of a folder in place."""
    file = folder / "model.safetensors"
    tensors = {name: change(name, array) for name, array in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def in_float32(name: str, array: Any) -> Any:
    """Turn scales into numbers that float16 does not have."""
    if not name.endswith("scales"):
        return array
    factors = np.random.default_rng(0).uniform(1, 1.01, array.shape)
    return (array * factors).astype(np.float32)


# = the same weights, ~ the same codes with rounded scales, x neither; in the order of TARGETS.
TABLE: list[tuple[str, dict[str, Any], str]] = [
    # source, options, and what becomes of it in mlx, marlin, gptq, awq, compressed-tensors, gguf
    ("mlx", {"scale_dtype": "float16"}, "=x~~~="),
    ("mlx", {"scale_dtype": "bfloat16"}, "=xxxx="),  # biases are too coarse to be integer zeros
    ("mlx", {"scale_dtype": "float32"}, "=x~~~~"),
    ("gptq", {"grid": "symmetric"}, "=x===="),
    ("gptq", {"grid": "symmetric", "group_size": 128}, "======"),
    ("gptq", {"grid": "symmetric", "group_size": 128, "float32": True}, "~~~~=~"),
    ("gptq", {"grid": "zero_point"}, "=x===="),
    ("gptq", {"grid": "zero_point", "float32": True}, "~x~~=~"),
    ("gptq", {"bits": 8, "group_size": None, "float32": True}, "~x~x=~"),
    ("awq", {"grid": "symmetric", "float32": True}, "~x~~=~"),
    ("awq", {"grid": "zero_point", "float32": True}, "~x~~=~"),
    ("compressed-tensors", {"grid": "symmetric", "scale_dtype": "float16"}, "=x===="),
    ("compressed-tensors", {"grid": "symmetric", "scale_dtype": "bfloat16"}, "=x===="),
    ("compressed-tensors", {"grid": "symmetric", "scale_dtype": "float32"}, "~x~~=~"),
    ("compressed-tensors", {"grid": "zero_point", "scale_dtype": "float32"}, "~x~~=~"),
    ("compressed-tensors", {"bits": 8, "grid": "zero_point", "scale_dtype": "float32"}, "~x~x=x"),
    ("marlin", {"group_size": None}, "======"),
    ("gguf", {"grid": "affine"}, "=x~~~="),
    ("gguf", {"grid": "symmetric"}, "=x===="),
    ("gguf", {"grid": "symmetric", "bits": 8}, "=x=x=="),
]


@pytest.mark.parametrize(("source", "options", "expected"), TABLE)
def test_from_every_format_to_every_other(
    tmp_path: Path, small: Path, source: str, options: dict[str, Any], expected: str
) -> None:
    options = {"bits": 4, **options}
    wide = options.pop("float32", False)
    if source != "gguf":
        options.setdefault("group_size", 64)
    folder = made(small, tmp_path / "source", source, **options)
    if wide:
        changed(folder, in_float32)
    before = bitwright.load_model(folder)
    for target, letter in zip(TARGETS, expected, strict=True):
        out = tmp_path / target
        if letter == "x":
            with pytest.raises(ValueError, match=f"cannot be stored in the {target} format"):
                bitwright.convert(folder, out, target, progress=False)
            assert not out.exists()
            continue
        report = bitwright.convert(folder, out, target, progress=False)
        assert bool(report.lossy) == (letter == "~"), target
        after = bitwright.load_model(out / "model.gguf" if target == "gguf" else out)
        for layer in report.layers:
            old, new = before.quantized(layer.name), after.quantized(layer.name)
            assert old is not None
            assert new is not None
            assert not layer.requantized
            one, other = (each.dequantize().astype(np.float64) for each in (old, new))
            if layer.error == 0:
                np.testing.assert_array_equal(one, other)
                continue
            np.testing.assert_array_equal(levels(old), levels(new))
            error = np.square(one - other).sum() / np.square(one).sum()
            assert error == pytest.approx(layer.error)
            assert error <= ROUNDING


ROUND_TRIPS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mlx", {"group_size": 32, "scale_dtype": "float16"}, ["gguf"]),
    ("gptq", {"group_size": 32, "grid": "symmetric"}, ["mlx", "awq", "compressed-tensors", "gguf"]),
    ("gptq", {"group_size": 128}, ["mlx", "marlin", "awq", "compressed-tensors"]),
    ("gptq", {"group_size": 32, "grid": "zero_point"}, ["mlx", "awq", "compressed-tensors"]),
    ("gptq", {"bits": 8, "group_size": None}, ["compressed-tensors"]),
    ("awq", {"group_size": 64, "grid": "zero_point"}, ["mlx", "gptq", "compressed-tensors"]),
    ("compressed-tensors", {"scale_dtype": "float16"}, ["mlx", "gptq", "awq"]),
    ("compressed-tensors", {"scale_dtype": "bfloat16", "bits": 8}, ["mlx"]),
    ("marlin", {}, ["mlx", "gptq", "awq", "compressed-tensors"]),
    ("gguf", {"grid": "symmetric"}, ["mlx", "gptq", "awq", "compressed-tensors"]),
    ("gguf", {"grid": "affine"}, ["mlx"]),
    ("gguf", {"bits": 8, "grid": "symmetric"}, ["mlx", "gptq", "compressed-tensors"]),
]


@pytest.mark.parametrize(("source", "options", "ways"), ROUND_TRIPS)
def test_there_and_back_gives_equal_bytes(
    tmp_path: Path, small: Path, source: Any, options: dict[str, Any], ways: list[Any]
) -> None:
    folder = made(small, tmp_path / "source", source, **{"bits": 4, **options})
    again = tmp_path / "again"  # what comes of its own format
    bitwright.convert(folder, again, source, progress=False)
    for way in ways:
        there, back = tmp_path / way, tmp_path / f"{way}-back"
        assert not bitwright.convert(folder, there, way, progress=False).lossy
        middle = there / "model.gguf" if way == "gguf" else there
        assert not bitwright.convert(middle, back, source, progress=False).lossy
        if source != "gguf":  # whose files have other metadata where those of the first are lost
            name = "model.safetensors"
            assert (back / name).read_bytes() == (again / name).read_bytes()
            continue
        one, other = (
            bitwright.load_model(each / "model.gguf").checkpoint for each in (back, again)
        )
        assert one.names() == other.names()
        assert all(one.read(each).tobytes() == other.read(each).tobytes() for each in one.names())


def test_superblocks_become_free_scales_and_not_the_other_way_round(tmp_path: Path) -> None:
    """Their products are float32; and no other format has the groups of 16 of 2, 3 and 6 bits."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 512), dtype=np.float32)
    for bits, size, grid in ((4, 32, "affine"), (5, 32, "affine"), (6, 16, "symmetric")):
        tensor = bitwright.quantize_rtn(weight, bits, None, grid="k")
        assert regrid(tensor, bits, size, "k", HALF) is tensor
        for target in GRIDS:
            found = regrid(tensor, bits, size, target, FLOAT)
            if found is None:
                assert (grid, target) == ("affine", "symmetric")
            elif target == grid:
                assert lost(tensor.dequantize(), found.dequantize()) == 0
                half = regrid(tensor, bits, size, target, HALF)
                assert half is not None
                before, after = tensor.dequantize(), half.dequantize()
                assert 0 < lost(before, after) < ROUNDING
                assert is_rounding(tensor, before, after)
            free = replace(tensor, superblocks=None)
            assert regrid(free, bits, size, "k", HALF) is None
        assert regrid(tensor, bits, 32, "affine", FLOAT) is None or size == 32


def test_models_with_superblocks(tmp_path: Path, small: Path) -> None:
    wide = tmp_path / "wide"  # rows of 256, which superblocks need
    shutil.copytree(small, wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    rng = np.random.default_rng(1)
    shapes = {"gate_proj": (256, 128), "up_proj": (256, 128), "down_proj": (128, 256)}
    changed(
        wide,
        lambda name, array: next(
            (
                0.05 * rng.standard_normal(shape, dtype=np.float32)
                for key, shape in shapes.items()
                if key in name
            ),
            array,
        ),
    )
    for bits in (4, 6):
        folder = made(
            wide,
            tmp_path / f"q{bits}",
            "gguf",
            bits=bits,
            grid="k",
            include=["*.down_proj"],
        )
        assert not bitwright.convert(folder, tmp_path / f"g{bits}", "gguf", progress=False).lossy
        for target in ("mlx", "gptq", "compressed-tensors"):
            out = tmp_path / f"{target}{bits}"
            if (bits, target) == (4, "mlx"):
                report = bitwright.convert(folder, out, target, progress=False)
                assert [layer.error for layer in report.layers] == [0]
                continue
            with pytest.raises(ValueError, match="down_proj.*cannot|cannot.*down_proj"):
                bitwright.convert(folder, out, target, progress=False)  # type: ignore[arg-type]


# What is in a model


def wider(folder: Path) -> Path:
    """Turn the scales of a folder into numbers that float16 does not have."""
    return changed(folder, in_float32)


def test_one_group_that_float16_cannot_hold_is_no_rounding(tmp_path: Path) -> None:
    """The message names the layer, what would become of it, and what holds it."""
    folder = made(DEMO, tmp_path / "q", "compressed-tensors", scale_dtype="float32")
    key = f"{LAYER}.weight_scale"
    sound = load_file(folder / "model.safetensors")[key]
    for number, value in enumerate([1e-9, 1e-7, 2e5]):
        scales = sound.copy()
        scales[5, 0] = value
        changed(folder, lambda name, array, new=scales: new if name == key else array)  # type: ignore[misc]
        for target in ("gptq", "awq", "gguf"):
            out = tmp_path / f"{target}{number}"
            with pytest.raises(ValueError, match=r"layers\.0\.mlp\..*mlx") as caught:
                bitwright.convert(folder, out, target, progress=False)  # type: ignore[arg-type]
            words = ["more than float16 can hold"]
            if value < 1:
                words = [
                    # gate_proj is one module with up_proj for vLLM, so it goes with it.
                    f"{1 if target == 'gguf' else 2} of 21 layers cannot be stored in the {target} format",
                    "--allow-requant",
                ]
                words += [
                    "the same codes, with scales in float16",
                    "some groups by more than rounding",
                ]
            for word in words:
                assert word in str(caught.value)
            assert not out.exists()
    assert not any(e.error > 1e-12 for e in bitwright.convert(folder, tmp_path / "m", "mlx").layers)


@pytest.mark.parametrize("target", ["gptq", "awq", "gguf"])
def test_codes_are_kept_beyond_the_bound_where_that_loses_less(tmp_path: Path, target: Any) -> None:
    """With the flag: the biases of mlx in bfloat16 are near integer zeros, but not near enough."""
    folder = made(DEMO, tmp_path / "q", "mlx", exclude=["*.0.*", "*.1.*"], scale_dtype="float32")
    rng = np.random.default_rng(0)

    def coarse(name: str, array: Any) -> Any:
        if name.endswith(("scales", "biases")):
            return (array * rng.choice([1, 1 + 2**-8], array.shape)).astype(np.float32)
        return array

    before = bitwright.load_model(changed(folder, coarse))
    if target == "gguf":
        assert all(
            0 < each.error < ROUNDING
            for each in bitwright.convert(folder, tmp_path / "out", target, progress=False).layers
        )
        return
    with pytest.raises(ValueError, match="the same codes, with scales in float16"):
        bitwright.convert(folder, tmp_path / "out", target, progress=False)
    report = bitwright.convert(
        folder, tmp_path / "out", target, allow_requantize=True, progress=False
    )
    after = bitwright.load_model(tmp_path / "out")
    for layer in report.layers:
        assert ROUNDING < layer.error < 1e-3
        assert not layer.requantized
        old, new = before.quantized(layer.name), after.quantized(layer.name)
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(levels(old), levels(new))


@pytest.mark.parametrize("grid", ["symmetric", "zero_point"])
@pytest.mark.parametrize("wide", [False, True])
def test_experts_of_a_stack_have_scales_of_one_dtype(tmp_path: Path, grid: Any, wide: bool) -> None:
    """Of some experts float16 holds the biases, of others it does not."""
    folder = made(MOE, tmp_path / "q", "gptq", bits=4, group_size=32, grid=grid)

    def powers_of_two(name: str, array: Any) -> Any:
        if ".experts.1." in name and name.endswith("scales"):
            return np.exp2(np.round(np.log2(array.astype(np.float32)))).astype(array.dtype)
        return array

    changed(folder, powers_of_two)
    if wide:
        wider(folder)
    report = bitwright.convert(folder, tmp_path / "out", "mlx", progress=False)
    assert bool(report.lossy) == wide
    assert all(layer.error < 1e-12 for layer in report.layers)
    before, after = bitwright.load_model(folder), bitwright.load_model(tmp_path / "out")
    for name in before.experts:
        old, new = before.quantized(name), after.quantized(name)
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(levels(old), levels(new))


@pytest.mark.parametrize("group_size", [32, 64, None])
def test_act_order_and_whole_rows_keep_their_codes(tmp_path: Path, group_size: Any) -> None:
    folder = wider(made(DEMO, tmp_path / "q", "gptq", bits=4, group_size=group_size))
    rng = np.random.default_rng(0)
    changed(folder, lambda name, array: rng.permutation(array) if "g_idx" in name else array)
    report = bitwright.convert(folder, tmp_path / "out", "gptq", progress=False)
    before, after = bitwright.load_model(folder), bitwright.load_model(tmp_path / "out")
    for layer in report.layers:
        assert 0 < layer.error < ROUNDING
        old, new = before.quantized(layer.name), after.quantized(layer.name)
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(levels(old), levels(new))
        np.testing.assert_array_equal(old.codes, new.codes)
        assert (old.group_index is None) == (new.group_index is None)
    if group_size == 32:
        assert any(before.quantized(e.name).group_index is not None for e in report.layers)  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="awq format as they are"):
            bitwright.convert(folder, tmp_path / "awq", "awq", progress=False)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (5, 64)])
def test_embedding_and_head_keep_their_codes(tmp_path: Path, bits: int, group_size: int) -> None:
    folder = made(
        DEMO,
        tmp_path / "q",
        "mlx",
        bits=bits,
        group_size=group_size,
        embedding_bits=bits,
        scale_dtype="float32",
    )
    report = bitwright.convert(folder, tmp_path / "out", "gguf", progress=False)
    assert len(report.layers) == 22
    assert all(0 < layer.error < ROUNDING for layer in report.layers)
    before = bitwright.load_model(folder)
    after = bitwright.load_model(tmp_path / "out" / "model.gguf")
    for layer in report.layers:
        old, new = before.quantized(layer.name), after.quantized(layer.name)
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(old.codes, new.codes)


def test_only_what_does_not_fit_is_rounded(tmp_path: Path) -> None:
    folder = made(DEMO, tmp_path / "q", "compressed-tensors", scale_dtype="float16")
    names = [f"{LAYER}.weight_scale", f"{LAYER.replace('.0.', '.2.')}.weight_scale"]
    changed(
        folder,
        lambda name, array: array.astype(np.float32) * 1.0001 if name in names else array,
    )
    for target in ("gptq", "awq", "gguf", "mlx"):
        report = bitwright.convert(folder, tmp_path / target, target, progress=False)  # type: ignore[arg-type]
        assert [f"{layer.name}.weight_scale" for layer in report.lossy] == names


def test_the_report_the_output_and_the_card_say_how_much_it_is(tmp_path: Path) -> None:
    folder = made(DEMO, tmp_path / "q", "compressed-tensors", scale_dtype="float32")
    for target in ("gptq", "awq", "gguf"):
        out = tmp_path / target
        report = bitwright.convert(folder, out, target, progress=False)  # type: ignore[arg-type]
        worst = max(report.layers, key=lambda layer: layer.error)
        (change, what), *others = report.changes().items()
        assert (change, others) == ("the same codes, scales rounded", [])
        mean = np.mean([layer.error for layer in report.layers])
        assert what.startswith(f"21 of 21 layers lose {mean:.2g} of the energy of their weights")
        assert f"{worst.error:.2g} at most ({worst.name})" in what
        assert f"| {change} | {what} |" in (out / "README.md").read_text()
        arguments = ["convert", str(folder), "--out", str(out), "--format", target, "--overwrite"]
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        assert f"{change}: {what}\n" in done.output
    report = bitwright.convert(folder, tmp_path / "same", "compressed-tensors", progress=False)
    assert report.changes() == {}
    assert "layers lose" not in (tmp_path / "same" / "README.md").read_text()


@pytest.mark.parametrize("target", ["gptq", "awq", "gguf"])
@needs_shared
def test_the_model_says_the_same(tmp_path: Path, target: Any) -> None:
    """Codes that are made anew cost a divergence of 0.016."""
    story = SHARED / "models" / "story"
    tokens = np.load(SHARED / "text" / "story_eval.npy")[:8]
    folder = made(story, tmp_path / "q", "compressed-tensors", scale_dtype="float32")
    bitwright.convert(folder, tmp_path / "out", target, progress=False)
    judged = bitwright.evaluate(tmp_path / "out", tokens, reference=folder)
    assert judged.kl_divergence is not None
    assert judged.kl_divergence < 1e-6
