"""Print what transformers makes of the chats of some folders: a JSON list each, null where it fails."""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer


def rendered(tokenizer, line):
    try:
        return tokenizer.apply_chat_template(
            line["messages"],
            tools=line.get("tools"),
            documents=line.get("documents"),
            tokenize=False,
        )
    except Exception:
        return None


for folder in map(Path, sys.argv[1:]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (folder / "chats.jsonl").read_text(encoding="utf-8").split("\n")
    print(json.dumps([rendered(tokenizer, json.loads(line)) for line in lines]))
