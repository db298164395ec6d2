"""How a folder is loaded in the engines that read it, as model cards show it."""

import json
import os
import shlex
from typing import NamedTuple

from bitwright.errors import printable

PROMPT = "Once upon a time"


class Code(NamedTuple):
    """A piece of code, in the language ``"sh"`` or ``"python"``."""

    language: str
    text: str


def vllm_command(folder: str) -> Code:
    """Return how vLLM serves a folder."""
    return Code("sh", f"pip install vllm\nvllm serve {shell_word(folder)}")


def transformers_code(folder: str, needs: str = "", imports: str = "", argument: str = "") -> Code:
    """Return how transformers loads a folder, with packages that it needs and an argument beside it."""
    loaded = f"AutoModelForCausalLM.from_pretrained({python_string(folder)})"
    if argument:
        loaded = f"AutoModelForCausalLM.from_pretrained(\n    {python_string(folder)},\n    {argument},\n)"
    names = ", ".join(filter(None, ("AutoModelForCausalLM", "AutoTokenizer", imports)))
    packages = " ".join(filter(None, ("transformers", needs)))
    return Code(
        "python",
        f"from transformers import {names}  # pip install {packages}\n\n"
        f"model = {loaded}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({python_string(folder)})\n"
        f'inputs = tokenizer("{PROMPT}", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
    )


def python_string(text: str) -> str:
    """Write a string in Python.

    Examples
    --------
    >>> print(python_string("my q"))
    "my q"
    """
    return printable(json.dumps(text, ensure_ascii=False))


def shell_word(text: str) -> str:
    """Quote a word of a command for a shell; signs that nobody sees are told by their bytes.

    Examples
    --------
    >>> print(shell_word("my q"), shell_word("a\\x1b'"))
    'my q' $'a\\x1b\\x27'
    """
    if text.isprintable():
        return shlex.quote(text)
    told = (
        each
        if each.isprintable() and each not in "'\\"
        else "".join(f"\\x{byte:02x}" for byte in os.fsencode(each))
        for each in text
    )
    return f"$'{''.join(told)}'"
