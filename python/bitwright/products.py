"""Products of states with weights and with each other, in float32 or in bfloat16.

In bfloat16 both factors are rounded, and sums are in float32, see cpp/linalg/bfloat16_product.hpp. A run
says which it takes (`products_in`); what it solves with stays in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright import _kernels
from bitwright.errors import check_choice
from bitwright.ranks import current

Products = Literal["auto", "float32", "bfloat16"]
PRODUCTS: tuple[Products, ...] = ("auto", "float32", "bfloat16")
_taken: ContextVar[str] = ContextVar("products", default="float32")


def products_for(asked: str, stored: DTypeLike) -> str:
    """Return which products a run takes, the same on all of its ranks, which call this together.

    Parameters
    ----------
    asked
        ``"auto"`` is bfloat16 where the processors of all ranks multiply it and weights are stored in it.
    stored
        The dtype of the model's weights.

    Returns
    -------
    str
        ``"float32"`` or ``"bfloat16"``.

    Raises
    ------
    ValueError
        If bfloat16 is asked for by name, and a processor has no instruction for it.
    """
    check_choice("precision", asked, PRODUCTS)
    if asked == "float32":
        return asked
    able = current().all(_kernels.multiplies_bfloat16())
    if asked == "bfloat16" and not able:
        where = "this processor has" if current().size == 1 else "the processors of some ranks have"
        raise ValueError(
            f"precision: {where} no products in bfloat16 (AVX512-BF16); take auto or float32 (--precision)"
        )
    if asked == "auto":
        return "bfloat16" if able and np.dtype(stored).name == "bfloat16" else "float32"
    return asked


@contextmanager
def products_in(taken: str) -> Iterator[None]:
    """Take products in float32 or bfloat16 inside the block, in this thread."""
    token = _taken.set(taken)
    try:
        yield
    finally:
        _taken.reset(token)


def taken_products() -> str:
    """Return what products are taken in here."""
    return _taken.get()


def linear(
    states: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    out: NDArray[Any],
    accumulate: bool,
) -> None:
    """Write states ``[tokens, in]`` · weightᵀ + bias to `out` ``[tokens, out]``, or add it."""
    if not _in_bfloat16(states):
        _kernels.linear(states, weight, bias, out, accumulate)
        return
    _kernels.bfloat16_product(states, True, weight, True, out, accumulate)
    if bias is not None:
        out += bias


def add_gram(states: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Add XᵀX of states X ``[tokens, in]`` to the lower triangle of `out`."""
    if _in_bfloat16(states):
        _kernels.bfloat16_product(states, False, states, False, out, True, lower=True)
    elif len(states):
        _kernels.accumulate_gram(states, out)


def add_cross_gram(
    others: NDArray[np.float32], states: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Add YᵀX of others Y ``[tokens, out]`` and states X ``[tokens, in]`` to `out` ``[out, in]``."""
    if _in_bfloat16(states):
        _kernels.bfloat16_product(others, False, states, False, out, True)
    else:
        _kernels.linear_backward_weight(others, states, out)


def _in_bfloat16(states: NDArray[Any]) -> bool:
    return _taken.get() == "bfloat16" and states.dtype == np.float32 and len(states) > 0
