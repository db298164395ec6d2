"""Old names of arguments, which are read as the present ones; test_command_options.py has the options."""

from typing import Any

import pytest

import bitwright
from bitwright.spellings import Old, respelled

TEXT = bitwright.demo_folder() / "calibration.txt"


@respelled(Old("data", "special", beside="text"), Old("data", "text"))
def given(model: str, text: Any = None, *, special: Any = None) -> tuple[Any, ...]:
    return model, text, special


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic_quantize": ({"target_bpw": 4.5, "data": TEXT, "evaluate_on": TEXT}, "model"),
    "dwq_quantize": ({"teacher": "nowhere", "student": "no", "data": TEXT}, ""),
    "estimate_sensitivities": ({"data": TEXT}, "model"),
    "evaluate": ({"text": TEXT}, "model"),
    "refine_model": ({"original": "nowhere", "quantized": "no", "calibration": TEXT}, ""),
    "convert": ({"source": "nowhere", "format": "float"}, ""),
    "compute_dwq_targets": ({"data": TEXT}, "model"),
}


@pytest.mark.parametrize("name", CALLS)
def test_public_functions_take_old_names(name: str, tmp_path: Any) -> None:
    """So far that the model, which is not there, is named."""
    arguments, model = CALLS[name]
    if name not in ("estimate_sensitivities", "evaluate"):
        arguments = {**arguments, "out": tmp_path / "out"}
    with (
        pytest.warns(DeprecationWarning, match=f"{name}: .* is spelled .* now") as notes,
        pytest.raises(bitwright.CheckpointNotFoundError, match="nowhere"),
    ):
        getattr(bitwright, name)(**arguments, **({model: "nowhere"} if model else {}))
    assert {each.filename for each in notes} == {__file__}
    assert len(notes) == len({"data", "evaluate_on", "text", "source"} & set(arguments)) + 2 * (
        "teacher" in arguments or "original" in arguments
    )


def test_old_names_are_those_that_hold() -> None:
    with pytest.warns(DeprecationWarning, match="given: data is spelled text now"):
        assert given("m", data=1) == ("m", 1, None)
    with pytest.warns(DeprecationWarning, match="given: data is spelled special now"):
        assert given("m", data=1, text=2) == ("m", 2, 1)


def test_present_names_give_no_note() -> None:
    assert given("m", 1, special=2) == ("m", 1, 2)
    assert given(model="m", text=1) == ("m", 1, None)


@pytest.mark.parametrize("arguments", [{"data": 1, "text": 2, "special": 3}, {"words": 1}])
def test_what_is_given_twice_or_unknown_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        given("m", **arguments)
