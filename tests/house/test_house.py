"""Rules of the house that a reader counts on: short functions, and names of methods and formats at home."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitwright
from bitwright.formats import FORMATS
from bitwright.methods.registry import METHODS

PYTHON = Path(__file__).parents[2] / "python"
MODULES = sorted(path.relative_to(PYTHON).as_posix() for path in PYTHON.rglob("*.py"))
LONGEST_BODY, MOST_PARAMETERS = 60, 12
# Public functions whose keyword arguments are the options of a command.
FACADES = {
    *(
        "quantize",
        "quantize_best",
        "quantize_with_transformers",
        "refine_model",
        "collect_statistics",
    ),
    *("dwq_quantize", "dynamic_quantize", "estimate_sensitivities", "awq_quantize_model"),
}


def tree(module: str) -> ast.Module:
    return ast.parse((PYTHON / module).read_text())


def functions(module: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    for function in functions(module):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        assert length <= LONGEST_BODY, f"{module}: {function.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_signatures_are_short(module: str) -> None:
    for function in functions(module):
        given = function.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
        is_command = "/cli/" in module  # its parameters are those of the command line
        assert count <= MOST_PARAMETERS or function.name in FACADES or is_command, (
            f"{module}: {function.name} has {count} parameters"
        )


@pytest.mark.parametrize("module", MODULES)
def test_methods_and_formats_are_compared_at_home(module: str) -> None:
    folder = module.split("/")[1]
    names = {*METHODS, *FORMATS}
    if folder in ("methods", "formats"):
        names -= {*(METHODS if folder == "methods" else FORMATS)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            parts += [each for part in parts for each in getattr(part, "elts", ())]
            found = {each.value for each in parts if isinstance(each, ast.Constant)} & names
            assert not found, f"{module}, line {node.lineno}: compares {found.pop()!r} by name"


METHOD = '''
"""Rounding down, which nobody wants."""
from bitwright.methods.method import Method
from bitwright.methods.rtn import rtn_solver

METHODS = (Method("toy", "a toy", rtn_solver, needs_inputs=False),)
'''
FORMAT = '''
"""MLX by another name."""
from bitwright.formats.mlx import MlxFormat


class ToyFormat(MlxFormat):
    """MLX by another name."""

    name = "toy"


FORMATS = (ToyFormat,)
'''
ARCHITECTURE = '''
"""Llama by another name."""
from dataclasses import replace

from bitwright.models.families import llama

FAMILIES = (replace(llama.FAMILIES[0], model_types=("toy",)),)
'''
TRIED = """
import json, sys
from pathlib import Path
import bitwright
from bitwright.cli.main import cli
model, out = Path(sys.argv[1]), Path(sys.argv[2])
config = json.loads((model / "config.json").read_text())
(model / "config.json").write_text(json.dumps({**config, "model_type": "toy"}))
assert bitwright.load_model(model).config.model_type == "toy"
report = bitwright.quantize(model, out, "toy", format="toy", progress=False)
assert (report.method, report.format) == ("toy", "toy")
assert "a toy" in (out / "README.md").read_text()
assert bitwright.load_model(out).quantized_layers()
"""


def test_a_method_a_format_and_an_architecture_are_one_file_each(tmp_path: Path) -> None:
    package = tmp_path / "bitwright"
    shutil.copytree(
        Path(bitwright.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "methods" / "toy.py").write_text(METHOD)
    (package / "formats" / "toy.py").write_text(FORMAT)
    (package / "models" / "families" / "toy.py").write_text(ARCHITECTURE)
    model = tmp_path / "model"
    shutil.copytree(package / "demo_data", model)
    command = [sys.executable, "-c", TRIED, str(model), str(tmp_path / "out")]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
