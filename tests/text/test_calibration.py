"""Calibration data: the same tokens from every kind of source, and errors that say what to do."""

import json
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import SHARED
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bitwright.errors import CalibrationError
from bitwright.text.samples import load_tokens

IDS = np.arange(20).reshape(4, 5)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Words "0" to "9", with settings that calibration has to ignore."""
    words = {str(i): i for i in range(10)} | {"[BOS]": 10, "[UNK]": 11}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 10)]
    )
    made.enable_truncation(3)
    made.enable_padding(length=7)
    return made


def test_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf0 1 2 3\n4 5 6 7")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for given_tokenizer in (tokenizer, tmp_path, str(tmp_path / "tokenizer.json")):
        tokens = load_tokens(path, tokenizer=given_tokenizer, length=3, vocab_size=12)
        np.testing.assert_array_equal(tokens, [[10, 0, 1], [10, 2, 3], [10, 4, 5], [10, 6, 7]])
        assert tokens.dtype == np.int32
        assert tokens.flags.c_contiguous
    assert tokenizer.truncation is not None
    np.testing.assert_array_equal(
        load_tokens(str(path), tokenizer=tokenizer, length=8, bos=False)[0], range(8)
    )
    path.write_text("1 " * 1200)
    assert load_tokens(path, tokenizer=tokenizer).shape == (2, 512)


def test_json_lines_and_lists(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.jsonl"
    separator = "\u2028"
    path.write_text(f'{{"text": "0 1", "id": 7}}\r\n\n"2{separator}3"\n', encoding="utf-8")
    expected = [[10, 0, 1, 2, 3]]
    np.testing.assert_array_equal(load_tokens(path, tokenizer=tokenizer, length=5), expected)
    tokens = load_tokens(["0 1", "2", "3 4"], tokenizer=tokenizer, length=3)
    np.testing.assert_array_equal(tokens, [[10, 0, 1], [10, 2, 3]])


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "uint8", ">i4", "uint64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(tmp_path: Path, dtype: str, order: str) -> None:
    array = np.array(IDS, dtype=dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "ids.npy", array)
    for source in (array, tmp_path / "ids.npy"):
        tokens = load_tokens(source)
        assert tokens.dtype == np.int32
        assert tokens.flags.c_contiguous
        np.testing.assert_array_equal(tokens, IDS)
        np.testing.assert_array_equal(load_tokens(source, length=2, samples=3), IDS[:3, :2])


def test_random_choice() -> None:
    array = np.arange(1000).reshape(100, 10)
    first, again, other = (load_tokens(array, samples=20, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first[:, 0])) == 20
    np.testing.assert_array_equal(first, array[first[:, 0] // 10])
    assert len(np.unique(load_tokens(array, seed=3)[:, 0])) == 100


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_samples_are_rows(rows: int, columns: int, data: st.DataObject) -> None:
    array = np.arange(rows * columns).reshape(rows, columns)
    samples = data.draw(st.integers(1, rows))
    length = data.draw(st.integers(1, columns))
    tokens = load_tokens(array, samples=samples, length=length, seed=data.draw(st.integers(0, 99)))
    assert tokens.shape == (samples, length)
    np.testing.assert_array_equal(tokens, array[tokens[:, 0] // columns, :length])


def test_only_the_chosen_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(1 << 22, 1 << 10))  # 32 GiB
    assert load_tokens(path, samples=4, seed=0).shape == (4, 1 << 10)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IDS[0], r"two dimensions \[samples, length\], but is int64 \[5\]"),
        (IDS * 1.0, "float64"),
        (IDS > 3, "bool"),
        (IDS.astype(object), "object"),
        (IDS.astype(str), "<U"),
        (IDS[:0], "is empty"),
        (IDS[:, :0], "is empty"),
        (IDS - 3, "token id -3 in sample 0, position 0 is not in 0..99"),
        (IDS * 10, "token id 190 in sample 3, position 4 is not in 0..99"),
        (IDS.astype(np.uint64) * 2**59, "is not in 0..99"),
    ],
)
def test_bad_arrays(tmp_path: Path, array: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match="the token array: .*" + message):
        load_tokens(array, vocab_size=100)
    if array.dtype != object:
        np.save(tmp_path / "ids.npy", array)
        with pytest.raises(CalibrationError, match=r"ids\.npy: "):
            load_tokens(tmp_path / "ids.npy", vocab_size=100)


def test_ids_that_int32_cannot_hold() -> None:
    with pytest.raises(CalibrationError, match="4294967296"):
        load_tokens(np.array([[1, 2**32]]))


def test_positions_are_those_of_the_source() -> None:
    array = np.zeros((50, 3), int)
    array[41, 2] = 9
    with pytest.raises(CalibrationError, match="sample 41, position 2"):
        load_tokens(array, seed=1, vocab_size=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 6}, "rows of 5 tokens, fewer than the length 6"),
        ({"samples": 5}, "5 samples were asked for, but there are 4"),
        ({"length": 0}, "length is 0"),
        ({"length": 2.5}, r"length is 2\.5"),
        ({"samples": -1}, "samples is -1"),
        ({"samples": True}, "samples is True"),
        ({"samples": 1, "seed": -1}, "seed is -1"),
        ({"samples": 1, "seed": "x"}, "seed is 'x'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_tokens(IDS, **options)


def header(text: str) -> bytes:
    padded = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        pickle.dumps(IDS),
        b"PK\x03\x04" + b"\0" * 100,
        header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3)}"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3)}") + b"abc",
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (-2, 3)}"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999, 99999999999)}"),
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (True, True)}") + b"abcd",
        header("{'descr': '<i4', 'fortran_order': False, 'shape': (0, 3)}"),
        header("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1, 1)}") + b"abcd",
        header("__import__('os').system('true')"),
        header("(" * 100),
    ],
)
def test_bad_npy_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"ids\.npy: "):
        load_tokens(path)


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 140), change=st.binary(max_size=8))
def test_damaged_npy_files_never_surprise(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    np.save(path, IDS)
    content = path.read_bytes()
    path.write_bytes(content[:place] + change + content[place + len(change) :])
    with suppress(CalibrationError):
        assert load_tokens(path, vocab_size=20).ndim == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "is empty"),
        ("x.txt", b"1 2 \xff", "not UTF-8 text, see byte 4"),
        ("x.txt", b"1 2", "has 2 tokens, too few for one sample of 512"),
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n\n", "is empty"),
        ("x.jsonl", b'"1"\n{"text": }', "line 2: is not valid JSON"),
        ("x.jsonl", b'"1"\n"\xff"', "byte 5"),
        ("x.jsonl", b"[" * 100_000, "line 1: is not valid JSON"),
        ("x.jsonl", b"9" * 5000, "line 1: is not valid JSON"),
        ("x.jsonl", b'{"text": 3}', r"line 1: must be a string.*\{'text': 3\}"),
        ("x.jsonl", b'{"prompt": "a"}', "line 1: must be a string"),
        ("x.jsonl", b"null", "line 1: must be a string"),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user"}]}',
            'line 1: is a chat.*no chat template.*"text"',
        ),
        ("x.jsonl", b'"\\ud800"', "tokenizers library failed"),
        ("x.csv", b"1,2", "is empty"),
    ],
)
def test_bad_text_files(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_tokens(path, tokenizer=tokenizer)
    assert str(path) in str(caught.value)


def test_missing_and_huge_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("x.txt", "x.npy", "nul\0.txt"):
        with pytest.raises(CalibrationError, match="no such file"):
            load_tokens(tmp_path / name, tokenizer=tokenizer)
    with open(tmp_path / "x.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CalibrationError, match="is larger than"):
        load_tokens(tmp_path / "x.txt", tokenizer=tokenizer)


def test_bad_lists(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="is empty"):
        load_tokens([], tokenizer=tokenizer)
    with pytest.raises(CalibrationError, match="strings only"):
        load_tokens(["a", 1], tokenizer=tokenizer)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff",
        b"[" * 10_000,
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
        b'{"version": "1.0", "model": {"type": "Nonsense"}}',
        # This one makes the library panic.
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, '
        b'"unk_token": ""}, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
    ],
)
def test_bad_tokenizers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"tokenizer\.json: the tokenizers library failed"):
        load_tokens(["text"], tokenizer=tmp_path)


def test_panics_and_interrupts(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    panic = type("PanicException", (BaseException,), {})
    for raised, expected in ((panic("boom"), CalibrationError), (KeyboardInterrupt(), None)):

        def fail(*_: object, error: BaseException = raised, **__: object) -> None:
            raise error

        monkeypatch.setattr("bitwright.text.samples.load_tokenizer", fail)
        with pytest.raises(expected or KeyboardInterrupt):
            load_tokens(["text"], tokenizer=tokenizer)


def test_missing_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"tokenizer\.json: is missing.*\.npy"):
        load_tokens(["text"], tokenizer=tmp_path)
    with pytest.raises(CalibrationError, match=r"needs a tokenizer.*\.npy"):
        load_tokens(["text"])


def test_a_tokenizer_of_another_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match=r"token id 9.*belong to this model"):
        load_tokens(["1 9 2"], tokenizer=tokenizer, length=3, vocab_size=9, bos=False)
    with pytest.raises(CalibrationError, match=r"token id 10 in sample 0, position 0.*this model"):
        load_tokens(["1 9 2"], tokenizer=tokenizer, length=3, vocab_size=9)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the test data in {SHARED}")
def test_shared_text(tmp_path: Path) -> None:
    path = SHARED / "text/wikitext2_valid.txt"
    text = "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:500])
    folder = SHARED / "models/small"
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = reference.encode(text, add_special_tokens=False).ids
    (tmp_path / "part.txt").write_text(text, encoding="utf-8")
    (tmp_path / "part.jsonl").write_text(json.dumps({"text": text}))
    for name in ("part.txt", "part.jsonl"):
        tokens = load_tokens(tmp_path / name, tokenizer=folder, length=256, vocab_size=4096)
        assert (tokens[:, 0] == 0).all()
        body = tokens[:, 1:]
        assert body.ravel().tolist() == ids[: body.size]
        assert len(ids) - body.size < 255
    assert load_tokens(SHARED / "text/small_calibration.npy", vocab_size=4096).shape == (64, 512)


def test_an_old_tokenizer_says_how_to_make_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"0")
    with pytest.raises(CalibrationError) as caught:
        load_tokens(["a text"], tokenizer=tmp_path)
    said = str(caught.value)
    assert said.startswith(
        f"{tmp_path}/tokenizer.model: is a tokenizer of sentencepiece or tiktoken"
    )
    assert f"T.from_pretrained({str(tmp_path)!r}).save_pretrained({str(tmp_path)!r})" in said
