"""Builds the kernels with sanitizers and runs tests on that build.

    python tests/sanitize.py address [pytest arguments]   AddressSanitizer, UndefinedBehaviorSanitizer
    python tests/sanitize.py thread [pytest arguments]    ThreadSanitizer

In an environment with `pip install ".[test]"`, on Linux, with GCC. Without pytest arguments `address`
runs all tests but those of interop, notebooks and style, whose work is done by other programs, and of
kills, which run little else than other tests a few hundred times; `thread` runs those of the kernels.
The build is in build/sanitize-*; only what has changed is built again.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pybind11

PROJECT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "c++")

# Four checks of `undefined` are left out, which double the time to compile Eigen: null pointers end the
# program anyway, AddressSanitizer knows where objects end, bindings refuse misaligned arrays, and no
# class is virtual.
FLAGS = {
    "address": "-fsanitize=address,undefined,float-cast-overflow;"
    "-fno-sanitize=alignment,null,object-size,vptr",
    "thread": "-fsanitize=thread",
}
RUNTIMES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
# NumPy's own OpenBLAS is not compiled for ThreadSanitizer, which does not see how its threads wait.
SUPPRESSED = "called_from_lib:libscipy_openblas64_\nrace:libscipy_openblas64_\n"
TESTS = {
    "address": [
        "tests",
        *(
            f"--ignore=tests/{name}"
            for name in (
                *("interop", "house/test_notebooks.py", "house/test_style.py"),
                "runs/test_kills.py",
            )
        ),
    ],
    "thread": [
        f"tests/{folder}/test_{name}.py"
        for folder, names in {
            "kernels": ("threads", "forward_kernels", "backward_kernels"),
            "methods": ("gram", "rtn", "gptq", "refine", "awq"),
            "grids": ("k_grid", "packing"),
            "models": ("rope",),
        }.items()
        for name in names
    ],
}


def runtime(name: str) -> Path | None:
    """One of the compiler's own libraries, if it has it."""
    try:
        done = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    path = Path(done.stdout.strip())
    return path if path.is_absolute() else None


def missing(kind: str) -> str | None:
    """What this machine lacks for the sanitizer, if anything."""
    for name in RUNTIMES[kind]:
        if runtime(name) is None:
            return f"the compiler {COMPILER} has no {name}: sanitizers need GCC with its libraries"
    return None


def build(kind: str) -> Path:
    """A folder to import bitwright from, whose kernels for this processor are sanitized."""
    folder = PROJECT / "build" / f"sanitize-{kind}"
    # CMake and Ninja come from their wheels.
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = partial(subprocess.run, check=True, env=os.environ | {"PATH": scripts})
    run(
        [
            *("cmake", "-S", PROJECT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug"),
            f"-DBITWRIGHT_SANITIZE={FLAGS[kind]}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        stdout=subprocess.DEVNULL,
    )
    run(["cmake", "--build", folder, "--target", "_processor"])
    level = run(
        [sys.executable, "-c", "import _processor; print(_processor.x86_64_level())"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()
    kernels = "_kernels_plain" if level == "0" else f"_kernels_x86_64_v{level}"
    run(["cmake", "--build", folder, "--target", kernels])
    package = folder / "package"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        PROJECT / "python" / "bitwright",
        package / "bitwright",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for module in ("_processor", kernels):
        (library,) = folder.glob(f"{module}.*.so")
        shutil.copy(library, package / "bitwright")
    (package / "suppressed").write_text(SUPPRESSED)
    # The finder of an editable install comes before all paths.
    (package / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [\n"
        "    finder\n"
        "    for finder in sys.meta_path\n"
        "    if type(finder).__name__ != 'ScikitBuildRedirectingFinder'\n"
        "]\n"
    )
    return package


def environment(kind: str, package: Path, reports: Path) -> dict[str, str]:
    """With these variables Python, and every program that it starts, runs on the sanitized kernels."""
    # libstdc++ with them: its exceptions are intercepted only if it is there from the beginning.
    libraries = [runtime(name) for name in (*RUNTIMES[kind], "libstdc++.so")]
    options = {
        "log_path": reports / kind,  # files, because tests capture what programs print
        "print_stacktrace": 1,
        "handle_segv": 2,
        "handle_abort": 2,  # of failed assertions
        "abort_on_error": 1,
        # UndefinedBehaviorSanitizer's: it writes no file beside AddressSanitizer, the abort does.
        "halt_on_error": int(kind == "address"),
        "detect_leaks": 0,  # CPython leaves memory to the end of the process
        "detect_stack_use_after_return": 1,
        "allocator_may_return_null": 1,  # tests expect a MemoryError
        "die_after_fork": 0,  # the kernels are made for a fork that has no threads
    }
    if kind == "thread":
        options["suppressions"] = package / "suppressed"
    text = ":".join(f"{name}={value}" for name, value in options.items())
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS")
    return {
        **os.environ,
        **{name: f"{text}:{os.environ.get(name, '')}" for name in names},
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONMALLOC": "malloc",  # Python's own allocator hides where its objects end
        "BITWRIGHT_SANITIZER": kind,
    }


def main(kind: str, *arguments: str) -> int:
    """Builds, runs the tests, shows what the sanitizers have reported; 0 if all is well."""
    if absent := missing(kind):
        sys.exit(absent)
    package = build(kind)
    with tempfile.TemporaryDirectory() as reports:
        done = subprocess.run(
            [
                # faulthandler would take the signals on which the sanitizers report.
                *(sys.executable, "-m", "pytest", "-p", "no:faulthandler", "--capture=sys"),
                *(arguments or TESTS[kind]),
            ],
            cwd=PROJECT,
            env=environment(kind, package, Path(reports)),
            check=False,
        )
        found = sorted(Path(reports).iterdir())
        for report in found:
            print(report.read_text(errors="replace"))
    print(f"{kind}: {len(found)} processes with reports; pytest ended with {done.returncode}")
    return done.returncode or int(bool(found))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
