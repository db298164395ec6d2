"""Files that other tools made are read with the weights that their own loaders give, bit by bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from clients import run_client
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, TESTS, needs_shared
from test_interop import check_loads

import bitwright

pytestmark = pytest.mark.slow
DEMO = bitwright.demo_folder()


def check(
    tmp_path: Path, client: str, script: str, model: Path, out: str, *options: str
) -> bitwright.Model:
    run_client(client, script, model, tmp_path / out, tmp_path / "expected.npz", *options)
    found, expected = bitwright.load_model(tmp_path / out), np.load(tmp_path / "expected.npz")
    assert expected.files
    for name in expected.files:
        weight = found.weight(name, expected[name].shape)
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)
    quantized = set(found.quantized_layers())
    assert quantized <= set(expected.files)
    return found


@pytest.mark.parametrize(
    "options",
    [
        ("--bits", "2", "--group-size", "32"),
        ("--bits", "5", "--group-size", "32", "--dtype", "float16"),
        ("--recipe", "mixed_3_6"),
    ],
)
def test_mlx_lm(tmp_path: Path, options: tuple[str, ...]) -> None:
    check(tmp_path, "mlx", "make_with_mlx.py", DEMO, "out", *options)


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_4_6"])
def test_mlx_lm_without_its_map_of_layers(tmp_path: Path, recipe: str) -> None:
    """mlx-lm takes bits and group size from the shapes then, and so do we."""
    found = check(tmp_path, "mlx", "make_with_mlx.py", DEMO, "out", "--recipe", recipe)
    said = found.checkpoint.config["quantization"]
    layers = [key for key, each in said.items() if isinstance(each, dict)]
    assert len({said[layer]["bits"] for layer in layers}) == 2
    top = {key: each for key, each in said.items() if key not in layers}
    half = {key: said[key] for key in layers[::2]}
    folders = []
    for number, kept in enumerate([top, {**top, **half}, {**top, "bits": 8, "group_size": 32}]):
        folders.append(tmp_path / str(number))
        shutil.copytree(tmp_path / "out", folders[-1])
        config = {**found.checkpoint.config, "quantization": kept, "quantization_config": kept}
        (folders[-1] / "config.json").write_text(json.dumps(config))
        other = bitwright.load_model(folders[-1])
        for name, shape in found.quantized_layers().items():
            np.testing.assert_array_equal(other.weight(name, shape), found.weight(name, shape))
    tokens = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=DEMO, length=64, samples=4)
    check_loads("mlx", folders, tokens)


def one_sided(folder: Path) -> Path:
    """Copy the demo model with rows that are all positive or all negative: their zeros are 0 and 15."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("v_proj.weight")]:
        weight = tensors[name].astype(np.float32)
        weight[::3], weight[1::5] = np.abs(weight[::3]), -np.abs(weight[1::5])
        tensors[name] = weight.astype(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--desc-act", "--group-size", "32"),
        ("--asymmetric",),
        ("--dynamic", '{"-:.*o_proj": {}, "+:.*down_proj": {"bits": 8, "group_size": 32}}'),
        ("--method", "awq", "--asymmetric"),
    ],
)
def test_gptqmodel(tmp_path: Path, options: tuple[str, ...]) -> None:
    model = one_sided(tmp_path / "model") if options == ("--asymmetric",) else DEMO
    found = check(tmp_path, "gptqmodel", "make_with_gptqmodel.py", model, "out", *options)
    first = found.quantized(next(iter(found.quantized_layers())))
    assert first is not None
    assert (first.group_index is not None) == ("--desc-act" in options)


@pytest.mark.parametrize(
    "options",
    [
        ("--asymmetric", "--group-size", "64", "--dtype", "float32", "--down-proj-bits", "8"),
        ("--bits", "8", "--group-size", "0"),
        ("--bits", "3"),
    ],
)
def test_compressed_tensors(tmp_path: Path, options: tuple[str, ...]) -> None:
    """The files of llm-compressor's rounding are the same to the bit; it needs an older transformers."""
    script = "make_with_compressedtensors.py"
    check(tmp_path, "gptqmodel", script, DEMO, "out", *options)


@pytest.mark.parametrize(
    "options", [("--asymmetric", "--method", "gptq"), ("--method", "gptq", "--actorder", "static")]
)
def test_llm_compressor(tmp_path: Path, options: tuple[str, ...]) -> None:
    check(tmp_path, "llmcompressor", "make_with_llmcompressor.py", DEMO, "out", *options)


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    check(tmp_path, "llamacpp", "make_with_gguf.py", DEMO, "model.gguf", "--type", kind)


@needs_shared
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_S", "Q4_K_M", "Q5_K_S", "Q6_K"])
def test_llama_cpp(tmp_path: Path, kind: str) -> None:
    model = SHARED / "models" / "small"
    check(tmp_path, "llamacpp", "make_with_llamacpp.py", model, "model.gguf", "--type", kind)


@needs_shared
def test_llama_cpp_by_our_importance_matrix(tmp_path: Path) -> None:
    """All types that only llama.cpp writes; those of one and two bits it writes by a matrix alone."""
    model = SHARED / "models" / "small"
    tokens = bitwright.load_tokens(DEMO / "evaluation.txt", tokenizer=model, length=64, samples=4)
    known = bitwright.collect_statistics(model, tmp_path / "statistics", tokens, progress=False)
    path = tmp_path / "imatrix.gguf"
    bitwright.export_imatrix(known.folder, path)
    script, options = "make_with_llamacpp.py", ("--pure", "--imatrix", str(path), "--type")
    for kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
                 "TQ1_0", "TQ2_0", "MXFP4_MOE"):  # fmt: skip
        found = check(tmp_path, "llamacpp", script, model, "model.gguf", *options, kind)
        assert (found.checkpoint.decoded_type() is None) == kind.startswith(("IQ", "MXFP4"))


def test_mixtures_of_types_are_llama_quantizes() -> None:
    """The table that tests/formats/test_gguf_mix.py compares with."""
    path = TESTS / "data" / "llama_quantize_types.json"
    known = json.loads(path.read_text())
    found = json.loads(run_client("llamacpp", "types_with_llamacpp.py", path))
    assert {key: found[key] for key in ("client", "letters", "types")} == {
        key: known[key] for key in ("client", "letters", "types")
    }
