"""The methods by name; each file of this folder lists its own under METHODS."""

import importlib
import pkgutil

import bitwright.methods
from bitwright.methods.method import Method


def known_methods() -> dict[str, Method]:
    """Return the methods of all files in this folder by name, in the order of the files' names."""
    return {
        method.name: method
        for module in sorted(pkgutil.iter_modules(bitwright.methods.__path__), key=lambda m: m.name)
        if module.name != "registry"
        for method in getattr(
            importlib.import_module(f"bitwright.methods.{module.name}"), "METHODS", ()
        )
    }


METHODS = known_methods()
