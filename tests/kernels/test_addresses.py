"""The same numbers give the same bits wherever NumPy has put them.

Eigen computes what lies before the first aligned address one by one, in another order and with other
roundings than whole registers: every kernel is called on buffers at several distances from an aligned
address, and everything that it returns or writes is compared bit by bit."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import CASES, NAMES, bits, kernels_of_arrays

CPP = Path(__file__).parents[2] / "cpp"
PYTHON = Path(__file__).parents[2] / "python" / "bitwright"
OFFSETS = (0, 4, 8, 16, 32, 48)


def at_offset(value: Any, offset: int) -> Any:
    """Return a copy of an array that begins so many bytes after an address of whole cache lines."""
    if not isinstance(value, np.ndarray):
        return value
    memory = np.empty(value.nbytes + 128, np.uint8)
    offset -= offset % value.itemsize
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=NAMES)
def test_bits_do_not_depend_on_addresses(name: str, arguments: tuple[Any, ...]) -> None:
    found = [
        bits(name, tuple(at_offset(value, offset) for value in arguments)) for offset in OFFSETS
    ]
    for offset, other in zip(OFFSETS, found, strict=True):
        assert other == found[0], f"{name} at {offset} bytes"


def test_numpy_takes_no_products() -> None:
    """NumPy's BLAS has threads of its own, and other bits on other numbers of them."""
    products = re.compile(r"np\.(?:vdot|dot|inner|matmul|tensordot|linalg)\b|\w\)? @ \w")
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted(PYTHON.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if products.search(line) and not line.lstrip().startswith((">>>", "..."))
    ]
    assert not found, "\n".join(found)


def test_every_kernel_is_called() -> None:
    """A kernel that takes arrays and is in no case would not be compared."""
    assert kernels_of_arrays() == {name for name, _ in CASES}


def test_sums_are_taken_in_one_place() -> None:
    """Eigen's own sums over memory of others begin at the first aligned address: see linalg/sum.hpp."""
    sums = re.compile(r"(?:\.|->)(?:template )?(?:sum|mean|dot|squaredNorm|norm|prod|trace)\(")
    found = [
        f"{path.relative_to(CPP)}:{number}: {line.strip()}"
        for path in sorted(CPP.rglob("*.[ch]pp"))
        if path.name != "sum.hpp"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if sums.search(line.split("//")[0])
    ]
    assert not found, "\n".join(found)


def test_products_are_taken_in_one_place() -> None:
    """A product outside of parallel_for would be one of BLAS's own threads: see linalg/product.hpp."""
    products = re.compile(r"noalias\(\)|rankUpdate")
    found = {
        str(path.relative_to(CPP))
        for path in sorted(CPP.rglob("*.[ch]pp"))
        if any(products.search(line.split("//")[0]) for line in path.read_text().splitlines())
    }
    # Attention, recurrences, the fit of grids and blocks of outputs have their own pieces, each on one
    # thread.
    assert found == {
        "linalg/product.hpp",
        "nn/attention.cpp",
        "nn/recurrence.cpp",
        "quant/output_metric.cpp",
        "quant/refine.cpp",
        "quant/refine_two_sided.cpp",
        "quant/refine_vectors.cpp",
    }
