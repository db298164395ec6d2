"""Biases of stacked experts: of gate and up in one tensor as stored, in one each as they are used."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.reader import Made
from bitwright.models.architecture import Experts


def split_biases(checkpoint: Checkpoint, experts: Experts, blocks: Iterable[str]) -> None:
    """Replace the biases of stacks by those of gate, up and down, named as MLX names them.

    Parameters
    ----------
    checkpoint
        Whose tensors are replaced.
    experts
        The names, within a block.
    blocks
        What precedes these.
    """
    stack = experts.own_stack
    if stack.gate_up_bias is None or stack.down_bias is None:
        return
    made: list[Made] = []
    renamed: dict[str, str] = {}
    for block in blocks:
        both, down = block + stack.gate_up_bias, block + stack.down_bias
        if both not in checkpoint or down not in checkpoint:
            continue
        count, width = checkpoint.shape(both)
        dtype, half = checkpoint.stored_dtype(both), width // 2
        gates, ups = slice(0, half), slice(half, None)
        if stack.interleaved:
            gates, ups = slice(0, None, 2), slice(1, None, 2)
        for role, columns in (("gate", gates), ("up", ups)):
            name = f"{block}{experts.stacked}.{role}_proj.bias"
            make = partial(_columns, name=both, columns=columns)
            made.append(Made.whole((both,), name, dtype, (count, half), make))
        renamed[down] = f"{block}{experts.stacked}.down_proj.bias"
    checkpoint.replace_all(made)
    checkpoint.rename(renamed)


def _columns(checkpoint: Checkpoint, name: str, columns: slice) -> NDArray[np.generic]:
    return checkpoint.read(name)[:, columns].copy()
