"""The layers of the package: each module imports only from its own folder and from layers before it."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "bitwright"
LAYERS = (
    *("errors", "markup", "ranks", "warned", "spellings", "process"),
    *("_kernels", "build", "arrays", "files"),
    *("grids", "methods", "models", "text", "checkpoint", "formats", "loading"),
    *("runs", "evaluation", "records", "distill", "precision", "statistics", "blocks"),
    *("quantization", "adapter", "presets", "tools", "compat"),
    *("report", "demo", "public", "cli", "__main__", "__init__"),
)
"""Folders and modules from the bottom up, as docs/architecture.md explains them."""
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(module: str) -> Iterator[str]:
    """Yield the modules of the package that one imports, wherever in it, by their names within it."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [f"{node.module}.{each.name}" for each in node.names]
        for name in names:
            package, _, inner = name.partition(".")
            if package == "bitwright":
                yield inner


def layer(name: str) -> int:
    """Return the place of a module, by its name within the package, among the layers."""
    return LAYERS.index(name.partition(".")[0])


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_layers_before_theirs(module: str) -> None:
    own = layer(module.removesuffix(".py").replace("/", "."))
    for name in imported(module):
        if name == "_processor" or not name:  # compiled, and imports nothing
            continue
        assert layer(name) <= own, f"{module} imports {name}, of a later layer"


def test_no_module_needs_itself() -> None:
    files = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in MODULES
    }
    needs = {
        name: {
            known
            for each in imported(path)
            for known in (each, each.rpartition(".")[0])
            if known in files and known != name
        }
        for name, path in files.items()
        if name != "__init__"
    }
    graphlib.TopologicalSorter(needs).prepare()  # which raises CycleError with the circle


def test_the_layers_are_those_that_exist() -> None:
    assert {path.partition("/")[0].removesuffix(".py") for path in MODULES} == set(LAYERS)
