"""GGUF files: names, values and metadata come back, and damage ends in a clear error."""

import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from chat_samples import BOTH, SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import write_gguf
from shared_data import ARCH, TINY

import bitwright
from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.gguf import GgufCheckpoint
from bitwright.checkpoint.gguf_file import (
    BLOCKS,
    TYPE_IDS,
    weights_per_block,
    write_header,
)
from bitwright.checkpoint.gguf_metadata import gguf_metadata
from bitwright.checkpoint.gguf_names import GGUF_FAMILIES, GgufNames
from bitwright.errors import (
    BitwrightError,
    CheckpointError,
    CheckpointNotFoundError,
    UnsupportedModelError,
)
from bitwright.loading.model import Model
from bitwright.warned import BitwrightWarning

DEMO = Path(str(bitwright.demo_folder()))
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Tensors = dict[str, np.ndarray[Any, Any]]


def model_type(folder: Path) -> str:
    name: str = json.loads((folder / "config.json").read_text())["model_type"]
    return name


SUPPORTED = [folder for folder in [*TINY, *ARCH] if model_type(folder) in GGUF_FAMILIES]


def stored_tensors(model: Model, names: GgufNames) -> Tensors:
    """What a writer puts into the file: experts stacked, the rest as it is."""
    checkpoint, stored = model.checkpoint, dict[str, np.ndarray[Any, Any]]()
    stacks: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name, place in model.experts.items():
        stacks.setdefault(f"{place.stacked_name}.weight", []).append(
            checkpoint.read(f"{name}.weight").astype(np.float32)
        )
    for name in checkpoint.names():
        if name in names and name.removesuffix(".weight") not in model.experts:
            key, array = names.to_gguf(name, checkpoint.read(name))
            stored.setdefault(key, array)
    for name, arrays in stacks.items():
        key, array = names.to_gguf(name, np.stack(arrays))
        stored[key] = array
    return stored | names.extra_tensors()


def convert(folder: Path, path: Path, **changes: Any) -> Path:
    model = Model(Checkpoint(folder))
    config = {**model.checkpoint.config, **changes}
    names = GgufNames(config, folder / "config.json")
    tokenizer = path.with_name("tokenizer.json")
    tokenizer.write_bytes((DEMO / "tokenizer.json").read_bytes())
    size = names.config.vocab_size
    if size < 512:  # that of the demo's tokenizer
        content = json.loads(tokenizer.read_text())
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {key: vocab[key] for key in vocab if vocab[key] < size}
        content["model"]["merges"] = []
        tokenizer.write_text(json.dumps(content))
    return write_gguf(path, gguf_metadata(config, path.parent, 0), stored_tensors(model, names))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO, tmp_path_factory.mktemp("gguf") / "demo.gguf")


@pytest.mark.parametrize("folder", SUPPORTED, ids=lambda folder: folder.name)
def test_names_and_values_come_back(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    model = Model(checkpoint)
    names = GgufNames(checkpoint.config, folder / "config.json")
    seen = set()
    for name in checkpoint.names():
        if name not in names:
            is_decoder = name.startswith(model.names.block.partition("{}")[0])
            assert name.removesuffix(".weight") in model.experts or not is_decoder
            continue
        array = checkpoint.read(name)
        stored, values = names.to_gguf(name, array)
        assert stored not in seen
        seen.add(stored)
        assert values.dtype == (np.float32 if values.ndim == 1 or "_inp" in stored else array.dtype)
        back, again = names.from_gguf(stored, values)
        assert again.shape == array.shape
        if not names.config.tie_word_embeddings or name != "lm_head.weight":
            assert back.split(".")[-3:] == name.split(".")[-3:]
        np.testing.assert_allclose(again.astype(np.float32), array.astype(np.float32), 0, 2e-7)
    for name, place in model.experts.items():
        stored = names.gguf_name(f"{place.stacked_name}.weight")
        assert stored.endswith(f"ffn_{place.role}_exps.weight")
        assert names.name(stored) == f"{place.stacked_name}.weight"
        assert f"{name}.weight" not in names


def test_rows_of_queries_and_keys_become_neighbours() -> None:
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    names = GgufNames({**config, "hidden_size": 8, "num_hidden_layers": 1}, Path("config.json"))
    rows = np.arange(8)
    prefix = "model.layers.0.self_attn."
    assert names.to_gguf(f"{prefix}q_proj.bias", rows)[1].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert names.to_gguf(f"{prefix}k_proj.bias", rows)[1].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert names.to_gguf(f"{prefix}v_proj.bias", rows)[1].tolist() == rows.tolist()
    blocks = np.zeros((8, 3), BLOCKS["Q4_0"])
    blocks["d"] = rows[:, None]
    stored, moved = names.to_gguf(f"{prefix}q_proj.weight", blocks)
    assert stored == "blk.0.attn_q.weight"
    assert moved.dtype == blocks.dtype
    assert moved["d"][:, 2].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert (names.from_gguf(stored, moved)[1] == blocks).all()


def test_blocks_are_laid_out_as_in_ggml() -> None:
    quants = pytest.importorskip("gguf.constants")
    for name, dtype in BLOCKS.items():
        if name == "Q2_0":  # which is newer than the package
            continue
        number = quants.GGMLQuantizationType[name]
        assert number == TYPE_IDS[name]
        assert (weights_per_block(dtype), dtype.itemsize) == quants.GGML_QUANT_SIZES[number]


@pytest.mark.parametrize("folder", SUPPORTED, ids=lambda folder: folder.name)
def test_a_model_comes_back_without_its_config(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if model_type(folder) == "gemma2":
        changes = {"query_pre_attn_scalar": Checkpoint(folder).config["head_dim"]}
    if model_type(folder) == "qwen3_moe":
        with pytest.raises(UnsupportedModelError, match="some layers have experts"):
            convert(folder, tmp_path / "model.gguf")
        return
    path = convert(folder, tmp_path / "model.gguf", **changes)
    original = Checkpoint(folder)
    original.config |= changes
    with GgufCheckpoint(path) as checkpoint:
        ids = np.arange(6)[None]  # llama.cpp's windows are as long as the context
        found, expected = Model(checkpoint).logits(ids), Model(original).logits(ids)
        np.testing.assert_allclose(found, expected, 0, 1e-4)


def test_the_config_beside_the_file_is_taken_if_it_is_of_the_model(demo: Path) -> None:
    beside = demo.with_name("config.json")
    config = json.loads((DEMO / "config.json").read_text())
    for changes, taken in (({}, True), ({"hidden_size": 32}, False), ({"model_type": "x"}, False)):
        beside.write_text(json.dumps({**config, **changes, "quantization": {}, "mark": 1}))
        with GgufCheckpoint(demo) as checkpoint:
            assert ("mark" in checkpoint.config) == taken
            assert "quantization" not in checkpoint.config
            assert checkpoint.config["hidden_size"] == 64
            assert checkpoint.config["tie_word_embeddings"] is True
    beside.unlink()


def test_a_file_is_a_checkpoint(demo: Path) -> None:
    with GgufCheckpoint(demo) as checkpoint, Checkpoint(DEMO) as original:
        assert checkpoint.names() == original.names()
        name = "model.layers.0.self_attn.q_proj.weight"
        assert name in checkpoint
        assert checkpoint.file(name) == demo
        assert checkpoint.folder == demo.parent
        assert checkpoint.shape(name) == original.shape(name)
        assert checkpoint.dtype(name) == ml_dtypes.bfloat16
        assert (checkpoint.read(name) == original.read(name)).all()
        norms = sum(np.prod(original.shape(each)) for each in original.names() if "norm" in each)
        assert checkpoint.nbytes() == original.nbytes() + 2 * norms
        with pytest.raises(CheckpointError, match="q_proj"):
            checkpoint.read("model.layers.0.self_attn.q_proj.wheight")
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read(name)
    assert isinstance(checkpoint, Checkpoint)


def test_a_part_of_stacked_experts_is_read_alone(tmp_path: Path) -> None:
    path = convert(next(each for each in ARCH if each.name == "mixtral"), tmp_path / "m.gguf")
    with GgufCheckpoint(path) as checkpoint:
        name = "model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight"
        whole = checkpoint.read(name)
        assert (checkpoint.read_part(name, 3) == whole[3]).all()
        assert (checkpoint.read_part(name, 1, slice(5, 9)) == whole[1, 5:9]).all()
        with pytest.raises(CheckpointError, match="axes"):
            checkpoint.read_part(name, 4)


@pytest.mark.parametrize("kind", [each for each in BLOCKS if each != "Q2_0"])
def test_tensors_are_where_the_reference_finds_them(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    dtype = BLOCKS[kind]
    tensors = {
        name: np.frombuffer(random.bytes(np.prod(shape) * dtype.itemsize), dtype).reshape(shape)
        for name, shape in (("one", (3, 2)), ("two", (5, 1)), ("three", (2, 3, 1)))
    }
    metadata = {
        "general.architecture": "llama",
        "a": 7,
        "b": [1, -2],
        "c": [0.5],
        "d": ["x", "ü"],
        "e": True,
        "f": np.uint64(1 << 40),
        "g": np.array([1, 2], np.uint16),
        "h": [True, False],
        "i": 1e-5,
        "j": -3,
    }
    reader = gguf.GGUFReader(write_gguf(tmp_path / "a.gguf", metadata, tensors))
    found = {key: field.contents() for key, field in reader.fields.items() if key[:4] != "GGUF"}
    assert found.pop("i") == pytest.approx(metadata.pop("i"))
    assert found.pop("g") == [1, 2]
    assert found == {key: value for key, value in metadata.items() if key != "g"}
    assert reader.fields["a"].types == [gguf.GGUFValueType.UINT32]
    for tensor in reader.tensors:
        array = tensors[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tensor.shape.tolist() == [
            array.shape[-1] * weights_per_block(dtype),
            *reversed(array.shape[:-1]),
        ]
        assert tensor.data.tobytes() == array.tobytes()


def test_metadata_describes_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    path = convert(DEMO, tmp_path / "demo.gguf", vocab_size=515)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}"}'
    )
    config = {**Checkpoint(DEMO).config, "vocab_size": 515}
    metadata = gguf_metadata(config, path.parent, 7)
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.file_type"] == 7
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["llama.rope.dimension_count"] == 16
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.tokens"][512:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert metadata["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert metadata["tokenizer.ggml.token_type"][512:] == [5, 5, 5]
    assert metadata["tokenizer.ggml.merges"][0] == "Ġ t"
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("name", ["a list", "an object", "additional"])
def test_templates_keep_their_names(name: str, tmp_path: Path) -> None:
    """As gguf's own writer has them, and llama.cpp looks for that for tools."""
    sample = next(sample for key, sample in SAMPLES.items() if key.startswith(f"{name} "))
    sample.write(tmp_path)
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    metadata = gguf_metadata(Checkpoint(DEMO).config, tmp_path, 0)
    names = ["rag", "tool_use"] if name == "additional" else ["tool_use"]
    assert metadata["tokenizer.chat_template"] == BOTH["default"]
    assert metadata["tokenizer.chat_template.tool_use"] == BOTH["tool_use"]
    assert metadata["tokenizer.chat_templates"] == names
    write_header(io.BytesIO(), metadata, [])


def tokenizer(path: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = json.loads((DEMO / "tokenizer.json").read_text())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return gguf_metadata(Checkpoint(DEMO).config, path, 0)


def test_ways_to_split_text_have_their_names(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    parts = {"type": "Sequence", "pretokenizers": [split, byte_level]}

    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = parts
        content["model"]["ignore_merges"] = True

    assert tokenizer(tmp_path, change)["tokenizer.ggml.pre"] == "llama-bpe"
    split["pattern"] = {"Regex": LLAMA_3.replace("{1,3}", "{1,4}")}
    with pytest.raises(UnsupportedModelError, match="pre_tokenizer"):
        tokenizer(tmp_path, change)


def test_sentence_pieces_get_scores_by_their_merges(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        vocab = ["<unk>", "<s>", "<0x41>", "▁", "a", "b", "ab", "▁ab", "  "]
        content["model"] |= {
            "vocab": {token: number for number, token in enumerate(vocab)},
            "merges": ["a b", "▁ ab"],
            "byte_fallback": True,
            "unk_token": "<unk>",
        }
        content["added_tokens"] = [
            {"id": 0, "content": "<unk>", "special": True},
            {"id": 1, "content": "<s>", "special": True},
            {"id": 8, "content": "▁▁", "special": False},
        ]
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        template = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": template,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }

    metadata = tokenizer(tmp_path, change)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.token_type"][:9] == [2, 3, 6, 1, 1, 1, 1, 1, 4]
    assert metadata["tokenizer.ggml.tokens"][8] == "  "
    assert metadata["tokenizer.ggml.scores"][6:8] == [0, -1]
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    assert metadata["tokenizer.ggml.unknown_token_id"] == 0


@pytest.mark.parametrize(
    ("token", "special", "kind"),
    [("<tool>", False, 4), ("<tool>", True, 3), ("<|tool|>", False, 3), ("<unused7>", False, 3),
     ("<pad>", False, 3), ("a<pad>", False, 4), ("<｜tool｜>", False, 3)],
)  # fmt: skip
def test_added_tokens_are_typed_as_by_the_converter(
    token: str, special: bool, kind: int, tmp_path: Path
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["added_tokens"].append({"id": 511, "content": token, "special": special})

    metadata = tokenizer(tmp_path, change)
    assert metadata["tokenizer.ggml.tokens"][511] == token
    assert metadata["tokenizer.ggml.token_type"][511] == kind


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content["model"].update(type="Unigram"), "Unigram"),
        (lambda content: content.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda content: content.pop("model"), "does not describe a tokenizer"),
        (lambda content: content["model"].update(vocab={"a": 600}), "512 entries"),
        (lambda content: content.update(post_processor={"type": "BertProcessing"}), "Bert"),
    ],
)
def test_other_tokenizers_are_refused(change: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        tokenizer(tmp_path, change)


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: there is no such file"):
        gguf_metadata(Checkpoint(DEMO).config, tmp_path, 0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        (
            {"model_type": "deepseek_v2", "num_key_value_heads": 4, "num_experts_per_tok": 2},
            "deepseek_v2",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "without rotation"),
        ({"model_type": "qwen2", "head_dim": 32}, "as wide as"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases"),
        ({"model_type": "gemma", "hidden_act": "gelu", "tie_word_embeddings": False}, "tie_word"),
        (
            {
                "model_type": "gemma2",
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": 7,
            },
            "query_pre_attn_scalar",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}},
            "beta_fast",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        gguf_metadata({**Checkpoint(DEMO).config, **changes}, DEMO, 0)


def header(
    values: bytes = b"",
    count: int = 0,
    tensors: bytes = b"",
    tensor_count: int = 0,
    version: int = 3,
) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensor_count, count) + values + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, *axes: int, kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
    return text(name) + numbers


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "24 bytes|4 bytes"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(count=HUGE), "should follow"),
        (header(tensor_count=HUGE), "should follow"),
        (header(text(b"a") + struct.pack("<IIQ", 9, 8, HUGE), 1), "should follow"),
        (header(text(b"a") + struct.pack("<IIQ", 9, 4, HUGE), 1), "should follow"),
        (header(text(b"a") + struct.pack("<IIQ", 9, 9, 1), 1), "arrays of arrays"),
        (header(text(b"a") + struct.pack("<I", 77), 1), "type 77"),
        (header(2 * (text(b"a") + struct.pack("<II", 4, 1)), 2), "'a' is there twice"),
        (header(struct.pack("<Q", HUGE), 1), "should follow"),
        (header(text(b"\xff") + struct.pack("<II", 4, 1), 1), "valid name"),
        (
            header(text(b"split.count") + struct.pack("<IH", 2, 3), 1),
            "part 1 of 3, but its name says",
        ),
        (
            header(text(b"split.no") + struct.pack("<IH", 2, 3), 1),
            "'split.no' and 'split.count'|3 and 1",
        ),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 0), 1), "multiple of 8"),
        (header(tensors=2 * tensor(b"t", 4), tensor_count=2), "'t' is there twice"),
        (header(tensors=tensor(b"t"), tensor_count=1), "0 axes"),
        (header(tensors=tensor(b"t", 1, 1, 1, 1, 1), tensor_count=1), "5 axes"),
        (header(tensors=tensor(b"t", 0, 4), tensor_count=1), "shape"),
        (header(tensors=tensor(b"t", HUGE, HUGE), tensor_count=1), "'t', .* bytes"),
        (header(tensors=tensor(b"t", 40, kind=2), tensor_count=1), "blocks of 32"),
        (header(tensors=tensor(b"t", 32, kind=9), tensor_count=1), "'t' is of type Q8_1"),
        (header(tensors=tensor(b"t", 32, kind=23), tensor_count=1), "blocks of 256"),
        (header(tensors=tensor(b"t", 32, kind=99), tensor_count=1), "'t' is of type number 99"),
        (header(tensors=tensor(b"t", 4, offset=8), tensor_count=1), "'t', 16 bytes"),
        (header(tensors=tensor(b"t", 4, offset=HUGE), tensor_count=1), "'t', 16 bytes"),
        (header(tensors=tensor(b"t", 64) + tensor(b"u", 64), tensor_count=2), "overlap"),
        (header(), "general.architecture"),
    ],
)
def test_damaged_files_are_told_apart(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content + bytes(600 if b"t" in content[24:] else 0))
    with pytest.raises(CheckpointError, match=match):
        GgufCheckpoint(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        GgufCheckpoint(tmp_path / "none.gguf")


def test_tensors_of_other_models_are_refused(demo: Path, tmp_path: Path) -> None:
    with GgufCheckpoint(demo) as checkpoint:
        metadata = checkpoint.metadata
    norm = np.ones(4, np.float32)
    embedding = np.ones((512, 64), np.float32)
    path = tmp_path / "other.gguf"
    for name in ("blk.0.attn_sinks.weight", "blk.00.attn_q.weight", "blk.9.attn_q.weight", "norm"):
        with pytest.raises(UnsupportedModelError, match=name):
            GgufCheckpoint(write_gguf(path, metadata, {"token_embd.weight": embedding, name: norm}))
    with pytest.raises(CheckpointError, match="embedding"):
        GgufCheckpoint(write_gguf(path, metadata, {"output_norm.weight": norm}))


def damaged_copies(content: bytes) -> Iterator[bytes]:
    for end in [*range(0, 200, 7), *range(200, len(content) - 32, len(content) // 40)]:
        yield content[:end]


def test_a_file_cut_short_is_an_error(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for content in damaged_copies(demo.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(BitwrightError):
            GgufCheckpoint(path)


@pytest.fixture(scope="module")
def small_file(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of a file but most of its tokenizer, so that changes hit what matters."""
    with GgufCheckpoint(demo) as checkpoint:
        metadata = {k: v for k, v in checkpoint.metadata.items() if not k.startswith("tokenizer")}
        infos = {name: checkpoint.read(name) for name in checkpoint.names()}
        names = GgufNames(checkpoint.config, demo)
    tensors = dict(names.to_gguf(name, array) for name, array in infos.items())
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf", metadata, tensors)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_changed_bytes_never_escape_as_other_errors(small_file: Path, data: st.DataObject) -> None:
    content = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 2600))
        content[place] = data.draw(st.integers(0, 255))
    path = small_file.with_name("changed.gguf")
    path.write_bytes(content)
    try:
        with GgufCheckpoint(path) as checkpoint:
            for name in checkpoint.names():
                checkpoint.read(name)
    except BitwrightError:
        pass


TINY_FOLDERS = {folder.name: folder for folder in TINY}


def with_keys(name: str, path: Path, **keys: Any) -> Path:
    """Write a tiny model with other hyperparameters; two underscores in a name are a dot."""
    folder = TINY_FOLDERS[name]
    model = Model(Checkpoint(folder))
    changes = {"query_pre_attn_scalar": model.config.head_dim} if name == "gemma2" else {}
    names = GgufNames({**model.checkpoint.config, **changes}, folder / "config.json")
    convert(folder, path, **changes)
    metadata = gguf_metadata(names.config.raw, path.parent, 0)
    prefix = f"{names.architecture}."
    metadata |= {prefix + key.replace("__", "."): value for key, value in keys.items()}
    return write_gguf(path, metadata, stored_tensors(model, names))


@pytest.mark.parametrize(
    ("name", "key", "value", "neutral"),
    [
        ("llama-biases", "attention__causal", False, True),
        ("qwen2", "attention__causal", False, True),
        ("gemma2", "attention__causal", False, True),
        ("llama-biases", "attn_logit_softcapping", 50.0, 0.0),
        ("llama-biases", "final_logit_softcapping", 30.0, 0.0),
        ("qwen2", "router_logit_softcapping", 30.0, 0.0),
        ("llama-biases", "attention__clamp_kqv", 8.0, 0.0),
        ("llama-biases", "attention__max_alibi_bias", 8.0, 0.0),
        ("llama-biases", "use_parallel_residual", True, False),
        ("llama-biases", "logit_scale", 0.5, 1.0),
        ("llama-biases", "rope__scaling__yarn_beta_fast", 16.0, 32.0),
        ("llama-yarn", "rope__scaling__yarn_ext_factor", 0.5, 1.0),
        ("llama-biases", "rope__dimension_sections", np.array([16, 24, 24]), np.zeros(3, np.int32)),
        ("llama-biases", "expert_gating_func", 2, 1),
        ("llama-biases", "expert_weights_norm", False, True),
        ("llama-biases", "leading_dense_block_count", 1, 0),
        ("gemma2", "rope__freq_base_swa", 1e6, 0.0),
        ("llama-biases", "attention__key_length_swa", 4, 8),
        ("qwen2", "a_key_of_tomorrow", 7, 0),
    ],
)
def test_hyperparameters_are_neutral_or_refused(
    name: str, key: str, value: Any, neutral: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    expected = Model(GgufCheckpoint(with_keys(name, path))).logits([[1, 2, 3]])
    found = Model(GgufCheckpoint(with_keys(name, path, **{key: neutral}))).logits([[1, 2, 3]])
    np.testing.assert_array_equal(found, expected)
    said = rf'a\.gguf: "\w+\.{key.replace("__", ".")}" is .*which is not computed'
    with pytest.raises(UnsupportedModelError, match=said):
        GgufCheckpoint(with_keys(name, path, **{key: value}))


def test_keys_that_some_architectures_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.warns(BitwrightWarning, match=r"sliding_window.*llama\.cpp overlooks"):
        config = GgufCheckpoint(with_keys("mistral", path, attention__sliding_window=7)).config
    assert "sliding_window" not in config
    config = GgufCheckpoint(with_keys("gemma2", path, attn_logit_softcapping=9.0)).config
    assert config["attn_logit_softcapping"] == 9
    config = GgufCheckpoint(with_keys("gemma2", path, final_logit_softcapping=9.0)).config
    assert config["final_logit_softcapping"] == 9
    assert GgufCheckpoint(with_keys("qwen2", path, vocab_size=96, vision__a=3)).config
