"""Files of texts by their content, in the shapes that public data sets have, several with shares."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import bitwright
from bitwright import CalibrationError, TextFiles, load_tokens
from bitwright.text.builtin import calibration_text
from bitwright.text.data_files import read_data
from bitwright.text.record_shapes import ShapeError, text_or_chat
from bitwright.text.samples import load_samples

DEMO = bitwright.demo_folder()


def says(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


ASKED = says(("user", "2 + 2?"), ("assistant", "4"))
SHAPES = [
    ("a", "a"),
    ({"text": "a", "messages": None}, "a"),
    ({"content": "a", "id": 3}, "a"),
    ({"query": "a"}, "a"),
    ({"chosen": "a", "rejected": "b"}, "a"),
    (ASKED, ASKED),
    (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        ASKED,
    ),
    ({"conversations": ASKED["messages"]}, ASKED),
    (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}]},
        says(("system", "s"), ("user", "h")),
    ),
    ({"prompt": "2 + 2?", "completion": "4"}, {"prompt": "2 + 2?", "completion": "4"}),
    ({"prompt": ASKED["messages"][:1], "completion": ASKED["messages"][1:]}, ASKED),
    ({"prompt": "2 + 2?", "response": "4"}, ASKED),
    ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, ASKED),
    ({"prompt": "2 + 2?", "chosen": ASKED["messages"], "rejected": []}, ASKED),
    ({"chosen": ASKED["messages"], "rejected": []}, ASKED),
    ({"question": "2 + 2?", "answer": "4"}, ASKED),
    ({"instruction": "2 + 2?", "input": "", "output": "4"}, ASKED),
    (
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        says(("user", "Add.\n\n2 + 2"), ("assistant", "4")),
    ),
    (
        {"system": "s", "instruction": "i", "output": "o"},
        says(("system", "s"), ("user", "i"), ("assistant", "o")),
    ),
    ({"messages": json.dumps(ASKED["messages"])}, ASKED),
]


@pytest.mark.parametrize(("record", "expected"), SHAPES)
def test_shapes(record: Any, expected: Any) -> None:
    assert text_or_chat(record) == expected


@pytest.mark.parametrize(
    ("record", "key", "expected"),
    [
        ({"body": "a", "text": "b"}, "body", "a"),
        ({"row": {"deep": "a"}}, "row.deep", "a"),
        ({"a.b": "c"}, "a.b", "c"),
        ({"talk": ASKED["messages"]}, "talk", ASKED),
    ],
)
def test_keys(record: Any, key: str, expected: Any) -> None:
    assert text_or_chat(record, key) == expected


@pytest.mark.parametrize("record", [3, None, [], {}, {"text": 5}, {"prompt": "a"}, {"body": "a"}])
def test_what_holds_no_text(record: Any) -> None:
    with pytest.raises(ShapeError, match="must be a string, or an object with"):
        text_or_chat(record)


RECORDS = [{"text": "one"}, {"text": 'two, or "2"'}, {"text": "drei\nZeilen ü"}]
LINES = "\n".join(json.dumps(each) for each in RECORDS)
TABLE = 'text,id\none,1\n"two, or ""2""",2\n"drei\nZeilen ü",3\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.txt", LINES),
        ("a", LINES + "\n\n"),
        ("A.JSON", json.dumps(RECORDS)),
        ("a.json", LINES),
        ("a.data", json.dumps(RECORDS, indent=2)),
        ("a.json", json.dumps({"version": 1, "data": RECORDS})),
        ("a.csv", TABLE),
        ("a.CSV", TABLE.replace("\n", "\r\n").replace("drei\r\n", "drei\n")),
        ("a.tsv", re.sub(r",(?=id|\d)", "\t", TABLE)),
        ("a.txt", "\ufeff" + TABLE),
    ],
)  # fmt: skip
def test_files_by_their_content(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    data = read_data(path)
    assert not isinstance(data, str)
    assert [text_or_chat(value) for _, value in data] == [each["text"] for each in RECORDS]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.utf8", "a", "a.text"])
@pytest.mark.parametrize(
    "content", ["# A title\n\nProse.", "[1] a footnote", "{ a set }", "Text, and more\nof it, here"]
)
def test_other_files_are_plain_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_data(tmp_path / name) == content


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, rows in (("text", RECORDS), ("chat", [ASKED, ASKED])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        data = read_data(tmp_path / name)
        assert not isinstance(data, str)
        assert [text_or_chat(value) for _, value in data] == [text_or_chat(each) for each in rows]
    (tmp_path / "bad").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(CalibrationError, match="bad: is not sound Parquet"):
        read_data(tmp_path / "bad")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\x1f\x8b\x08", "is packed by gzip; unpack it"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "is packed by zstd"),
        ("a.txt", b"%PDF-1.7", "is a PDF document; give its text"),
        ("a.json", b"[1, 2]", "must hold a list of strings or objects"),
        ("a.json", b"[", "is not valid JSON"),
        ("a.csv", b'a,b\n"1,2\n', "is not a sound table"),
        (
            "a.csv",
            b"id,name\n1,x\n",
            'line 2: must be a string, or an object with "text".*--text-key',
        ),
        ("a.csv", b"text,id\n1,x,3\n", "line 2: has 3 columns, but the first line 2"),
    ],
)
def test_files_that_are_no_texts(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=said) as caught:
        load_tokens(tmp_path / name, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def test_what_is_of_no_use_is_counted_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "one"}'] * 40
    lines[3], lines[20], lines[30] = '{"id": 3}', "{broken", '{"text": null}'
    path.write_text("\n".join(lines))
    said = r"3 of 40 records are of no use, and left out. The first: .*a.jsonl, line 4: must be"
    with pytest.warns(bitwright.BitwrightWarning, match=said):
        tokens = load_tokens(path, tokenizer=tokenizer, length=1)
    assert tokens.tolist() == [[0]] * 37
    path.write_text("\n".join(lines[:21] + lines[3:4] * 9))
    said = r"line 4: must be .* \(4 of 30 records are of no use up to here; one of 10 would be left out"
    with pytest.raises(CalibrationError, match=said):
        load_tokens(path, tokenizer=tokenizer, length=1)


@pytest.mark.parametrize(
    ("spelled", "samples", "counts"),
    [
        ("{0}/a:3,{0}/b.jsonl:1", 8, [6, 2]),
        ("{0}/a:3,{0}/b.jsonl:1", None, [30, 10]),
        ("{0}/b.jsonl,{0}/a", 4, [2, 2]),
        ("{0}/a:0.5,{0}/b.jsonl:1.5", 4, [1, 3]),
    ],
)
def test_shares(
    tmp_path: Path, tokenizer: Tokenizer, spelled: str, samples: int | None, counts: list[int]
) -> None:
    (tmp_path / "a").write_text("one " * 30)
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n' * 30)
    files = TextFiles.of(spelled.format(tmp_path), "body")
    tokens = load_tokens(files, tokenizer=tokenizer, length=1, samples=samples, seed=0)
    ids = [0, 1] if spelled.startswith("{0}/a") else [1, 0]
    assert tokens[:, 0].tolist() == [*[ids[0]] * counts[0], *[ids[1]] * counts[1]]
    shares = dict(files.files)
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n' * 30)
    same = load_tokens(shares, tokenizer=tokenizer, length=1, samples=samples, seed=0)
    assert np.array_equal(same, tokens)


def test_shares_that_cannot_be(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a").write_text("one " * 4)
    np.save(tmp_path / "b.npy", np.zeros((3, 7), np.int32))
    np.save(tmp_path / "c.npy", np.zeros((3, 8), np.int32))

    def fails(spelled: str, **more: Any) -> str:
        with pytest.raises(CalibrationError) as caught:
            load_tokens(spelled.format(tmp_path), tokenizer=tokenizer, **more)
        return str(caught.value)

    assert "its share is 0.0, but must be above 0" in fails("{0}/a:0,{0}/b.npy")
    assert "its share is 1e+300, but must be" in fails("{0}/a:1e300,{0}/b.npy")
    for share in ("1e-320", "0.001"):
        said = fails(f"{{0}}/a:{share},{{0}}/a", samples=2, length=1)
        assert f"/a: its share of 2 samples, {float(share):g}, is less than one" in said
    assert "names no file before or after a comma" in fails("{0}/a:1,")
    assert "/d: there is no such file" in fails("{0}/a:1,{0}/d:1")
    assert "Ask for one length" in fails("{0}/b.npy,{0}/c.npy")
    assert "were asked for, but there are" in fails("{0}/a:9,{0}/b.npy:1", length=2, samples=10)


def test_a_key_of_plain_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a").write_text("one")
    with pytest.raises(CalibrationError, match="is plain text without records"):
        load_tokens(TextFiles.of(tmp_path / "a", "body"), tokenizer=tokenizer, length=1)


def test_a_file_whose_name_has_colons_and_commas(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a:1,b:2").write_text("one")
    assert load_tokens(f"{tmp_path}/a:1,b:2", tokenizer=tokenizer, length=1).tolist() == [[0]]


def test_the_text_that_the_package_carries() -> None:
    """It serves models with and without a template; sources and licences are told beside it."""
    data = read_data(calibration_text())
    assert not isinstance(data, str)
    assert 200_000 < calibration_text().stat().st_size < 400_000
    kinds = [isinstance(text_or_chat(value), str) for _, value in data]
    assert len(kinds) - sum(kinds) >= 10
    whole = calibration_text().read_text()
    assert all(
        word in whole for word in ("def ", "Пасічник", "计算机", "灯台", "template <", "Fähre")
    )
    sources = calibration_text().with_name("SOURCES.md").read_text()
    assert "Apache-2.0" in sources
    assert "PSF-2.0" in sources
    given = {"tokenizer": DEMO, "length": 64, "vocab_size": 512, "positions": None}
    assert len(load_samples(calibration_text(), samples=None, **given).tokens) > 500


def test_it_is_used_where_no_other_is_given(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 4, "length": 64, "progress": False}
    with pytest.warns(bitwright.BitwrightWarning, match="the built-in one is used") as caught:
        report = bitwright.quantize(DEMO, tmp_path / "a", **settings)
    assert len(caught) == 1
    assert any("built-in" in each for each in report.warnings)
    given = bitwright.quantize(DEMO, tmp_path / "b", calibration=calibration_text(), **settings)
    assert not given.warnings
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert not bitwright.quantize(DEMO, tmp_path / "c", "rtn", progress=False).warnings
