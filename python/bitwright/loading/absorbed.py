"""Latent attention as MLX stores it: the matrix of keys and values, split for queries and outputs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.formats import Format
from bitwright.models.architecture import LatentAttention


def join_absorbed(
    checkpoint: Checkpoint, attention: LatentAttention, blocks: Iterable[str], format: Format | None
) -> None:
    """Replace the two stacks of each block by the matrix that they were split from, in float.

    Of stacks that are quantized, groups lie across the rows of the matrix, so none of its own can be
    said to be.

    Parameters
    ----------
    checkpoint
        Whose tensors are joined.
    attention
        The names, within a block.
    blocks
        What precedes these.
    format
        What the stacks are stored in.
    """
    for block in blocks:
        stacks = [f"{block}{each}" for each in (attention.absorbed_key, attention.absorbed_value)]
        weights = [f"{each}.weight" for each in stacks]
        if not all(each in checkpoint for each in weights):
            continue
        ends = {"weight", *(() if format is None else format.parts)}
        parts = [f"{each}.{end}" for each in stacks for end in sorted(ends, reverse=True)]
        parts = [each for each in parts if each in checkpoint]
        joined = _Joined(format, *stacks)
        quantized = len(parts) > len(stacks)
        dtype = "F32" if quantized else checkpoint.stored_dtype(weights[0])
        shape = joined.shape(checkpoint)
        checkpoint.replace(
            parts, f"{block}{attention.key_value_up}.weight", dtype, shape, joined.make
        )
        for key in ("quantization", "quantization_config"):
            settings = checkpoint.config.get(key)
            if isinstance(settings, dict):
                left = {name: value for name, value in settings.items() if name not in stacks}
                checkpoint.config = {**checkpoint.config, key: left}


@dataclass(eq=False)
class _Joined:
    """Two stacks, of keys ``[heads, rank, channels]`` and of values ``[heads, channels, rank]``."""

    format: Format | None
    keys: str
    values: str

    def shape(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Return the shape of the matrix, for which one head is read."""
        key, value = (self._part(checkpoint, each, 0) for each in (self.keys, self.values))
        heads = checkpoint.shape(f"{self.keys}.weight")[0]
        return heads * (key.shape[1] + len(value)), len(key)

    def make(self, checkpoint: Checkpoint) -> NDArray[np.generic]:
        """Return the matrix: of each head the rows for its keys, then those for its values."""
        rows = []
        for head in range(checkpoint.shape(f"{self.keys}.weight")[0]):
            rows.append(self._part(checkpoint, self.keys, head).T)
            rows.append(self._part(checkpoint, self.values, head))
        return np.concatenate(rows)

    def _part(self, checkpoint: Checkpoint, name: str, head: int) -> NDArray[np.generic]:
        found = None
        if self.format is not None:
            found = self.format.read(CheckpointSlice(checkpoint, head), name)
        if found is None:
            return checkpoint.read_part(f"{name}.weight", head)
        return found.dequantize()
