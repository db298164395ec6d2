"""Checkpoint folders: what is written is read back, and damage ends in a clear error."""

import errno
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file
from shared_data import SHARED

from bitwright.checkpoint import Checkpoint, CheckpointWriter
from bitwright.checkpoint import writer as writer_module
from bitwright.checkpoint.reader import INDEX_NAME, read_json_object
from bitwright.checkpoint.shard import DTYPES
from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.errors import (
    BitwrightError,
    CheckpointError,
    CheckpointNotFoundError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    UnsupportedModelError,
    shown,
)

ONE = np.arange(6, dtype=np.float32).reshape(2, 3)


def make(folder: Path, shards: dict[str, dict[str, Any]], index: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if index is not None:
        text = index if isinstance(index, str) else json.dumps(index)
        (folder / INDEX_NAME).write_text(text)
    return folder


def raw_safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# errors


@pytest.mark.parametrize(
    "kind", [CheckpointNotFoundError, NonFiniteError, OutputError, OutputExistsError]
)
def test_errors_show_the_plain_message(kind: type[BitwrightError]) -> None:
    assert str(kind("plain message")) == "plain message"
    with pytest.raises(TypeError):
        kind(2, "No such file")  # type: ignore[call-arg, arg-type]
    assert issubclass(kind, ValueError | OSError)


def test_values_in_messages_are_short_and_printable() -> None:
    text = shown({"a\x1b[31m\ud800": ["x" * 10_000] * 100})
    assert len(text) < 1000
    assert text.isprintable()


# reading


def test_reads_a_single_file(tmp_path: Path) -> None:
    half = ONE.astype(ml_dtypes.bfloat16)
    make(tmp_path, {"model.safetensors": {"b": half, "a": ONE, "scalar": np.array(3, np.int64)}})
    with Checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.folder == tmp_path
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.names() == ["a", "b", "scalar"]
        assert "a" in checkpoint
        assert "c" not in checkpoint
        assert checkpoint.shape("a") == (2, 3)
        assert checkpoint.shape("scalar") == ()
        assert checkpoint.dtype("b") == ml_dtypes.bfloat16
        assert checkpoint.file("a") == tmp_path / "model.safetensors"
        assert checkpoint.nbytes() == 24 + 12 + 8
        read = checkpoint.read("b")
        assert read.dtype == ml_dtypes.bfloat16
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, half)
    assert checkpoint.shape("a") == (2, 3)
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("a")
    checkpoint.close()


def test_reads_shards_with_and_without_index(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = {names[0]: {"a": ONE}, names[1]: {"b": ONE + 1}}
    make(tmp_path, shards)
    # Not part of the model: hidden files, such as those that macOS leaves behind.
    (tmp_path / "._model.safetensors").write_bytes(b"junk")
    for index in (None, {"weight_map": {"a": names[0], "b": names[1]}}):
        make(tmp_path, {}, index)
        with Checkpoint(tmp_path) as checkpoint:
            np.testing.assert_array_equal(checkpoint.read("b"), ONE + 1)
            assert checkpoint.file("b").name == names[1]
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointNotFoundError, match=names[1]):
        Checkpoint(tmp_path)


def test_follows_links_that_the_user_made(tmp_path: Path) -> None:
    blobs = make(tmp_path / "blobs", {"0a1b": {"a": ONE}})
    folder = make(tmp_path / "snapshot", {})
    (folder / "model.safetensors").symlink_to(Path("../blobs/0a1b"))
    with Checkpoint(folder) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), ONE)
    (blobs / "0a1b").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"model\.safetensors: the weight file"):
        Checkpoint(folder)


def test_unknown_names_hint_at_the_closest(tmp_path: Path) -> None:
    name = "model.layers.7.mlp.up_proj.weight"
    make(tmp_path, {"model.safetensors": {name: ONE, "lm_head.weight": ONE}})
    with Checkpoint(tmp_path) as checkpoint:
        for method in (checkpoint.read, checkpoint.shape, checkpoint.dtype, checkpoint.file):
            with pytest.raises(CheckpointError, match=r"closest are 'model\.layers\.7"):
                method("model.layers.7.mlp.upproj.weight")


def test_folders_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no such folder"):
        Checkpoint("some-organization/some-model")
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match="GGUF"):
        Checkpoint(file)
    file.rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="this is a file"):
        Checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        Checkpoint("nul\0")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("pytorch_model.bin", UnsupportedModelError, "pickles"),
        ("model-q4.gguf", UnsupportedModelError, "GGUF"),
        ("README.md", CheckpointNotFoundError, "no .*safetensors"),
    ],
)
def test_other_weights(tmp_path: Path, name: str, kind: type[Exception], message: str) -> None:
    make(tmp_path, {})
    (tmp_path / name).touch()
    with pytest.raises(kind, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1, column 1"),
        (b'{"a": 1,\n  "b": }', "line 2, column 8"),
        (b"[1, 2]", "must hold a JSON object"),
        (b'{"a": "\xff"}', "byte 7"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)


def test_json_with_byte_order_mark_or_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 2}')
    assert read_json_object(path) == {"a": 2}


def test_huge_json_is_not_loaded(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "JSON"),
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 7}}, "not the name of a file"),
        ({"weight_map": {"a": "../model.safetensors"}}, "not the name of a file"),
        ({"weight_map": {"a": "/etc/model.safetensors"}}, "not the name of a file"),
        ({"weight_map": {"a": "x\\model.safetensors"}}, "not the name of a file"),
        ({"weight_map": {"a": ".."}}, "not the name of a file"),
        ({"weight_map": {"a": ""}}, "not the name of a file"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "not the name of a file"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "not the name of a file"),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "not the name of a file"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "only safetensors"),
        ({"weight_map": {"a": "absent.safetensors"}}, r"absent\.safetensors: .*missing"),
        ({"weight_map": {"c": "1.safetensors"}}, "should be in 1.safetensors"),
        ({"weight_map": {"b": "1.safetensors", "a": "2.safetensors"}}, "should be in"),
    ],
)
def test_bad_index(tmp_path: Path, index: Any, message: str) -> None:
    make(tmp_path, {"1.safetensors": {"a": ONE}, "2.safetensors": {"b": ONE}}, index)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    make(tmp_path, {"1.safetensors": {"a": ONE}, "2.safetensors": {"a": ONE}})
    with pytest.raises(CheckpointError, match="is both in"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk" * 50,
        struct.pack("<Q", 2**63) + b"{}",
        raw_safetensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"ab"),
        raw_safetensors({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"abc"),
        raw_safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"ab"),
        raw_safetensors({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"a"),
        raw_safetensors({"a": {"dtype": "U8", "shape": [2**63], "data_offsets": [0, 1]}}, b"a"),
        raw_safetensors(b"[" * 10_000),
    ],
)
def test_bad_safetensors(tmp_path: Path, content: bytes) -> None:
    make(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a sound"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**63], [1] * 80])
def test_shapes_that_no_array_has(tmp_path: Path, shape: list[int]) -> None:
    make(tmp_path, {})
    size = 0 if 0 in shape else 1
    header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors(header, b"x" * size))
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("a")


def test_unsupported_dtypes_are_named(tmp_path: Path) -> None:
    make(tmp_path, {})
    header = {
        "a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
    }
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors(header, b"abc"))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("b") == [ord("c")]
        for method in (checkpoint.read, checkpoint.dtype):
            with pytest.raises(UnsupportedModelError, match="'a' is stored as F4"):
                method("a")
        with pytest.raises(UnsupportedModelError):
            checkpoint.nbytes()


def test_a_file_cut_short_while_open(tmp_path: Path) -> None:
    make(tmp_path, {"model.safetensors": {"a": np.zeros(10_000, np.float32)}})
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.read("a")


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    make(tmp_path, {})
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointNotFoundError):
        Checkpoint(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "weight_map", "dtype", "shape", "data_offsets"]), inner
        )
    ),
    max_leaves=6,
)
HEADER = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3),
    JSON
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPES, "F4", "C64", "?"]),
            "shape": st.lists(st.integers(-1, 3) | st.sampled_from([2**31, 2**62]), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 32), min_size=1, max_size=3),
        }
    ),
    max_size=3,
)


def survives(folder: Path) -> None:
    with suppress(BitwrightError), Checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            checkpoint.shape(name)
            checkpoint.read(name)


@settings(deadline=None, max_examples=50)
@given(header=HEADER | JSON, data=st.binary(max_size=32))
def test_strange_headers_never_surprise(header: Any, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name), {})
        (folder / "model.safetensors").write_bytes(raw_safetensors(header, data))
        survives(folder)


@settings(deadline=None, max_examples=40)
@given(place=st.integers(0, 300), change=st.binary(max_size=12), cut=st.integers(0, 12))
def test_damaged_files_never_surprise(place: int, change: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        tensors = {"a": ONE, "b": ONE.astype(ml_dtypes.bfloat16)}
        index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
        folder = make(Path(name), {"model.safetensors": tensors}, index)
        for path in list(folder.iterdir()):
            content = path.read_bytes()
            start = place % len(content)
            path.write_bytes(content[:start] + change + content[start + cut :])
            survives(folder)
            path.write_bytes(content)


@settings(deadline=None, max_examples=40)
@given(config=JSON, index=JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_strange_json_never_surprises(config: Any, index: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name), {"model.safetensors": {"a": ONE}}, index)
        (folder / "config.json").write_text(json.dumps(config))
        survives(folder)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the test models in {SHARED}")
def test_opens_every_shared_model() -> None:
    folders = [path.parent for path in sorted(SHARED.glob("models/**/config.json"))]
    assert folders
    for folder in folders:
        with Checkpoint(folder) as checkpoint:
            reference = load_file(folder / "model.safetensors")
            assert checkpoint.names() == sorted(reference)
            assert checkpoint.nbytes() == sum(array.nbytes for array in reference.values())
            name = checkpoint.names()[0]
            np.testing.assert_array_equal(checkpoint.read(name), reference[name])


# writing


@settings(deadline=None, max_examples=40)
@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.sampled_from([DTYPES[name] for name in DTYPES if not name.startswith("F8_")]).flatmap(
            lambda dtype: hnp.arrays(
                np.uint8 if dtype == ml_dtypes.bfloat16 or dtype == np.bool_ else dtype,
                hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
            ).map(lambda array: array.astype(dtype))
        ),
        max_size=5,
    ),
    shard_bytes=st.integers(1, 300),
)
def test_round_trip(arrays: dict[str, Any], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        with CheckpointWriter(out, shard_bytes=shard_bytes) as writer:
            writer.write_json("config.json", {})
            for tensor, array in arrays.items():
                writer.add(tensor, array)
        reference: dict[str, Any] = {}
        for file in out.glob("*.safetensors"):
            reference |= load_file(file)
            size = sum(array.nbytes for array in load_file(file).values())
            assert size <= shard_bytes or len(load_file(file)) == 1
        with Checkpoint(out) as checkpoint:
            assert checkpoint.names() == sorted(arrays) == sorted(reference)
            for tensor, array in arrays.items():
                for read in (checkpoint.read(tensor), reference[tensor]):
                    assert read.dtype == array.dtype
                    assert read.shape == array.shape
                    assert read.tobytes() == array.tobytes()


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 5), data=st.data(), shard_bytes=st.integers(1, 400))
def test_stacks_come_part_by_part(count: int, data: st.DataObject, shard_bytes: int) -> None:
    """Several at a time, in any order, and end up as if they had been added whole."""
    stacks = {
        name: np.random.default_rng(0).integers(0, 99, (count, *shape)).astype(dtype)
        for name, shape, dtype in (("a", (2, 3), "f4"), ("b", (4,), "u1"), ("c", (0, 2), "i4"))
    }
    parts = data.draw(st.permutations([(name, i) for name in stacks for i in range(count)]))
    last = {name: place for place, (name, _) in enumerate(parts)}
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "1", Path(folder) / "2"
        with WorkFolder(one) as work:
            (work.path / writer_module.STACK_NAME.format(0)).write_bytes(b"left by a killed run")
            with CheckpointWriter(one, shard_bytes=shard_bytes, work=work) as writer:
                for name, index in parts:
                    writer.add_part(name, stacks[name][index], index, count)
                assert not list(work.path.glob("stack.*"))
        with CheckpointWriter(other, shard_bytes=shard_bytes) as writer:
            for name in sorted(last, key=lambda name: last[name]):
                writer.add(name, stacks[name])
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in other.iterdir()
        }


def write(out: Path, value: float = 1, **options: Any) -> None:
    with CheckpointWriter(out, **options) as writer:
        writer.add("a", np.full(3, value, np.float32))
        writer.write_json("config.json", {"model_type": "llama"})


def value_in(out: Path) -> float:
    with Checkpoint(out) as checkpoint:
        return float(checkpoint.read("a")[0])


def test_memory_layouts_and_later_changes(tmp_path: Path) -> None:
    changed = np.zeros(3)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("transposed", ONE.T)
        writer.add("strided", ONE[:, ::2])
        writer.add("big endian", ONE.astype(">f4"))
        writer.add("changed", changed)
        changed[:] = 1
    read = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(read["transposed"], ONE.T)
    np.testing.assert_array_equal(read["strided"], ONE[:, ::2])
    np.testing.assert_array_equal(read["big endian"], ONE)
    np.testing.assert_array_equal(read["changed"], 0)


def test_shards_index_and_metadata(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, shard_bytes=30, metadata={"z": "1", "format": "mlx"}) as writer:
        for name in "abc":
            writer.add(name, ONE)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert files(out) == [*shards, INDEX_NAME]
    index = json.loads((out / INDEX_NAME).read_text())
    assert index == {
        "metadata": {"total_size": 72},
        "weight_map": dict(zip("abc", shards, strict=True)),
    }
    content = (out / shards[0]).read_bytes()
    assert content[8:].startswith(b'{"__metadata__":{"format":"mlx","z":"1"}')
    assert (len(content) - 24) % 8 == 0


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(tmp_path: Path, kind: type[BaseException]) -> None:
    out = tmp_path / "new" / "parents" / "out"

    def interrupted() -> None:
        with CheckpointWriter(out, shard_bytes=1) as writer:
            writer.add("a", ONE)
            writer.add("b", ONE)
            assert (out.parent / ".out.work/checkpoint/0.safetensors").is_file()
            raise kind

    with pytest.raises(kind):
        interrupted()
    assert files(tmp_path) == []
    write(out)
    assert files(out.parent) == ["out"]


def test_existing_places(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out)  # an empty folder counts as absent
    with pytest.raises(OutputExistsError, match="exists already"):
        write(out, 2)
    assert value_in(out) == 1
    write(out, 2, overwrite=True)
    assert value_in(out) == 2
    assert files(tmp_path) == ["out"]


def test_overwriting_spares_what_is_no_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    with pytest.raises(OutputError, match="is a file"):
        write(out, overwrite=True)
    assert out.read_text() == "precious"
    out.unlink()
    out.mkdir()
    for name in ("config.json", "notes.txt"):
        (out / name).touch()
        with pytest.raises(OutputError, match="not a checkpoint"):
            write(out, overwrite=True)
    (out / "model.safetensors").touch()
    (out / "folder").mkdir()
    with pytest.raises(OutputError, match="holds a folder, folder"):
        write(out, overwrite=True)
    assert len(files(out)) == 4
    with pytest.raises(OutputError):
        write(Path("/"), overwrite=True)
    assert files(tmp_path) == ["out"]


def test_the_source_is_never_touched(tmp_path: Path) -> None:
    source = tmp_path / "folder" / "source"
    write(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", source.parent, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(OutputError, match="overlaps"):
            write(out, 2, overwrite=True, source=source)
    write(tmp_path / "folder" / "source-2", source=source)
    assert value_in(source) == 1


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "out")
    write(link)
    write(link, 2, overwrite=True)
    assert link.is_symlink()
    assert value_in(tmp_path / "disk" / "out") == 2


def test_a_place_that_was_taken_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = CheckpointWriter(out).__enter__()
    writer.add("a", ONE)
    with pytest.raises(OutputError, match=f"another run .process {os.getpid()}. is writing it"):
        write(out, 7)
    write(tmp_path / "other", 7)
    (tmp_path / "other").rename(out)
    with pytest.raises(OutputExistsError):
        writer.__exit__(None, None, None)
    assert value_in(out) == 7
    assert files(tmp_path) == ["out"]


def test_the_old_folder_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "checkpoint" and target == out:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        write(out, 2, overwrite=True)
    assert value_in(out) == 1
    assert files(tmp_path) == ["out"]


def test_interrupted_while_the_old_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out)
    remove = shutil.rmtree

    def interrupted(folder: Path, **options: Any) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, 2, overwrite=True)
    assert value_in(out) == 2
    assert files(tmp_path) == ["out"]


def disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["_safetensors_header", "synchronize"])
def test_full_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(writer_module, step, disk_full)
    with pytest.raises(OutputError, match="out: cannot be written: No space left"):
        write(tmp_path / "out")
    assert files(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 250), tmp_path / "a\0b"):
        with pytest.raises(OutputError):
            write(out)
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda writer: writer.add("a", ONE), "added before"),
        (lambda writer: writer.add("__metadata__", ONE), "cannot be the name"),
        (lambda writer: writer.add("\ud800", ONE), "cannot be the name"),
        (lambda writer: writer.add("b", ONE.astype(complex)), "'b' has dtype complex128"),
        (lambda writer: writer.add("b", np.array(["x"])), "supported are"),
        (lambda writer: writer.add_part("a", ONE, 0, 2), "added before"),
        (lambda writer: writer.add_part("b", ONE, 0, 2), r"'b' lacks parts \[1\]"),
        (lambda writer: writer.add_part("b", ONE, 2, 2), "part 2 of tensor 'b'"),
        (lambda writer: [writer.add_part("b", ONE, 0, 3) for _ in "12"], "added before, or is not"),
        (
            lambda writer: [
                writer.add_part("b", each, i, 2) for i, each in enumerate([ONE, ONE[0]])
            ],
            "is not like the others",
        ),
        (lambda writer: writer.add("b", np.array([None])), "supported are"),
        (lambda writer: writer.write_text("../x", ""), "plain file name"),
        (lambda writer: writer.write_text("x.json", "") or writer.write_text("x.json", ""), "befo"),
        (lambda writer: writer.write_text("x.txt", "\ud800"), "surrogates"),
        (lambda writer: writer.write_text("model.safetensors", ""), "name for weights"),
        (lambda writer: writer.write_text(INDEX_NAME, ""), "name for weights"),
        (lambda writer: writer.write_json("x.json", {1, 2}), "as JSON"),
        (lambda writer: writer.add_file(Path("/absent")), "not a regular file"),
    ],
)
def test_misuse(tmp_path: Path, misuse: Callable[[CheckpointWriter], None], message: str) -> None:
    def misused() -> None:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.add("a", ONE)
            misuse(writer)

    with pytest.raises(CheckpointError, match=message):
        misused()
    assert files(tmp_path) == []


def test_a_writer_outside_of_a_with_statement(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    with pytest.raises(OutputError, match="with statement"):
        writer.add("a", ONE)
    with writer:
        pass
    with pytest.raises(OutputError, match="with statement"):
        writer.write_text("a", "")


def test_same_input_same_bytes(tmp_path: Path) -> None:
    metadata = {str(i): "x" for i in range(20)}
    write(tmp_path / "1", metadata=metadata)
    write(tmp_path / "2", metadata=dict(reversed(metadata.items())))
    first, second = ((tmp_path / i / "model.safetensors").read_bytes() for i in "12")
    assert first == second


def test_data_that_a_killed_run_has_left_are_not_stored(tmp_path: Path) -> None:
    out, array = tmp_path / "out", np.arange(12, dtype=np.float32)
    with WorkFolder(out) as work:
        (work.path / writer_module.DATA_NAME.format(0)).write_bytes(b"left")
        with CheckpointWriter(out, work=work) as writer:
            writer.add("a", array)
            writer.add("b", 2 * array)
            writer.write_json("config.json", {})
    with Checkpoint(out) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), array)
        np.testing.assert_array_equal(checkpoint.read("b"), 2 * array)
