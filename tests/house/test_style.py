"""The checks of style and types that a change must pass, as tests, so that one command runs all."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pybind11
import pytest

PROJECT = Path(__file__).parents[2]
SOURCES = sorted(str(path) for path in (PROJECT / "cpp").rglob("*.[ch]pp"))
PYTHON = ["python", "tests", "bench"]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", *PYTHON],
        ["ruff", "format", "--check", *PYTHON],
        pytest.param(["mypy"], marks=pytest.mark.slow),
        ["clang-format", "--dry-run", "--Werror", *SOURCES],
    ],
    ids=["ruff", "ruff-format", "mypy", "clang-format"],
)
def test_style(command: list[str]) -> None:
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    assert program, f"{command[0]} is missing: pip install .[test]"
    done = subprocess.run(
        [program, *command[1:]], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_stub_agrees_with_the_extension() -> None:
    """mypy's stubtest compares _kernels.pyi with the signatures of the compiled module."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "bitwright._kernels", "--ignore-disjoint-bases"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def clang_tidy_flags() -> list[str]:
    """What a compiler needs to know to read a source of the kernels."""
    cmeel = find_spec("cmeel")
    roots = [Path(cmeel.origin).parents[1] / "cmeel.prefix"] if cmeel and cmeel.origin else []
    eigen = [root / "include" / "eigen3" for root in (*roots, Path("/usr"), Path("/usr/local"))]
    folders = [pybind11.get_include(), sysconfig.get_path("include"), *map(str, eigen)]
    return [
        *("-std=c++20", "-DEIGEN_USE_BLAS", "-DBITWRIGHT_MODULE=kernels"),
        *('-DBITWRIGHT_INSTRUCTION_SET="plain"', f"-I{PROJECT / 'cpp'}"),
        *(f"-isystem{folder}" for folder in folders),
    ]


def tidied(program: str, folder: Path, sources: Path) -> str:
    """Return what clang-tidy has to say of a folder's sources, read as one: headers take seconds each."""
    includes = (f'#include "{path}"\n' for path in sorted(folder.glob("*.cpp")))
    together = sources / f"{folder.name}.cpp"
    together.write_text("".join(includes))
    options = ["--quiet", f"--config-file={PROJECT / '.clang-tidy'}"]
    options += ["--checks=-bugprone-suspicious-include"]  # of these
    done = subprocess.run(
        [program, *options, str(together), "--", *clang_tidy_flags()],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.slow
def test_clang_tidy(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Every folder of sources that has changed since it passed, or whose headers have."""
    program = shutil.which("clang-tidy", path=str(Path(sys.executable).parent))
    if not program:
        pytest.skip("clang-tidy is missing: pip install .[test]")
    shared = [PROJECT / ".clang-tidy", Path(__file__), *(PROJECT / "cpp").rglob("*.hpp")]
    keys: dict[Path, str] = {}
    for folder in sorted({Path(source).parent for source in SOURCES if source.endswith(".cpp")}):
        files = sorted([*shared, *folder.glob("*.cpp")])
        state = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        if pytestconfig.cache.get(f"clang-tidy/{folder.name}", None) != state:
            keys[folder] = state
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(partial(tidied, program, sources=tmp_path), keys))
    for (folder, state), complaints in zip(keys.items(), found, strict=True):
        if not complaints:
            pytestconfig.cache.set(f"clang-tidy/{folder.name}", state)
    assert not any(found), "\n".join(found)
