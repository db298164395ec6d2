"""Files of texts and chats, by their content: plain text, JSON, JSON lines, tables and Parquet."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitwright.errors import CalibrationError, MissingExtraError, shown
from bitwright.files.text_file import TEXT_LIMIT, read_text
from bitwright.text.record_shapes import KEYS
from bitwright.warned import warn

ARRAY, PARQUET = b"\x93NUMPY", b"PAR1"  # how files of these kinds begin
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
_DOCUMENTS = {b"%PDF": "a PDF document", b"\xd0\xcf\x11\xe0": "an Office document"}
LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
LOOKED_AT = 3  # lines that decide whether a file without an ending that tells it is JSON lines
CELL_LIMIT = 1 << 24  # characters
Record = tuple[str, Any]
"""Where a record is, for errors, and what it is: a value of JSON, or why it is none."""


class NoValue(str):
    """Why a line holds no value."""


def beginning(path: Path) -> bytes:
    """Return the first bytes of a file; nothing of one that is not regular, or cannot be read."""
    if not os.path.isfile(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError:
        return b""


def read_data(path: Path) -> str | list[Record]:
    """Read a file of texts or chats, but no array.

    What it is its content tells, and its ending only where that does not: tables have ``.csv`` or
    ``.tsv``, and lines of JSON that are no objects ``.jsonl``.

    Parameters
    ----------
    path : pathlib.Path
        Of the file.

    Returns
    -------
    str or list of tuple
        A plain text as it is; otherwise its records, and where each is.

    Raises
    ------
    CalibrationError
        If it cannot be read, or is not what its ending says.
    MissingExtraError
        If it is Parquet, and pyarrow is not installed.

    Examples
    --------
    >>> import bitwright
    >>> read_data(bitwright.demo_folder() / "evaluation.txt")[:10]
    'Once upon '
    """
    first, ending = beginning(path), path.suffix.lower()
    for kinds, what in (
        (_PACKED, "is packed by {}; unpack it"),
        (_DOCUMENTS, "is {}; give its text"),
    ):
        for begins, name in kinds.items():
            if first.startswith(begins):
                raise CalibrationError(f"{path}: {what.format(name)}")
    if first.startswith(PARQUET):
        return list(_parquet(path))
    text = read_text(path, TEXT_LIMIT)
    if ending in TABLES or _is_table(text):
        return list(_table(path, text))
    if ending in LINES or _is_lines(text):
        return list(_lines(path, text))
    return _whole(path, text) if text.lstrip()[:1] in ("[", "{") or ending == ".json" else text


def _is_lines(text: str) -> bool:
    """Tell whether the first lines of a text are objects in JSON, each in a line."""
    if not text.lstrip().startswith("{"):
        return False
    found, start = 0, 0
    while start < len(text) and found < LOOKED_AT:
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line = text[start:end].strip()
        start = end + 1
        if line:
            if not isinstance(_value(line), dict):
                return False
            found += 1
    return found > 1


def _is_table(text: str) -> bool:
    """Tell whether the first line of a text names columns, of which records have one or more."""
    names = re.split(r"[,;\t]", text.split("\n", 1)[0].strip())
    return len(names) > 1 and all(map(str.isidentifier, names)) and not KEYS.isdisjoint(names)


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return NoValue(f"is not valid JSON: {error}")


def _lines(path: Path, text: str) -> Iterator[Record]:
    # Not splitlines(): that would also split at separators which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _value(line)


def _whole(path: Path, text: str) -> str | list[Record]:
    """Return the records of a list, or of the one list in an object; a text that is neither is one."""
    value = _value(text)
    is_named = path.suffix.lower() == ".json"
    if isinstance(value, NoValue):
        if is_named:
            raise CalibrationError(f"{path}: {value}")
        return text
    if isinstance(value, dict):
        lists = [each for each in value.values() if _are_records(each)]
        # Some sets are an object around their list; an object of its own is one record.
        value = (
            lists[0]
            if len(lists) == 1 and not {"messages", "conversations"} & set(value)
            else [value]
        )
    if not _are_records(value):
        if is_named:
            raise CalibrationError(f"{path}: must hold a list of strings or objects")
        return text
    return [(f"{path}, item {number}", each) for number, each in enumerate(value, start=1)]


def _are_records(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, str | dict) for each in value)
    )


def _table(path: Path, text: str) -> Iterator[Record]:
    tabs, commas, semicolons = (text.split("\n", 1)[0].count(each) for each in "\t,;")
    delimiter = "\t" if tabs > max(commas, semicolons) else ";" if semicolons > commas else ","
    before = csv.field_size_limit(CELL_LIMIT)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = [each.strip() for each in next(rows, [])]
        for row in rows:
            if row:
                where = f"{path}, line {rows.line_num}"
                if len(row) == len(names):
                    yield where, dict(zip(names, row, strict=True))
                else:
                    yield where, NoValue(f"has {len(row)} columns, but the first line {len(names)}")
    except csv.Error as error:
        raise CalibrationError(f"{path}: is not a sound table: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: is Parquet, which takes pyarrow: pip install bitwright[parquet]"
        ) from error
    number, size = 0, 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    size += len(str(row).encode(errors="replace"))
                    if size > TEXT_LIMIT:
                        warn(
                            f"{path}: only its first {number - 1} of {file.metadata.num_rows} rows are "
                            f"read, {TEXT_LIMIT >> 20} MiB"
                        )
                        return
                    yield f"{path}, row {number}", row
    # The library raises errors of its own, some of which derive from ValueError.
    except (ValueError, OSError, MemoryError, RuntimeError, NotImplementedError) as error:
        raise CalibrationError(f"{path}: is not sound Parquet: {shown(str(error))}") from error
