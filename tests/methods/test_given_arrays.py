"""Kernels take the arrays that people have, copied only where they must be."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bitwright
from bitwright.arrays import floats

DRAWS = np.random.default_rng(0)
INPUTS = DRAWS.standard_normal((24, 64), np.float32)
WEIGHT = DRAWS.standard_normal((32, 64), np.float32)


class Tensor:
    """A tensor of another library, which gives its memory by DLPack."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, **more: Any) -> Any:
        return self.array.__dlpack__(**more)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


FORMS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda array: array.astype(np.float64),
    "other byte order": lambda array: array.astype(">f4"),
    "columns": lambda array: np.asfortranarray(array),
    "every other column": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "DLPack": Tensor,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_numbers_in_other_forms(form: str) -> None:
    change = FORMS[form]
    gram = bitwright.gram(INPUTS)
    assert np.array_equal(bitwright.gram(change(INPUTS)), gram)
    for make in (
        lambda weight, _: bitwright.quantize_rtn(weight),
        lambda weight, second: bitwright.quantize_gptq(weight, second),
    ):
        expected, found = make(WEIGHT, gram), make(change(WEIGHT), change(gram))
        assert np.array_equal(found.codes, expected.codes)
        assert np.array_equal(found.scales, expected.scales)


def test_batches() -> None:
    assert np.array_equal(bitwright.gram(INPUTS.reshape(4, 6, 64)), bitwright.gram(INPUTS))


def test_nothing_is_copied_without_need() -> None:
    assert floats(INPUTS) is INPUTS
    assert np.shares_memory(floats(Tensor(INPUTS)), INPUTS)
    assert np.shares_memory(floats(INPUTS.reshape(4, 6, 64), rows=True), INPUTS)
    half = WEIGHT.astype(ml_dtypes.bfloat16)
    assert np.shares_memory(floats(half, halves=True), half)
    assert floats(half).dtype == np.float32


def test_printed() -> None:
    model = bitwright.load_model(bitwright.demo_folder())
    assert str(model) == "<Model demo_data: llama in float, 3 blocks, 64 channels, 512 tokens>"
