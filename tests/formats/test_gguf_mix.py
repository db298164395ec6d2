"""Named mixtures of tensor types are those that llama-quantize makes, tensor by tensor."""

import json
import re
from typing import Any

import pytest
from shared_data import TESTS

from bitwright.checkpoint.gguf_file import FILE_TYPE_ALIASES, FILE_TYPES
from bitwright.formats.gguf_mix import Mix, MixModel, types_of

KNOWN = json.loads((TESTS / "data" / "llama_quantize_types.json").read_text())
LETTERS = {letter: kind for kind, letter in KNOWN["letters"].items()}


def matrices(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name.replace("*", str(block)): tuple(shape)
        for name, shape in model["tensors"].items()
        for block in range(model["blocks"] if "*" in name else 1)
        if len(shape) > 1
    }


@pytest.mark.parametrize("title", KNOWN["models"])
def test_types_are_those_of_llama_quantize(title: str) -> None:
    model = KNOWN["models"][title]
    shapes = matrices(model)
    facts = MixModel(
        model["architecture"],
        model["blocks"],
        model["heads"],
        model["key_heads"],
        model["experts"],
    )
    compared = 0
    for case, word in KNOWN["types"][title].items():
        if word is None:  # llama.cpp wants an importance matrix
            continue
        name, plus, number = case.partition("+")
        options = dict(KNOWN["options"][int(number)][1]) if number else {}
        options["tensor_types"] = [
            pair  # llama.cpp passes over those that match nothing
            for pair in options.get("tensor_types", ())
            if any(re.search(pair[0], each) for each in shapes)
        ]
        expected = {
            each: LETTERS[letter] for each, letter in zip(sorted(shapes), word, strict=True)
        }
        found = types_of(Mix(name, has_imatrix=bool(plus), **options), shapes, facts)
        routers = {each for each in shapes if "ffn_gate_inp" in each}
        assert {each: chosen.type for each, chosen in found.items()} == {
            each: kind for each, kind in expected.items() if each not in routers
        }, case
        assert all(expected[each] == "F32" for each in routers)
        compared += 1
    assert compared >= 3


def test_all_names_were_compared() -> None:
    assert len(KNOWN["models"]) >= 6
    seen = {name.partition("+")[0] for name in KNOWN["types"]["tied"]}
    assert set(FILE_TYPES) - {"F32", "Q1_0", "Q2_0"} == seen


@pytest.mark.parametrize("name", [*FILE_TYPE_ALIASES, "q4_k_m", "Q8_0"])
def test_names_are_read_in_any_case_and_by_their_aliases(name: str) -> None:
    assert Mix(name).name == FILE_TYPE_ALIASES.get(name, name.upper())


def test_wrong_names_and_patterns_are_told() -> None:
    with pytest.raises(ValueError, match="type: there is no 'Q4_K_X'; near are .*Q4_K_M"):
        Mix("q4_k_x")
    with pytest.raises(ValueError, match="type: there is no 'GOOD'; there are F32, F16"):
        Mix("good")
    with pytest.raises(ValueError, match="output type: there is no 'Q4_K_M'; near are Q4_K"):
        Mix("Q4_K_M", output="q4_k_m")
    with pytest.raises(ValueError, match=r"tensor type: '\('"):
        Mix("Q4_K_M", tensor_types=[("(", "Q8_0")])
    model = MixModel("llama", 1, 1, 1)
    with pytest.raises(ValueError, match="'attn_z' is in no tensor's name; names are like blk"):
        types_of(
            Mix("Q4_0", tensor_types=[("attn_z", "Q8_0")]), {"blk.0.attn_q.weight": (2, 32)}, model
        )
