"""Sound files of every kind that is read, made once: small ones, so that changes hit what matters."""

import io
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from shared_data import TESTS
from tokenizers import Tokenizer, models, pre_tokenizers

import bitwright
from bitwright.checkpoint.gguf_file import (
    BLOCKS,
    DECODED,
    Header,
    TensorInfo,
    tensor_offsets,
    write_header,
)
from bitwright.checkpoint.shard import DTYPES
from bitwright.checkpoint.writer import CheckpointWriter, write_safetensors
from bitwright.files.replacing import write_json
from bitwright.statistics.imatrix import Importance, ImportanceMatrix

Files = Mapping[str, bytes]
DEMO = bitwright.demo_folder()
WIDTH = 256  # the least that every format can hold


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix not in (".npz", ".txt", ".md") and path.name != "report.json"
    }


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sound-") as scratch:
        yield Path(scratch)


@contextmanager
def _written(files: Files) -> Iterator[Path]:
    """A folder with these files, in one where there is nothing else."""
    with _scratch() as scratch:
        folder = scratch / "source"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder


@cache
def families() -> dict[str, Files]:
    """One model of each family."""
    return {path.name: _content(path) for path in sorted((TESTS / "data" / "tiny").iterdir())}


@cache
def shards() -> dict[str, Files]:
    """A model in several files."""
    with _scratch() as scratch, bitwright.Checkpoint(TESTS / "data/tiny/llama-llama3") as source:
        with CheckpointWriter(scratch / "out", shard_bytes=50_000) as writer:
            for name in source.names():
                writer.add(name, source.read(name))
            writer.write_json("config.json", source.config)
        return {"three files": _content(scratch / "out")}


@cache
def wide() -> Files:
    """A model of one block that every format can hold, with the demo's tokenizer."""
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "dtype": "float16",
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (512, WIDTH), "norm": (WIDTH,)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"layers.0.{name}"] = (WIDTH,)
    for name, rows in (("q", WIDTH), ("k", WIDTH // 4), ("v", WIDTH // 4), ("o", WIDTH)):
        shapes[f"layers.0.self_attn.{name}_proj"] = (rows, WIDTH)
    for name in ("gate", "up", "down"):
        shapes[f"layers.0.mlp.{name}_proj"] = (WIDTH, WIDTH)
    random = np.random.default_rng(0)
    with _scratch() as folder:
        write_json(folder / "config.json", config)
        tensors = {
            f"model.{name}.weight": (random.standard_normal(shape) / 16).astype(np.float16)
            for name, shape in shapes.items()
        }
        write_safetensors(folder / "model.safetensors", tensors, {})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((DEMO / name).read_bytes())
        return _content(folder)


FORMATS: dict[str, dict[str, Any]] = {
    "mlx": {"format": "mlx", "bits": 3, "group_size": 64, "embedding_bits": 6},
    "gptq": {"format": "gptq", "bits": 4, "group_size": 128},
    "gptq_v2": {"format": "gptq", "bits": 3, "group_size": 32, "grid": "zero_point"},
    "awq": {"format": "awq", "group_size": 64},
    "compressed-tensors": {"format": "compressed-tensors", "bits": 8, "group_size": None},
    "compressed-tensors with zeros": {"format": "compressed-tensors", "grid": "zero_point"},
    "marlin": {"format": "marlin", "group_size": 128},
    "marlin of whole rows": {"format": "marlin", "group_size": None},
}


EIGHT_BITS = {"format": "gguf", "bits": 8, "grid": "symmetric"}


def _quantized(options: Mapping[str, Any], files: Files | None = None) -> Files:
    with _written(files or wide()) as source:
        bitwright.quantize(source, source.with_name("out"), "rtn", progress=False, **options)
        return _content(source.with_name("out"))


@cache
def packed() -> dict[str, Files]:
    """One model in every format of safetensors files, and one with stacked experts."""
    made = {name: _quantized(options) for name, options in FORMATS.items()}
    experts = _quantized({"group_size": 32}, families()["qwen3_moe"])
    return made | {"mlx with experts": experts}


def read_safetensors(content: bytes) -> dict[str, tuple[str, Iterable[int], bytes]]:
    """Return dtype, shape and data of each tensor."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: (each["dtype"], each["shape"], data[slice(*each["data_offsets"])])
        for name, each in header.items()
    }


def safetensors_file(tensors: Mapping[str, tuple[str, Iterable[int], bytes]]) -> bytes:
    """Return a sound safetensors file."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        begin, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    data = b"".join(each[2] for each in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def read_gguf(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a GGUF file says of itself, and its tensors as they are stored."""
    header = Header(io.BytesIO(content), Path("model.gguf"))
    return header.metadata, {
        name: np.frombuffer(content, info.dtype, math.prod(info.shape), place).reshape(info.shape)
        for name, (info, place) in header.tensors.items()
    }


def gguf_file(values: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    """Return a GGUF file."""
    infos = [TensorInfo(name, each.dtype, each.shape) for name, each in tensors.items()]
    out = io.BytesIO()
    start = write_header(out, values, infos)
    for place, each in zip(tensor_offsets(infos), tensors.values(), strict=False):
        out.write(bytes(start + place - out.tell()))
        out.write(each.tobytes())
    return out.getvalue()


def _only_the_second_block(content: bytes) -> bytes:
    return safetensors_file(
        {
            name.replace(".layers.1.", ".layers.0."): tensor
            for name, tensor in read_safetensors(content).items()
            if ".layers.0." not in name
        }
    )


def _in_two_parts(values: Mapping[str, Any], tensors: Mapping[str, Any]) -> Files:
    names, count = list(tensors), np.int32(len(tensors))
    said = {"split.count": np.uint16(2), "split.tensors.count": count}
    return {
        f"model-0000{number + 1}-of-00002.gguf": gguf_file(
            {**({} if number else values), **said, "split.no": np.uint16(number)},
            {name: tensors[name] for name in names[number::2]},
        )
        for number in range(2)
    }


@cache
def gguf() -> dict[str, Files]:
    """A GGUF file with tensors of all types, alone and beside a config.json, and some of other families."""
    kinds = [(2, "k"), (3, "k"), (4, "k"), (5, "k"), (6, "k"), (4, "symmetric"), (5, "affine")]
    mixed: dict[str, Any] = {}
    for bits, grid in kinds:
        made = _quantized({"format": "gguf", "bits": bits, "grid": grid, "embedding_bits": 8})
        values, tensors = read_gguf(made["model.gguf"])
        # The first type for all, then each of the others for one tensor.
        names = [name for name, each in tensors.items() if each.dtype.names]
        mixed = mixed or tensors
        mixed[names[kinds.index((bits, grid))]] = tensors[names[kinds.index((bits, grid))]]
    # With little of a tokenizer, so that changes hit the rest.
    short = {key: each[:4] if isinstance(each, list) else each for key, each in values.items()}
    alone = {"model.gguf": gguf_file(short, mixed)}
    found: dict[str, Files] = {
        "all types": alone,
        "with config": {**alone, "config.json": wide()["config.json"]},
        "two parts": _in_two_parts(short, mixed),
    }
    *coded_names, _ = names  # one layer is on a grid
    for first in (0, len(coded_names)):  # of codebooks and fractions
        types = list(DECODED)[first:]
        random = np.random.default_rng(first)
        coded = {
            # Bytes so small that no scale is NaN or infinite.
            name: random.integers(0, 24, mixed[name].shape[0] * WIDTH // weights * size, np.uint8)
            .view(BLOCKS[kind])
            .reshape(mixed[name].shape[0], -1)
            for name, kind in zip(coded_names, types, strict=False)
            for _, weights, size in (DECODED[kind],)
        }
        found[f"codebooks {first}"] = {"model.gguf": gguf_file(short, {**mixed, **coded})}
    words = Tokenizer(models.BPE({chr(33 + number): number for number in range(64)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for family, config in (
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("phi3-longrope", {}),
        ("qwen3_moe", {"num_hidden_layers": 1, "mlp_only_layers": [], "layer_types": None}),
    ):
        source = dict(families()[family])
        config = json.loads(source["config.json"]) | config
        source["config.json"] = json.dumps(config).encode()
        source["tokenizer.json"] = words.to_str().encode()
        if config["num_hidden_layers"] == 1:
            source["model.safetensors"] = _only_the_second_block(source["model.safetensors"])
        found[family] = {"model.gguf": _quantized(EIGHT_BITS, source)["model.gguf"]}
    return found


SCALED: dict[str, tuple[dict[str, Any], dict[str, tuple[str, int, int]]]] = {
    # What is said, and of each tensor in place of a weight: its dtype, and what divides rows and columns.
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        {"weight": ("F8_E4M3", 1, 1), "weight_scale_inv": ("F32", 32, 32)},
    ),
    "rows": (
        {"quant_method": "fbgemm_fp8"},
        {"weight": ("F8_E5M2", 1, 1), "weight_scale": ("BF16", 1, WIDTH)},
    ),
    "powers": (
        {"quant_method": "modelopt", "quant_algo": "MXFP4"},
        {"weight": ("U8", 1, 2), "weight_scale": ("U8", 1, 32)},
    ),
    "two scales": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "weight": ("U8", 1, 2),
            "weight_scale": ("F8_E4M3", 1, 16),
            "weight_scale_2": ("F32", 1 << 20, 1 << 20),
        },
    ),
}


@cache
def scaled() -> dict[str, Files]:
    """A model in 8 and 4 bits with scales, as others train and publish them."""
    found = {}
    for name, (said, parts) in SCALED.items():
        files, tensors = dict(wide()), read_safetensors(wide()["model.safetensors"])
        for stem in [each.removesuffix("weight") for each in tensors if "_proj." in each]:
            _, shape, _ = tensors.pop(f"{stem}weight")
            rows, columns = shape
            for end, (dtype, down, across) in parts.items():
                size = (-(-rows // down), -(-columns // across))
                # Bytes that make no large number in any of the dtypes; of powers of two, no tiny one.
                filler = 120 if dtype in ("U8", "F8_E8M0") and "scale" in end else 60
                data = bytes([filler]) * (math.prod(size) * DTYPES[dtype].itemsize)
                tensors[stem + end] = (dtype, size, data)
        config = json.loads(files["config.json"]) | {"quantization_config": said}
        files["config.json"] = json.dumps(config).encode()
        found[name] = {**files, "model.safetensors": safetensors_file(tensors)}
    return found


@cache
def adapters() -> dict[str, Files]:
    """A LoRA adapter of a model that lies elsewhere."""
    said = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": str(STATISTICS_MODEL),
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"layers\\.[01]\\.self_attn\\.q_proj": 1},
        "use_rslora": False,
    }
    random = np.random.default_rng(0)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    base = read_safetensors(families()["mistral"]["model.safetensors"])
    prefix, layer = "base_model.model.", "model.layers.0.self_attn.q_proj"
    out, channels = base[f"{layer}.weight"][1]
    norm, shape = "model.norm", tuple(base["model.norm.weight"][1])
    for end, size in (
        (f"{layer}.lora_A.weight", (2, channels)),
        (f"{layer}.lora_B.weight", (out, 2)),
        (f"{norm}.modules_to_save.weight", shape),
    ):
        values = random.standard_normal(size).astype(np.float32)
        tensors[prefix + end] = ("F32", size, values.tobytes())
    return {
        "one layer": {
            "adapter_config.json": json.dumps(said).encode(),
            "adapter_model.safetensors": safetensors_file(tensors),
        }
    }


@cache
def settings() -> dict[str, Files]:
    """Settings of a command."""
    text = b"bits: 3\ngroup-size: 64\nexclude: ['*.v_proj', &a x]\noverrides: {a: {bits: 4}}\n"
    return {"one command": {"settings.yaml": text}}


@cache
def tokenizers() -> dict[str, Files]:
    """A tokenizer with a chat template, a text and chats."""
    template = (
        "{% for message in messages %}{{ message.role | upper }}: {{ message['content'] }}"
        "{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    config = json.loads((DEMO / "tokenizer_config.json").read_bytes())
    chat = {"messages": [{"role": "user", "content": "Once upon a time"}] * 3}
    pair = {"prompt": "Tom and Ann", "completion": "went to the park."}
    files = {
        "tokenizer.json": (DEMO / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": json.dumps({**config, "chat_template": template}).encode(),
        "special_tokens_map.json": b'{"eos_token": "<eos>", "bos_token": {"content": "<bos>"}}',
        "text.txt": (DEMO / "evaluation.txt").read_bytes()[:500],
        "chats.jsonl": "\n".join(map(json.dumps, [chat, pair])).encode(),
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Once upon a time"}] * 3}
    called = {"messages": [parts, call, parts], "tools": json.dumps(tools)}
    return {
        "in the config": files,
        "in a file": {**files, "chat_template.jinja": template.encode()},
        "in a folder": {
            **files,
            "additional_chat_templates/tool_use.jinja": f"{{{{ tools }}}}{template}".encode(),
            "chats.jsonl": "\n".join(map(json.dumps, [called] * 3)).encode(),
        },
    }


@cache
def side_files() -> dict[str, Files]:
    """A model with files and folders beside it."""
    more = {
        "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}]',
        "1_Pooling/config.json": b"{}",
        "1_Pooling/pytorch_model.bin": b"weights",
        "modeling_own.py": b"from .own import own",
        "own/__init__.py": b"own = 1",
    }
    return {"with code": {**families()["mistral"], **more}}


@cache
def tokens() -> dict[str, Files]:
    """Calibration data of every kind."""
    out = io.BytesIO()
    np.save(out, np.arange(40, dtype=np.int32).reshape(5, 8))
    known = tokenizers()["in a file"]
    records = [{"text": "Tom and Ann went to the park."}, {"text": "Once upon a time"}] * 2
    asked = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Tom and Ann."}]
    return {
        "all kinds": {
            **known,
            "tokens.npy": out.getvalue(),
            "list.json": json.dumps(records).encode(),
            "chats.json": json.dumps({"data": [{"conversations": asked}] * 3}).encode(),
            "table.csv": b'id,text\n1,"Tom, and Ann"\n2,Once upon a time\n' * 2,
            "table.tsv": b"prompt\tcompletion\nWho?\tTom\nWhere?\tIn the park\n",
        }
    }


@cache
def targets() -> dict[str, Files]:
    """What the demo model says of some tokens."""
    with _scratch() as folder:
        ids = np.arange(24, dtype=np.int32).reshape(3, 8)
        bitwright.compute_dwq_targets(DEMO, ids, folder / "out", k=16)
        return {"one file": _content(folder / "out")}


STATISTICS_MODEL = TESTS / "data" / "tiny" / "mistral"


@cache
def statistics() -> dict[str, Files]:
    """What the layers of a model see."""
    with _scratch() as folder:
        ids = np.arange(24, dtype=np.int32).reshape(3, 8)
        bitwright.collect_statistics(STATISTICS_MODEL, folder / "out", ids, progress=False)
        return {"one model": _content(folder / "out")}


@cache
def sensitivities() -> dict[str, Files]:
    """Sensitivities of three layers."""
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    alike = dict.fromkeys(names, 0.25), dict.fromkeys(names, 64)
    known = bitwright.Sensitivities(*alike, (3, 64), (5, None), "model", "tokens", "kl", 0.5)
    with _scratch() as folder:
        known.save(folder / "sensitivities.json")
        return {"three layers": _content(folder)}


@cache
def recipes() -> dict[str, Files]:
    """A recipe for three layers."""
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    layers: dict[str, tuple[int, int | None]] = dict.fromkeys(names, (4, 64))
    with _scratch() as folder:
        bitwright.Recipe({**layers, names[0]: (3, None)}, 4.5, 4.25).save(folder / "recipe.json")
        return {"three layers": _content(folder)}


LAYERS = ("a.q_proj", "a.k_proj")


@cache
def activations() -> dict[str, Files]:
    """Inputs of two layers, plain and compressed."""
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((2, 4, 64), dtype=np.float32) for name in LAYERS}
    plain, compressed = io.BytesIO(), io.BytesIO()
    np.savez(plain, allow_pickle=True, **arrays)
    np.savez_compressed(compressed, allow_pickle=True, **arrays)
    return {
        "plain": {"activations.npz": plain.getvalue()},
        "compressed": {"activations.npz": compressed.getvalue()},
    }


@cache
def imatrices() -> dict[str, Files]:
    """Importance matrices of the wide model, of both formats."""
    names = ("attn_q", "attn_output", "ffn_up", "ffn_down")
    entries = {
        f"blk.0.{name}.weight": Importance(
            np.full((1, WIDTH), 0.5, np.float32), np.array([9], np.float32)
        )
        for name in names
    }
    with _scratch() as folder:
        for name in ("i.gguf", "i.dat"):
            ImportanceMatrix(entries, ("text",), 1).save(folder / name)
        return {"both": _content(folder)}
