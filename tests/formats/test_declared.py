"""Quantization configs: every spelling of the same is read, and what asks for other mathematics refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared_data import TESTS

import bitwright
from bitwright import BitwrightWarning, CheckpointError
from bitwright.formats import FORMATS

DEMO = bitwright.demo_folder()
OPTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"format": "gptq"},
    "gptq_v2": {"format": "gptq", "grid": "zero_point"},
    "awq": {"format": "awq"},
    "compressed-tensors": {"format": "compressed-tensors"},
    "mlx": {"format": "mlx"},
}
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized")
    for name, options in OPTIONS.items():
        plan = {"bits": 4, "group_size": 32, "method": "rtn", "progress": False} | options
        bitwright.quantize(DEMO, out / name, **plan)
    return out


def logits(folder: Path) -> Any:
    return bitwright.load_model(folder).logits([[1, 2, 3, 4, 5, 6, 7]])


def changed(quantized: Path, name: str, folder: Path, change: Change) -> Path:
    """Link a folder's files, with another config.json."""
    shutil.copytree(quantized / name, folder, copy_function=shutil.copy2)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def says(**values: Any) -> Change:
    """A change of settings; `...` deletes a key."""

    def change(config: dict[str, Any]) -> None:
        settings = config.get("quantization") or config["quantization_config"]
        settings |= values
        for key in [key for key, value in values.items() if value is ...]:
            del settings[key]

    return change


def moved(key: str, part: str | None = None) -> Change:
    def change(config: dict[str, Any]) -> None:
        settings = config.pop("quantization_config")
        (config if part is None else config.setdefault(part, {}))[key] = settings

    return change


def auto_round(packing: str | None, **more: Any) -> Change:
    """What auto-round writes beside the settings that it trains with."""

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"] = {
            "quant_method": "auto-round",
            "packing_format": packing,
            "bits": 4,
            "group_size": 32,
            "sym": True,
            "data_type": "int",
            "iters": 200,
            "nsamples": 128,
            "enable_quanted_input": True,
            "autoround_version": "0.16.1",
            **more,
        }

    return change


def scheme(**values: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"] |= values

    return change


def weights(**values: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= values

    return change


def layer(name: str, value: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["quantization"][name] = value

    return change


MLX_LAYER = "model.layers.0.mlp.up_proj"
ROTATED = {"config_groups": {"u": {"type": "hadamard", "apply": [{"location": "input"}]}}}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gptq", says(quant_method="GPTQ")),
        ("gptq", says(quant_method=...)),
        ("gptq", says(quant_method=..., method="gptq")),
        ("gptq", says(checkpoint_format=...)),
        ("gptq", says(checkpoint_format=None, format="GPTQ", pack_dtype="int32", meta={"a": 1})),
        ("gptq", says(desc_act=True, static_groups=True, act_group_aware=True, adapter=None)),
        ("gptq", auto_round("auto_round:auto_gptq")),
        ("gptq", auto_round("auto_round:gptq", act_bits=16, super_bits=None)),
        ("gptq", auto_round(None)),
        ("gptq_v2", says(checkpoint_format="GPTQ_V2")),
        ("gptq_v2", auto_round("auto_round:gptqmodel", sym=False)),
        ("gptq_v2", auto_round("auto_round", sym=False)),
        ("awq", says(version=None)),
        ("awq", says(version=..., format="gemm")),
        ("awq", says(version="GEMM", quant_method="AWQ", checkpoint_format="gemm", format="gemm")),
        ("awq", says(quant_method=..., backend="autoawq", w_bit=4, do_fuse=True)),
        ("awq", auto_round("auto_round:auto_awq")),
        ("awq", auto_round("AUTO_ROUND:AWQ")),
        ("compressed-tensors", says(quant_method="compressed_tensors")),
        ("compressed-tensors", says(quant_method=...)),
        ("compressed-tensors", moved("compression_config")),
        ("compressed-tensors", moved("quantization_config", "text_config")),
        ("compressed-tensors", says(config_groups={"W4A16": ["Linear"]})),
        ("compressed-tensors", says(transform_config={}, sparsity_config={"format": "dense"})),
        ("compressed-tensors", says(transform_config={"config_groups": {}})),
        ("compressed-tensors", weights(observer="mse", observer_kwargs={}, actorder="static")),
        ("mlx", layer(MLX_LAYER, {"bits": 4})),
        ("mlx", layer(MLX_LAYER, {"bits": 4, "group_size": 32, "mode": "affine"})),
    ],
)  # fmt: skip
def test_spellings_of_the_same(quantized: Path, name: str, change: Change, tmp_path: Path) -> None:
    folder = changed(quantized, name, tmp_path / "a", change)
    np.testing.assert_array_equal(logits(folder), logits(quantized / name))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("gptq", says(checkpoint_format="bitblas"), r'checkpoint_format" is \'bitblas\'; supported'),
        ("gptq", says(checkpoint_format=..., format="gptq_p"), r'format" is \'gptq_p\''),
        ("gptq", says(pack_dtype="int16"), 'pack_dtype" is'),
        ("gptq", says(adapter={"name": "lora"}), 'adapter" is'),
        ("gptq", says(rotation="hadamard"), 'rotation" is'),
        ("gptq", auto_round("auto_round:llm_compressor"), "supported are: auto_round:auto_gptq"),
        ("gptq", auto_round("auto_round:auto_gptq", act_bits=8), 'act_bits" is 8'),
        ("gptq", auto_round("auto_round:auto_gptq", data_type="mx_fp"), "data_type"),
        ("gptq", auto_round("auto_round:auto_gptq", super_bits=6), "super_bits"),
        ("gptq", says(quant_method=4), 'quant_method" is 4, but must be a string'),
        ("gptq", says(quant_method="hqq"), "quantized by 'hqq'"),
        ("awq", says(version="gemv"), r'version" is \'gemv\'; only gemm'),
        ("awq", says(version="gemm", format="gemv"), r'format" is \'gemv\'; only gemm'),
        ("awq", says(version="GEMV_fast"), "GEMV_fast"),
        ("awq", says(version=None, format="llm-awq"), "llm-awq"),
        ("awq", says(backend="llm-awq"), 'backend" is'),
        ("awq", says(bits=8), 'bits" is 8'),
        ("compressed-tensors", says(transform_config=ROTATED), 'transform_config" is'),
        ("compressed-tensors", says(sparsity_config={"format": "sparse-24-bitmask"}), "only dense"),
        ("compressed-tensors", says(format="int-quantized", config_groups={"g": {}}), "pack-quan"),
        ("compressed-tensors", says(config_groups={"W8A8": ["Linear"]}), "config_groups.W8A8"),
        ("compressed-tensors", weights(type="float"), r'group_0\.weights\.type" is \'float\''),
        ("compressed-tensors", weights(block_structure=[64, 64]), "block_structure"),
        ("mlx", says(mode="nvfp4"), r'quantization\.mode" is \'nvfp4\''),
        ("mlx", layer(MLX_LAYER, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
         rf'{MLX_LAYER}\.mode" is \'mxfp4\''),
        ("mlx", layer(MLX_LAYER, {"bits": 8, "mode": "mxfp8"}), r'up_proj\.mode" is \'mxfp8\''),
        ("mlx", layer(MLX_LAYER, {"bits": 4, "quantize_input": True}), "quantize_input"),
        ("mlx", lambda config: config.update(quantize_activations=True), "quantize_activations"),
        ("gptq", says(quant_method="Marlin", group_size=128, sym=False), 'sym" is False'),
        ("gptq", says(is_marlin_format=True, group_size=64), 'group_size" is 64; the marlin'),
    ],
)  # fmt: skip
def test_other_mathematics_is_refused(
    quantized: Path, name: str, change: Change, match: str, tmp_path: Path
) -> None:
    folder = changed(quantized, name, tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=match) as caught:
        bitwright.load_model(folder)
    assert str(caught.value).startswith(str(folder / "config.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("compressed-tensors", scheme(input_activations={"num_bits": 8, "dynamic": True}),
         r'group_0\.input_activations" rounds activations'),
        ("compressed-tensors", scheme(output_activations={"num_bits": 8}), "output_activations"),
        ("compressed-tensors", says(kv_cache_scheme={"num_bits": 8, "type": "float"}), "kv_cache"),
        ("gptq", says(mystery=3), r"not known what they change: \['mystery'\]"),
        ("awq", says(mystery=3), "mystery"),
        ("compressed-tensors", weights(mystery=3), r"group_0\.weights.*mystery"),
        ("mlx", says(mystery=3), "mystery"),
    ],
)  # fmt: skip
def test_what_engines_add_is_named(
    quantized: Path, name: str, change: Change, match: str, tmp_path: Path
) -> None:
    folder = changed(quantized, name, tmp_path / "a", change)
    with pytest.warns(BitwrightWarning, match=match):
        found = logits(folder)
    np.testing.assert_array_equal(found, logits(quantized / name))


def test_spellings_are_converted_away(quantized: Path, tmp_path: Path) -> None:
    """What another format says of the quantization is all that is left of it."""
    for name, change in (
        ("compressed-tensors", moved("compression_config")),
        ("gptq", auto_round("auto_round:auto_gptq")),
        ("awq", says(version=None)),
    ):
        folder = changed(quantized, name, tmp_path / name, change)
        report = bitwright.convert(folder, tmp_path / f"{name}-mlx", "mlx", progress=False)
        assert report.warnings == ()
        config = json.loads((tmp_path / f"{name}-mlx" / "config.json").read_text())
        assert "compression_config" not in config
        assert config["quantization"] == config["quantization_config"]


def test_a_quantized_head_is_read(tmp_path: Path) -> None:
    """GPTQModel quantizes the head where ``lm_head`` is true."""
    source, folder = TESTS / "data" / "tiny" / "llama-yarn", tmp_path / "a"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop("lm_head.weight").astype(np.float32)
    head = bitwright.quantize_rtn(
        weight, bits=4, group_size=32, grid="symmetric", scale_dtype="float16"
    )
    save_file(tensors | FORMATS["gptq"].pack("lm_head", head), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "lm_head": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    model = bitwright.load_model(folder)
    assert model.quantized_layers() == {"lm_head": weight.shape}
    np.testing.assert_array_equal(model.weight("lm_head", weight.shape), head.dequantize())


def test_inspecting_names_the_layer_and_its_mode(quantized: Path, tmp_path: Path) -> None:
    folder = changed(quantized, "mlx", tmp_path / "a", layer(MLX_LAYER, {"mode": "mxfp4"}))
    command = [sys.executable, "-m", "bitwright", "inspect", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"quantization.{MLX_LAYER}.mode\" is 'mxfp4'" in done.stderr
