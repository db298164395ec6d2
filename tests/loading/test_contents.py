"""What a folder holds is told by its tensors, whatever its config.json and its files say."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shared_data import TESTS

import bitwright
from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.reader import INDEX_NAME
from bitwright.checkpoint.shard import FLOATS_OF_8_BITS
from bitwright.errors import CheckpointError, CheckpointNotFoundError, UnsupportedModelError
from bitwright.formats.mlx import MlxFormat

TINY = TESTS / "data" / "tiny"
IDS = [[1, 5, 9, 20, 31, 7]]
Arrays = dict[str, Any]
Change = Callable[[dict[str, Any]], Any] | None


def changed(source: Path, target: Path, config: Change = None, tensors: Change = None) -> Path:
    """Copy a model, its config.json changed by one function and its tensors by another."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and file.name != "config.json":
            shutil.copy(file, target)
    settings = json.loads((source / "config.json").read_text())
    arrays = load_file(source / "model.safetensors")
    if config:
        config(settings)
    if tensors:
        arrays = tensors(arrays) or arrays
    (target / "config.json").write_text(json.dumps(settings))
    save_file(arrays, target / "model.safetensors")
    return target


def quantized(source: Path, out: Path, format: Any = "mlx", **options: Any) -> Path:
    options = {"method": "rtn", "group_size": 32, "progress": False, **options}
    bitwright.quantize(source, out, format=format, **options)
    return out


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def names_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return set(file.keys())


def logits(folder: Path) -> Any:
    return bitwright.load_model(folder).logits(IDS)


def silent(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


# A head that is not the embedding.

TIED = {
    "llama-biases": "model",
    "smollm3": "model",
    "gemma2": "model",
    "gemma3": "language_model.model",
}


def add_head(arrays: Arrays, base: str, noise: float, dtype: Any = None) -> None:
    embedding = arrays[f"{base}.embed_tokens.weight"]
    rng = np.random.default_rng(0)
    head = embedding.astype(np.float32) + noise * rng.standard_normal(embedding.shape)
    outer = base.removesuffix("model")
    arrays[f"{outer}lm_head.weight"] = head.astype(dtype or embedding.dtype)


def untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = False


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_is_used_and_written(name: str, tmp_path: Path) -> None:
    base = TIED[name]

    def both(arrays: Arrays) -> None:
        add_head(arrays, base, 0.1)

    folder = changed(TINY / name, tmp_path / "tied", None, both)
    twin = changed(TINY / name, tmp_path / "untied", untie, both)
    with pytest.warns(
        bitwright.BitwrightWarning, match="head.* differs.*what is written says false"
    ):
        found = logits(folder)
    assert np.array_equal(found, logits(twin))
    assert np.abs(found - logits(TINY / name)).max() > 0.01
    format = "compressed-tensors" if name == "gemma2" else "mlx"
    skip = ["*self_attn*"]  # a few are too narrow for groups of 32
    with pytest.warns(bitwright.BitwrightWarning, match="differs"):
        quantized(folder, tmp_path / "out", format, exclude=skip)
    quantized(twin, tmp_path / "expected", format, exclude=skip)
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", config)["tie_word_embeddings"] is False
    for file in ("model.safetensors", "config.json"):
        one, other = (json.loads if file == "config.json" else bytes, Path.read_bytes)
        assert one(other(tmp_path / "out" / file)) == one(other(tmp_path / "expected" / file))


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("dtype", [None, np.float64])
def test_an_equal_head_stays_tied(name: str, dtype: Any, tmp_path: Path) -> None:
    folder = changed(
        TINY / name, tmp_path / "in", None, lambda arrays: add_head(arrays, TIED[name], 0, dtype)
    )
    model = silent(lambda: bitwright.load_model(folder))
    assert model.tied
    assert np.array_equal(model.logits(IDS), logits(TINY / name))
    out = silent(lambda: quantized(folder, tmp_path / "out", exclude=["*self_attn*"]))
    assert not [each for each in names_of(out) if "lm_head" in each]
    assert config_of(out) == config_of(
        quantized(TINY / name, tmp_path / "b", exclude=["*self_attn*"])
    )


def two_matrices(folder: Path) -> Path:
    """The demo model with a head of its own."""
    return changed(
        bitwright.demo_folder(), folder, untie, lambda arrays: add_head(arrays, "model", 0.1)
    )


def tie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_quantized_head_that_differs_is_used(bits: int, tmp_path: Path) -> None:
    """Written by our own tool as two matrices, and called tied by whoever came after."""
    source = two_matrices(tmp_path / "in")
    out = quantized(source, tmp_path / "out", bits=bits, embedding_bits=bits, head_bits=bits)
    folder = changed(out, tmp_path / "tied", tie)
    with pytest.warns(bitwright.BitwrightWarning, match="differs"):
        found = logits(folder)
    assert np.array_equal(found, logits(out))


@pytest.mark.parametrize("format", ["gguf", "gptq", "float"])
def test_other_formats_get_the_head_too(format: Any, tmp_path: Path) -> None:
    source = two_matrices(tmp_path / "in")
    folder = changed(source, tmp_path / "tied", tie)
    call: Any = bitwright.convert if format == "float" else quantized
    options: Any = {"progress": False} if format == "float" else {}
    with pytest.warns(bitwright.BitwrightWarning, match="differs"):
        call(folder, tmp_path / "out", format, **options)
    call(source, tmp_path / "expected", format, **options)
    assert not bitwright.load_model(tmp_path / "out").tied
    assert np.array_equal(logits(tmp_path / "out"), logits(tmp_path / "expected"))
    if format != "gguf":
        assert config_of(tmp_path / "out") == config_of(tmp_path / "expected")


@pytest.mark.parametrize("name", ["llama-llama3", "qwen2", "granite"])
def test_a_head_that_is_nowhere_is_an_error(name: str, tmp_path: Path) -> None:
    def headless(arrays: Arrays) -> Arrays:
        return {each: array for each, array in arrays.items() if each != "lm_head.weight"}

    folder = changed(TINY / name, tmp_path / "in", None, headless)
    with pytest.raises(CheckpointError, match=r'no lm_head.weight.*"tie_word_embeddings": true'):
        bitwright.load_model(folder)


@pytest.mark.parametrize(
    ("name", "tied"), [("gemma2", False), ("glm4", True), ("deepseek_v3", True)]
)
def test_mlx_is_refused_where_mlx_lm_has_no_such_head(
    name: str, tied: bool, tmp_path: Path
) -> None:
    def change(arrays: Arrays) -> Any:
        if tied:
            return {each: array for each, array in arrays.items() if each != "lm_head.weight"}
        return add_head(arrays, "model", 0.1)

    folder = changed(TINY / name, tmp_path / "in", tie if tied else untie, change)
    with pytest.raises(ValueError, match=f"mlx-lm knows {name} only with"):
        quantized(folder, tmp_path / "out", exclude=["*self_attn*"])
    assert not (tmp_path / "out").exists()


# Names.

PREFIXES = ["", "language_model.", "language_model.model.", "model.language_model.", "model.model."]


def under(prefix: str) -> Change:
    def rename(arrays: Arrays) -> Arrays:
        renamed = {}
        for name, array in arrays.items():
            inner = name.removeprefix("model.")
            head = "language_model." if prefix == "language_model.model." else ""
            renamed[prefix + inner if inner != name else head + name] = array
        return renamed

    return rename


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["llama-llama3", "qwen3_moe", "smollm3"])
def test_a_decoder_is_found_under_any_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    folder = changed(TINY / name, tmp_path / "in", None, under(prefix))
    assert np.array_equal(silent(lambda: logits(folder)), logits(TINY / name))
    skip = ["*self_attn*"]
    for format in ("mlx", "gptq"):
        out = quantized(folder, tmp_path / format, format, exclude=skip)
        expected = quantized(TINY / name, tmp_path / f"{format}-b", format, exclude=skip)
        for file in ("model.safetensors", "config.json"):
            assert (out / file).read_bytes() == (expected / file).read_bytes()


GEMMA3 = {
    "": lambda name: name.removeprefix("language_model.model."),
    "model.": lambda name: name.replace("language_model.model.", "model."),
    "model.language_model.": lambda name: (
        name.replace("language_model.model.", "model.language_model.")
        if name.startswith("language_model")
        else f"model.{name}"
    ),
}


@pytest.mark.parametrize("prefix", GEMMA3)
def test_a_multimodal_decoder_is_written_as_its_engines_name_it(
    prefix: str, tmp_path: Path
) -> None:
    """mlx-lm wants language_model.model, beside a vision_tower that is not within model."""
    rename = GEMMA3[prefix]
    folder = changed(
        TINY / "gemma3",
        tmp_path / "in",
        None,
        lambda arrays: {rename(n): a for n, a in arrays.items()},
    )
    assert np.array_equal(silent(lambda: logits(folder)), logits(TINY / "gemma3"))
    out = quantized(folder, tmp_path / "out", exclude=["*self_attn*"])
    expected = quantized(TINY / "gemma3", tmp_path / "b", exclude=["*self_attn*"])
    assert names_of(out) == names_of(expected)
    assert any(each.startswith("vision_tower.") for each in names_of(out))


NESTED = {
    "language_model.model.": "language_model.lm_head",
    "model.language_model.": "lm_head",
    "model.": "lm_head",
}


@pytest.mark.parametrize("prefix", NESTED)
@pytest.mark.parametrize(
    ("outer", "name"), [("llava", "llama-llama3"), ("vipllava", "mistral"), ("internvl", "qwen2")]
)
def test_a_text_part_is_its_family(outer: str, name: str, prefix: str, tmp_path: Path) -> None:
    """Under any prefix it is computed and quantized as by itself, and the rest is carried along."""
    tower = {"vision_tower.layers.0.up_proj.weight": np.ones((8, 8), np.float32)}

    def within(arrays: Arrays) -> Arrays:
        renamed = {
            NESTED[prefix] + each[7:] if each.startswith("lm_head") else prefix + each[6:]: array
            for each, array in arrays.items()
        }
        return renamed | tower

    def wrapped(config: dict[str, Any]) -> None:
        text = {key: config.pop(key) for key in list(config)}
        config |= {"model_type": outer, "text_config": text, "vision_config": {}}
        config["tie_word_embeddings"] = text.get("tie_word_embeddings", False)

    folder = changed(TINY / name, tmp_path / "in", wrapped, within)
    assert np.array_equal(silent(lambda: logits(folder)), logits(TINY / name))
    out = quantized(folder, tmp_path / "out", "compressed-tensors", scale_dtype="float32")
    expected = quantized(TINY / name, tmp_path / "b", "compressed-tensors", scale_dtype="float32")
    assert np.array_equal(logits(out), logits(expected))
    carried = load_file(out / "model.safetensors")
    for each, array in tower.items():
        assert np.array_equal(carried[each], array)


@pytest.mark.parametrize("format", ["mlx", "gptq", "awq", "compressed-tensors"])
def test_quantized_layers_are_found_under_other_prefixes(format: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if format == "awq" else {"overrides": {"*.0.mlp.*": {"bits": 8}}}
    folder = quantized(bitwright.demo_folder(), tmp_path / "q", format, **options)
    expected = logits(folder)

    def rename_keys(config: dict[str, Any]) -> None:
        for key in ("quantization", "quantization_config"):
            settings = config.get(key, {})
            config[key] = {each.removeprefix("model."): value for each, value in settings.items()}
            if not settings:
                del config[key]

    bare = changed(folder, tmp_path / "bare", rename_keys, under(""))
    assert np.array_equal(silent(lambda: logits(bare)), expected)
    bitwright.convert(bare, tmp_path / "float", "float", progress=False)
    assert np.array_equal(logits(tmp_path / "float"), expected)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_options_of_formats_are_no_names_of_layers(format: Any, tmp_path: Path) -> None:
    """GPTQ's lm_head says whether the head is quantized; what is written is opened without a word."""

    def own_head(arrays: Arrays) -> Arrays:
        embedding = arrays["language_model.model.embed_tokens.weight"]
        return {**arrays, "language_model.lm_head.weight": embedding[::-1].copy()}

    folder = changed(TINY / "gemma3", tmp_path / "in", untie, own_head)
    out = tmp_path / "out"
    bitwright.quantize(folder, out, "rtn", 4, 32, format=format, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = bitwright.load_model(out).checkpoint.config["quantization_config"]
    assert read == json.loads((out / "config.json").read_text())["quantization_config"]


def test_two_decoders_and_two_tensors_of_one_name_are_errors(tmp_path: Path) -> None:
    def twice(arrays: Arrays) -> Arrays:
        inner = {n.removeprefix("model."): a for n, a in arrays.items() if n.startswith("model.")}
        return {f"{place}.{n}": a for place in ("thinker", "talker") for n, a in inner.items()}

    folder = changed(TINY / "llama-llama3", tmp_path / "two", None, twice)
    with pytest.raises(CheckpointError, match=r"several decoders, 'talker\.', 'thinker\.'"):
        bitwright.load_model(folder)

    def both(arrays: Arrays) -> Arrays:
        bare = under("")(arrays)  # type: ignore[misc]
        return {**bare, "model.layers.1.mlp.up_proj.weight": bare["layers.1.mlp.up_proj.weight"]}

    folder = changed(TINY / "llama-llama3", tmp_path / "both", None, both)
    with pytest.raises(CheckpointError, match="under that name and under another"):
        bitwright.load_model(folder)


# Quantization that is declared, and tensors that are not it.

LEFTOVERS: dict[str, dict[str, Any]] = {
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
}


@pytest.mark.parametrize("method", LEFTOVERS)
@pytest.mark.parametrize("format", ["mlx", "gptq"])
def test_quantization_of_floats_is_not_believed(method: str, format: Any, tmp_path: Path) -> None:
    demo = bitwright.demo_folder()
    folder = changed(demo, tmp_path / "in", lambda config: config.update(LEFTOVERS[method]))
    with pytest.warns(
        bitwright.BitwrightWarning, match="config.json.*all of them are floats"
    ) as found:
        report = bitwright.quantize(
            folder, tmp_path / "out", "rtn", format=format, group_size=32, progress=False
        )
    assert len(found) == len(report.warnings) == 1
    expected = quantized(demo, tmp_path / "expected", format)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (expected / file).read_bytes()


def test_a_settings_file_beside_floats_is_not_believed(tmp_path: Path) -> None:
    folder = changed(bitwright.demo_folder(), tmp_path / "in")
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.warns(bitwright.BitwrightWarning, match="quantize_config.json says"):
        assert np.array_equal(logits(folder), logits(bitwright.demo_folder()))


def test_quantization_of_a_text_part_is_not_believed_either(tmp_path: Path) -> None:
    folder = changed(
        TINY / "gemma3",
        tmp_path / "in",
        lambda config: config["text_config"].update(quantization_config=LEFTOVERS["fp8"]),
    )
    with pytest.warns(bitwright.BitwrightWarning, match="all of them are floats"):
        out = quantized(folder, tmp_path / "out", exclude=["*self_attn*"])
    assert config_of(out) == config_of(
        quantized(TINY / "gemma3", tmp_path / "b", exclude=["*self_attn*"])
    )


def test_settings_of_a_text_part_are_read(tmp_path: Path) -> None:
    out = quantized(TINY / "gemma3", tmp_path / "out", "gptq", exclude=["*self_attn*"])

    def inward(config: dict[str, Any]) -> None:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")

    assert np.array_equal(logits(changed(out, tmp_path / "in", inward)), logits(out))


def as_fp8(arrays: Arrays) -> None:
    for name in [each for each in arrays if each.endswith("_proj.weight")]:
        arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)
        arrays[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)


def test_scaled_floats_that_are_declared_as_codes_are_refused(tmp_path: Path) -> None:
    declared = LEFTOVERS["gptq"]
    folder = changed(
        bitwright.demo_folder(), tmp_path / "in", lambda config: config.update(declared), as_fp8
    )
    with pytest.raises(CheckpointError, match="fp8"):
        bitwright.load_model(folder)


@pytest.mark.parametrize(
    ("format", "other"),
    [
        ("gptq", "awq"),
        ("awq", "gptq"),
        ("mlx", "compressed-tensors"),
        ("compressed-tensors", "mlx"),
    ],
)
def test_tensors_of_another_format_are_an_error(format: Any, other: Any, tmp_path: Path) -> None:
    demo = bitwright.demo_folder()
    folder = quantized(demo, tmp_path / "in", format)
    shutil.copy(quantized(demo, tmp_path / "other", other) / "config.json", folder)
    message = f"declares the {other} format, but tensor .* is packed as {format}"
    with pytest.raises(CheckpointError, match=message):
        bitwright.load_model(folder)


# Files of older tools.

OLD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gptq of AutoGPTQ 0.2": (
        "gptq",
        "quantize_config.json",
        {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True},
    ),
    "gptq of AutoGPTQ 0.7": (
        "gptq",
        "quantize_config.json",
        {
            "bits": 4,
            "group_size": 32,
            "damp_percent": 0.1,
            "desc_act": False,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "is_marlin_format": False,
            "quant_method": "gptq",
        },
    ),
    "gptq v2": (
        "gptq",
        "quantize_config.json",
        {"bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    ),
    "awq of AutoAWQ": (
        "awq",
        "quant_config.json",
        {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
    ),
    "awq of llm-awq": ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 32}),
    "awq of AutoGPTQ": (
        "awq",
        "quantize_config.json",
        {"bits": 4, "group_size": 32, "quant_method": "awq", "checkpoint_format": "awq_gemm"},
    ),
    "awq of GPTQModel": (
        "awq",
        "quantize_config.json",
        {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "sym": False},
    ),
    "marlin of AutoGPTQ": (
        "marlin",
        "quantize_config.json",
        {"bits": 4, "group_size": 128, "is_marlin_format": True, "quant_method": "gptq"},
    ),
}


def large(folder: Path) -> Path:
    """A model with multiples of 128 channels."""
    rng = np.random.default_rng(0)
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    shapes = {f"self_attn.{each}_proj": (128, 128) for each in "qkvo"}
    shapes |= {"mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256)}
    arrays = {
        f"model.layers.0.{name}.weight": rng.standard_normal(shape) / 8
        for name, shape in shapes.items()
    }
    norms = ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm")
    arrays |= {f"model.{name}.weight": np.ones(128) for name in norms}
    arrays["model.embed_tokens.weight"] = rng.standard_normal((64, 128))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: a.astype(np.float32) for n, a in arrays.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", OLD)
def test_files_of_older_tools_are_read(kind: str, tmp_path: Path) -> None:
    format, name, settings = OLD[kind]
    options: dict[str, Any] = {"group_size": settings.get("group_size", 32)}
    if settings.get("checkpoint_format") == "gptq_v2":
        options["grid"] = "zero_point"
    new = quantized(large(tmp_path / "float"), tmp_path / "new", format, **options)
    old = changed(new, tmp_path / "old", lambda config: config.pop("quantization_config"))
    (old / name).write_text(json.dumps(settings))
    assert np.array_equal(silent(lambda: logits(old)), logits(new))
    bitwright.convert(old, tmp_path / "mlx", "mlx", progress=False)
    bitwright.convert(new, tmp_path / "mlx-b", "mlx", progress=False)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "mlx" / file).read_bytes() == (tmp_path / "mlx-b" / file).read_bytes()


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_packed_tensors_that_nothing_explains_are_an_error(format: Any, tmp_path: Path) -> None:
    folder = quantized(bitwright.demo_folder(), tmp_path / "q", format)
    bare = changed(folder, tmp_path / "in", lambda config: config.pop("quantization_config"))
    with pytest.raises(UnsupportedModelError, match=f"packed as {format}, but neither config.json"):
        bitwright.load_model(bare)


def test_mlx_settings_are_found_where_model_hubs_look(tmp_path: Path) -> None:
    folder = quantized(
        bitwright.demo_folder(), tmp_path / "q", overrides={"*.up_proj": {"bits": 6}}
    )
    only = changed(folder, tmp_path / "in", lambda config: config.pop("quantization"))
    with pytest.warns(bitwright.BitwrightWarning, match="so mlx-lm refuses the folder"):
        found = logits(only)
    assert np.array_equal(found, logits(folder))


def absorbed(name: str, bits: int | None) -> Change:
    """Split the matrix of keys and values as mlx-lm does, and quantize both stacks in groups of 16."""
    config = config_of(TINY / name)
    plain, heads = config["qk_nope_head_dim"], config["num_attention_heads"]

    def split(arrays: Arrays) -> None:
        for tensor in [each for each in arrays if each.endswith("kv_b_proj.weight")]:
            matrix = arrays.pop(tensor)
            parts = matrix.reshape(heads, -1, matrix.shape[1])
            stacks = {"embed_q": parts[:, :plain].swapaxes(1, 2), "unembed_out": parts[:, plain:]}
            for stack, each in stacks.items():
                layer = tensor.replace("kv_b_proj.weight", stack)
                if bits is None:
                    arrays[f"{layer}.weight"] = np.ascontiguousarray(each)
                    continue
                rounded = [
                    bitwright.quantize_rtn(np.ascontiguousarray(head, np.float32), bits, 16)
                    for head in each
                ]
                for end in ("weight", "scales", "biases"):
                    packed = [MlxFormat.pack("x", head)[f"x.{end}"] for head in rounded]
                    arrays[f"{layer}.{end}"] = np.stack(packed)
                stacks[stack] = np.stack([head.dequantize() for head in rounded])
            if bits is not None:
                joined = (stacks["embed_q"].swapaxes(1, 2), stacks["unembed_out"])
                EXPECTED[tensor] = np.concatenate(joined, axis=1).reshape(matrix.shape)

    return split


EXPECTED: Arrays = {}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3-qlora"])
def test_absorbed_keys_and_values_are_one_matrix(
    name: str, bits: int | None, tmp_path: Path
) -> None:
    EXPECTED.clear()

    def declare(config: dict[str, Any]) -> None:
        if bits:
            own = {"model.layers.0.self_attn.embed_q": {"bits": bits, "group_size": 16}}
            config["quantization"] = {"bits": bits, "group_size": 16, **own}

    folder = changed(TINY / name, tmp_path / "in", declare, absorbed(name, bits))
    twin = changed(TINY / name, tmp_path / "twin", None, lambda arrays: {**arrays, **EXPECTED})
    assert np.array_equal(silent(lambda: logits(folder)), logits(twin))
    assert silent(lambda: bitwright.load_model(folder)).unused() == []
    options: dict[str, Any] = {"exclude": ["*self_attn*"], "allow_requantize": True}
    out = quantized(folder, tmp_path / "out", **options)
    assert names_of(out) == names_of(quantized(TINY / name, tmp_path / "b", **options))
    assert "model.layers.0.self_attn.embed_q" not in config_of(out)["quantization"]


def test_mlx_keeps_the_matrix_of_latent_keys_and_values_in_float(tmp_path: Path) -> None:
    """mlx-lm would round it a second time."""
    name = "model.layers.0.self_attn.kv_b_proj"
    skip = ["*self_attn.o_proj", "*self_attn.q*"]
    for model in ("deepseek_v3", "deepseek_v3-qlora"):
        out = quantized(TINY / model, tmp_path / model, exclude=skip)
        assert bitwright.load_model(out).quantized(name) is None
    other = quantized(TINY / "deepseek_v3", tmp_path / "ct", "compressed-tensors", exclude=skip)
    assert bitwright.load_model(other).quantized(name) is not None
    bitwright.convert(other, tmp_path / "mlx", "mlx", progress=False, allow_requantize=True)
    assert bitwright.load_model(tmp_path / "mlx").quantized(name) is None


# Files and their index.


def sharded(folder: Path) -> dict[str, str]:
    """Split a folder's weights into two files with an index; return which tensor lies where."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, each in files.items():
        save_file({name: arrays[name] for name in each}, folder / file)
    weight_map = {name: file for file, each in files.items() for name in each}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("extra", ["consolidated.safetensors", "model.safetensors", "other"])
def test_the_index_alone_decides_where_tensors_are(extra: str, tmp_path: Path) -> None:
    source = TINY / "llama-llama3"
    folder = changed(source, tmp_path / "in")
    weight_map = sharded(folder)
    name = next(iter(weight_map))
    if extra == "other":  # a copy in the file of other tensors
        extra = next(file for file in weight_map.values() if file != weight_map[name])
        arrays = load_file(folder / extra)
    else:
        arrays = load_file(source / "model.safetensors")
    arrays[name] = np.zeros_like(load_file(source / "model.safetensors")[name])
    save_file(arrays, folder / extra)
    assert np.array_equal(silent(lambda: logits(folder)), logits(source))


@pytest.mark.parametrize("lost", [[0], [1], [0, 1]])
def test_a_whole_file_beside_an_index_of_lost_files_is_named(
    lost: list[int], tmp_path: Path
) -> None:
    source = TINY / "llama-llama3"
    folder = changed(source, tmp_path / "in")
    files = sorted(set(sharded(folder).values()))
    for each in lost:
        (folder / files[each]).unlink()
    with pytest.raises(CheckpointNotFoundError, match="the weight file is missing"):
        bitwright.load_model(folder)
    shutil.copy(source / "model.safetensors", folder)
    message = f"{files[lost[0]]}: .* model.safetensors beside it holds 21 of the 21 tensors.*remove"
    with pytest.raises(CheckpointNotFoundError, match=message):
        bitwright.load_model(folder)


# Dtypes.

DTYPES = {"F64": np.dtype(np.float64), **FLOATS_OF_8_BITS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama-llama3", "qwen3_moe", "smollm3"])
def test_any_float_is_read_as_the_number_it_is(name: str, dtype: str, tmp_path: Path) -> None:
    stored: Arrays = {}

    def cast(arrays: Arrays) -> Arrays:
        stored.update({n: a.astype(np.float32).astype(DTYPES[dtype]) for n, a in arrays.items()})
        return stored

    def as_floats(_: Arrays) -> Arrays:
        return {n: a.astype(np.float32) for n, a in stored.items()}

    def undeclared(config: dict[str, Any]) -> None:
        config.pop("torch_dtype", None)
        config["dtype"] = {"F64": "float64", "F8_E4M3": "float8_e4m3fn"}.get(dtype)

    folder = changed(TINY / name, tmp_path / "in", undeclared, cast)
    twin = changed(TINY / name, tmp_path / "twin", undeclared, as_floats)
    assert np.array_equal(silent(lambda: logits(folder)), logits(twin))
    with Checkpoint(folder) as checkpoint:
        for each, array in stored.items():
            assert checkpoint.read(each).tobytes() == array.tobytes()
            assert checkpoint.read_rows(each, 1, 3).tobytes() == array[1:3].tobytes()
    out = quantized(folder, tmp_path / "out", exclude=["*self_attn*"], scale_dtype="float32")
    written = quantized(twin, tmp_path / "b", exclude=["*self_attn*"], scale_dtype="float32")
    assert np.array_equal(logits(out), logits(written))
    kept = "float32" if dtype == "F64" else "bfloat16"  # what mlx loads
    found = {str(each.dtype) for each in load_file(out / "model.safetensors").values()}
    assert found == {kept, "float32", "uint32"}
    assert config_of(out)["dtype"] in (kept, None)


@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS)
def test_parts_of_stacks_of_8_bits_are_read(dtype: str, tmp_path: Path) -> None:
    stack = np.arange(2 * 6 * 4).reshape(2, 6, 4).astype(FLOATS_OF_8_BITS[dtype])
    scalar = np.array(2, FLOATS_OF_8_BITS[dtype])
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {"a": np.ones(3, np.float64), "s": stack, "x": scalar}, tmp_path / "model.safetensors"
    )
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_part("s", 1).tobytes() == stack[1].tobytes()
        assert checkpoint.read_part("s", 1, slice(3, None)).tobytes() == stack[1, 3:].tobytes()
        assert checkpoint.read("x").tobytes() == scalar.tobytes()
        assert checkpoint.read("x").shape == ()


# Tensors that nothing computes with.

DEMO_LAYERS = 3


def more_layers(arrays: Arrays) -> None:
    for name in [each for each in arrays if each.startswith("model.layers.0.")]:
        arrays[name.replace("layers.0", f"layers.{DEMO_LAYERS}")] = arrays[name]
    arrays[f"model.layers.{DEMO_LAYERS}.eh_proj.weight"] = np.ones((4, 8), np.float32)


def mtp(arrays: Arrays) -> None:
    for name in [each for each in arrays if each.startswith("model.layers.0.")]:
        arrays[name.replace("model.", "mtp.")] = arrays[name]
    arrays["mtp.norm.weight"] = arrays["model.norm.weight"]


def denied_bias(arrays: Arrays) -> None:
    arrays["model.layers.1.self_attn.q_proj.bias"] = np.ones(64, np.float32)


def score(arrays: Arrays) -> None:
    arrays["score.weight"] = np.ones((2, 64), np.float32)


def adapter(arrays: Arrays) -> None:
    arrays["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.ones((2, 64), np.float32)


def vision(arrays: Arrays) -> None:
    arrays["vision_tower.patch.weight"] = np.ones((2, 64), np.float32)


UNUSED: dict[str, tuple[Callable[[Arrays], None], str]] = {
    "more layers": (more_layers, "layers beyond num_hidden_layers"),
    "mtp": (mtp, "multi-token prediction"),
    "bias": (denied_bias, "biases that config.json denies"),
    "score": (score, "a head that classifies"),
    "adapter": (adapter, "an adapter that was not merged"),
    "vision": (vision, "images or sound"),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_tensors_that_nothing_computes_with_are_named_once(kind: str, tmp_path: Path) -> None:
    add, words = UNUSED[kind]
    demo = bitwright.demo_folder()
    folder = changed(demo, tmp_path / "in", None, add)
    extra = names_of(folder) - names_of(demo)
    message = re.escape(f"nothing computes with {len(extra)} of the tensors: {sorted(extra)[0]!r}")
    calls: list[Callable[[], Any]] = [
        lambda: bitwright.inspect_model(folder),
        lambda: bitwright.evaluate(folder, np.array(IDS)),
        *(
            lambda format=format: bitwright.quantize(
                folder, tmp_path / format, "rtn", format=format, group_size=32, progress=False
            )
            for format in ("mlx", "gptq", "gguf")
        ),
    ]
    for call in calls:
        with pytest.warns(bitwright.BitwrightWarning, match=message) as found:
            report = call()
        assert len(found) == 1
        assert len(report.warnings) == 1
        assert words in report.warnings[0]
        assert "\n" not in report.warnings[0]
    assert np.array_equal(logits(folder), logits(demo))
    expected = quantized(demo, tmp_path / "expected")
    for file in ("model.safetensors", "config.json"):  # mlx-lm refuses what it does not know
        assert (tmp_path / "mlx" / file).read_bytes() == (expected / file).read_bytes()
    assert extra <= names_of(tmp_path / "gptq")  # transformers does not
    assert np.array_equal(
        logits(tmp_path / "gguf"), logits(quantized(demo, tmp_path / "b", "gguf"))
    )
    with pytest.warns(bitwright.BitwrightWarning, match=message):
        bitwright.convert(tmp_path / "gptq", tmp_path / "converted", "mlx", progress=False)
    in_float = quantized(demo, tmp_path / "in_float", float_embeddings=True)  # as gptq has them
    assert names_of(tmp_path / "converted") == names_of(in_float)


def zero_biases(arrays: Arrays) -> None:
    """As AutoGPTQ has written them for every linear."""
    for name in [each for each in arrays if each.endswith("_proj.weight")]:
        arrays[name.replace("weight", "bias")] = np.zeros(len(arrays[name]), np.float32)


def frequencies(arrays: Arrays) -> None:
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)


@pytest.mark.parametrize("add", [zero_biases, frequencies])
def test_harmless_tensors_are_no_reason_to_warn(
    add: Callable[[Arrays], None], tmp_path: Path
) -> None:
    demo = bitwright.demo_folder()
    folder = changed(demo, tmp_path / "in", None, add)
    silent(lambda: bitwright.inspect_model(folder))
    silent(lambda: bitwright.evaluate(folder, np.array(IDS)))
    out = silent(lambda: quantized(folder, tmp_path / "out"))
    assert names_of(out) == names_of(quantized(demo, tmp_path / "expected"))


def test_parts_of_multimodal_models_are_no_reason_to_warn(tmp_path: Path) -> None:
    silent(lambda: bitwright.inspect_model(TINY / "gemma3"))
    out = silent(lambda: quantized(TINY / "gemma3", tmp_path / "out", exclude=["*self_attn*"]))
    vision = {each for each in names_of(TINY / "gemma3") if not each.startswith("language_model")}
    assert vision
    assert vision <= names_of(out)


@pytest.mark.parametrize("folder", sorted(TINY.iterdir()), ids=lambda folder: folder.name)
def test_sound_models_are_opened_without_a_word(folder: Path) -> None:
    model = silent(lambda: bitwright.load_model(folder))
    assert model.unused() == []
