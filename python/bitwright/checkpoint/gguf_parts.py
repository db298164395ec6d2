"""Names of the files of a model in several GGUF files, as llama.cpp counts them."""

import os
import re
from pathlib import Path

from bitwright.checkpoint.reader import Checkpoint
from bitwright.errors import CheckpointNotFoundError

MOST_PARTS = 1000  # the largest public models are in some dozens of files
_FLOATS = re.compile(r"-(F32|F16|BF16)$", re.IGNORECASE)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_name(stem: str, number: int, count: int) -> str:
    """Name a part, the first is 0; a model in one file has no number.

    Examples
    --------
    >>> part_name("model", 0, 3), part_name("model", 0, 1)
    ('model-00001-of-00003.gguf', 'model.gguf')
    """
    return f"{stem}.gguf" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def stem_of(path: Path) -> str:
    """Return the name of a model's file without ending and number.

    Examples
    --------
    >>> stem_of(Path("model-00002-of-00003.gguf")), stem_of(Path("model.gguf"))
    ('model', 'model')
    """
    match = _PART.fullmatch(path.name)
    return match[1] if match else path.stem


def named_after(checkpoint: Checkpoint) -> str:
    """Return what the files that are made of a checkpoint are named after: its folder, or its file without
    number and type of floats."""
    path = Path(os.path.abspath(checkpoint.source))
    return _FLOATS.sub("", stem_of(path)) if path.suffix == ".gguf" else path.name


def parts_of(path: Path) -> list[Path]:
    """Return the files that hold a model together with one of them, in order; most hold one alone."""
    match = _PART.fullmatch(path.name)
    if match is None or not 0 < int(match[2]) <= int(match[3]) <= MOST_PARTS:
        return [path]
    count = int(match[3])
    return [path.with_name(part_name(match[1], number, count)) for number in range(count)]


def check_parts(paths: list[Path]) -> None:
    """Raise CheckpointNotFoundError unless all of these files are there."""
    absent = [path for path in paths if not os.path.isfile(path)]
    if not absent:
        return
    if len(paths) == 1:
        raise CheckpointNotFoundError(f"{paths[0]}: there is no such file")
    raise CheckpointNotFoundError(
        f"{absent[0]}: is missing, though the model is in {len(paths)} files. Download it"
    )
