"""Gated delta-nets as mlx-lm writes them: convolutions with the channels last, and gains of norms that
other files store less one."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.reader import Made
from bitwright.models.architecture import Architecture, Attention, GatedDelta


def undo_shifts(
    checkpoint: Checkpoint, architecture: Architecture, blocks: Iterable[str], final_norm: str
) -> None:
    """Replace what mlx-lm has changed by what it was made of, if it has.

    Parameters
    ----------
    checkpoint
        Whose tensors are replaced.
    architecture
        The names, within a block.
    blocks
        What precedes these.
    final_norm
        The last norm.
    """
    deltas = [each for each in architecture.mixers.values() if isinstance(each, GatedDelta)]
    if not deltas:
        return
    attention = architecture.attention
    norms = [architecture.attention_norm, architecture.mlp_norm]
    if isinstance(attention, Attention):
        norms += [attention.query_norm, attention.key_norm]
    made: list[Made] = []
    names = [f"{final_norm}.weight"]
    for block in blocks:
        names += [f"{block}{norm}.weight" for norm in norms if norm is not None]
        convolution = f"{block}{deltas[0].convolution}.weight"
        shape = checkpoint.shape(convolution) if convolution in checkpoint else ()
        if len(shape) == 3 and shape[2] == 1 and shape[1] > 1:
            dtype = checkpoint.stored_dtype(convolution)
            make = partial(_channels_first, name=convolution)
            whole = (convolution,), convolution, dtype, (shape[0], 1, shape[1])
            made.append(Made.whole(*whole, make))
    for name in names if made else ():
        if name in checkpoint:
            make = partial(_less_one, name=name)
            made.append(Made.whole((name,), name, "F32", checkpoint.shape(name), make))
    checkpoint.replace_all(made)


def _channels_first(checkpoint: Checkpoint, name: str) -> NDArray[np.generic]:
    return np.ascontiguousarray(checkpoint.read(name).swapaxes(1, 2))


def _less_one(checkpoint: Checkpoint, name: str) -> NDArray[np.generic]:
    return np.asarray(checkpoint.read(name).astype(np.float32) - np.float32(1))
