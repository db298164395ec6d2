"""Print what transformers loads from folders that bring code of their own: a JSON object each."""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

modules = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = modules.name  # otherwise the home of whoever runs the tests

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

warnings.simplefilter("ignore")
logging.set_verbosity_error()
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": "a"}]
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    found = {
        "model": type(model).__name__,
        "own": getattr(model, "own", None),
        "tokenizer": type(tokenizer).__name__,
        "chat": tokenizer.apply_chat_template(messages, tokenize=False),
        "tools": tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False),
        "finite": bool(torch.isfinite(logits).all()),
    }
    print(json.dumps(found))
