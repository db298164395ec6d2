"""Every example in a docstring runs and says what it gives, and every public name has one."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import bitwright

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(bitwright.__path__, "bitwright.")
    if not info.name.rpartition(".")[2].startswith("_")
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", bitwright.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(bitwright, name)
    assert public.__doc__
    if callable(public) and not isinstance(public, type):
        assert ">>> " in public.__doc__
