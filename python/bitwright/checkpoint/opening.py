"""Opens a checkpoint of either kind, safetensors or GGUF."""

import os
from pathlib import Path

from bitwright.checkpoint.adapter import AdapterCheckpoint, is_adapter
from bitwright.checkpoint.gguf import GgufCheckpoint
from bitwright.checkpoint.gguf_parts import parts_of
from bitwright.checkpoint.reader import Checkpoint
from bitwright.errors import CheckpointError


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint.

    Parameters
    ----------
    path : str or os.PathLike
        A folder with config.json and safetensors files, a GGUF file, a folder with one, or an adapter's; of
        a model in several GGUF files any of them.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointNotFoundError, CheckpointError, UnsupportedModelError
        If it is absent, damaged or not supported.
    """
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        return GgufCheckpoint(place)
    if is_adapter(place):
        return AdapterCheckpoint(place)
    if place.is_dir() and not any(place.glob("*.safetensors*")):
        files = sorted(place.glob("*.gguf"))
        if files and not set(files) <= set(parts_of(files[0])):
            raise CheckpointError(
                f"{place}: holds {len(files)} GGUF files, {files[0].name} for one; give the path of "
                f"the file to read"
            )
        if files:
            return GgufCheckpoint(files[0])
    return Checkpoint(place)
