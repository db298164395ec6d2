"""Make the calibration text that the package carries: prose in many languages, documentation, code, chats.

    python bench/text/make_calibration_text.py

Run it with CPython 3.11, whose documentation is one of the parts. It writes calibration.jsonl, and
SOURCES.md with source and licence of every part, into python/bitwright/calibration_data/."""

import hashlib
import json
import platform
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "python" / "bitwright" / "calibration_data"
PIECE = 1500  # characters; about a sample's worth
DOCUMENTS = ("README.md", "docs/design.md", "docs/architecture.md")
CODE = (
    *("python/bitwright/methods/gptq.py", "python/bitwright/models/rope.py"),
    *("python/bitwright/runs/journal.py", "python/bitwright/files/links.py"),
    *("python/bitwright/presets/best.py", "cpp/quant/gptq.cpp", "cpp/linalg/cholesky.cpp"),
)
TOPICS = 130_000  # characters of Python's documentation


def pieces(text: str) -> Iterator[str]:
    """Cut a text at blank lines into pieces of about `PIECE` characters."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > PIECE:
            yield piece
            piece = ""
        piece += f"\n\n{paragraph}" if piece else paragraph
    if len(piece) > PIECE // 4:
        yield piece


def documentation() -> Iterator[str]:
    """Yield pieces of Python's documentation, of its topics in the order of their names."""
    taken = 0
    for name in sorted(topics):
        for piece in pieces(re.sub(r"^\*{3,}$", "", topics[name], flags=re.M).strip()):
            if taken < TOPICS:
                taken += len(piece)
                yield piece


def main() -> None:
    written = Path(__file__).with_name("own.jsonl").read_text(encoding="utf-8")
    own = [json.loads(line) for line in written.splitlines()]
    records: list[dict[str, Any]] = [
        {"text": each["text"]} if "text" in each else each for each in own
    ]
    for name in (*DOCUMENTS, *CODE):
        if (ROOT / name).is_file():
            records += [
                {"text": each} for each in pieces((ROOT / name).read_text(encoding="utf-8"))
            ]
    records += [{"text": each} for each in documentation()]
    lines = [json.dumps(each, ensure_ascii=False) for each in records]
    lines.sort(key=lambda each: hashlib.sha256(each.encode()).digest())  # mixed, and always alike
    OUT.mkdir(exist_ok=True)
    (OUT / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prefix = Path(sysconfig.get_path("stdlib"))
    shutil.copy(prefix / "LICENSE.txt", OUT / "PYTHON-LICENSE.txt")
    languages = ", ".join(each["language"] for each in own if "text" in each)
    chats = sum("messages" in each for each in own)
    rows = (
        ("part", "source", "licence"),
        ("---", "---", "---"),
        (
            f"prose ({languages}) and {chats} chats",
            "written for bitwright, `bench/text/own.jsonl`",
            "Apache-2.0",
        ),
        ("documents in English", f"bitwright's own: {', '.join(DOCUMENTS)}", "Apache-2.0"),
        ("code in Python and C++", f"bitwright's own: {', '.join(CODE)}", "Apache-2.0"),
        (
            "documentation of Python",
            f"`pydoc_data.topics` of CPython {platform.python_version()}; cut into pieces, lines of "
            f"asterisks left out. Copyright © 2001 Python Software Foundation; all rights reserved",
            "PSF-2.0, PYTHON-LICENSE.txt",
        ),
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    head = "# Sources of calibration.jsonl\n\nMade by `bench/text/make_calibration_text.py`.\n\n"
    (OUT / "SOURCES.md").write_text(f"{head}{table}\n", encoding="utf-8")
    size = sum(len(line.encode()) + 1 for line in lines)
    print(f"{len(lines)} records, {size:,} bytes in {OUT}")


if __name__ == "__main__":
    main()
