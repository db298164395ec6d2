"""Files from strangers never surprise: they work, or are refused in words that name them."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings

from hostile.changes import Case
from hostile.draws import cases
from hostile.targets import TARGETS, survives

EXAMPLES = 60


def hypothesis_test(name: str) -> Callable[[], None]:
    """Return the test of a target."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(TARGETS[name]))
    def test(case: Case) -> None:
        survives(TARGETS[name], case)

    return test


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_sound_files_work(name: str) -> None:
    """What is changed below is read here as it is, by everything."""
    target = TARGETS[name]
    for variant in target.files():
        for task in target.tasks:
            survives(target, Case(variant, task, ()), must_work=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_never_surprise(name: str) -> None:
    hypothesis_test(name)()
