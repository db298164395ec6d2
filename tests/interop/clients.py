"""Build, once, a virtual environment for each real client that loads what bitwright writes."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

# Each list is installed in one resolution, so that nothing can move torch off its pin: newer
# releases of GPTQModel want a torch whose wheels pull gigabytes of CUDA. transformers reads GPTQ
# folders through optimum, which it does not itself require.
CLIENTS = {
    "mlx": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "transformers==5.23.0", "numpy==2.4.6"],
    "gptqmodel": [
        "torch==2.13.0",
        "transformers==5.23.0",
        "optimum==2.3.0",
        "accelerate==1.15.0",
        "gptqmodel==7.6.0",
        "compressed-tensors==0.19.0",
        "gguf==0.19.0",
    ],
    # Wants an older transformers, and with it minutes and gigabytes: only built by hand, see OPTIONAL.
    "llmcompressor": [
        "torch==2.13.0",
        "transformers==5.17.0",
        "llmcompressor==0.14.0.1",
        "compressed-tensors==0.19.0",
    ],
    "peft": ["torch==2.13.0", "transformers==5.23.0", "peft==0.21.2"],
    "llamacpp": ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"],
}
OPTIONAL = (
    "llmcompressor",
    "peft",
)  # tests skip where `python tests/interop/clients.py` has not built it
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / ".interop"
# llama-cpp-python comes as its source: built without what only programs need, and quickly, not for speed.
SWITCHED_OFF = [
    *("LLAVA_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES"),
    *("LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP", "GGML_LLAMAFILE", "GGML_CPU_REPACK"),
]
BUILD = {
    "SKBUILD_BUILD_TARGETS": "llama",
    "CMAKE_ARGS": " ".join(
        [
            *(f"-D{name}=OFF" for name in SWITCHED_OFF),
            f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={HERE / 'llama_cpp.cmake'}",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O0",
            "-DCMAKE_C_FLAGS_RELEASE=-O2",
        ]
    ),
}


def client_python(name: str, root: Path = ROOT) -> Path:
    """The python of client `name`, whose environment is built or rebuilt if it is not current."""
    environment = root / name
    python = environment / "bin" / "python"
    # Written last, so an interrupted build has none and a changed list differs from it.
    stamp = environment / "requirements.txt"
    requirements = "\n".join(CLIENTS[name]) + "\n"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of other processes wait for the same client
        if not stamp.exists() or stamp.read_text() != requirements:
            subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
            subprocess.run(
                # Compiled when imported: most modules never are.
                [python, "-m", "pip", "install", "-q", "--no-compile", *CLIENTS[name]],
                check=True,
                env={**os.environ, **(BUILD if name == "llamacpp" else {})},
            )
            stamp.write_text(requirements)
    return python


def run_client(client: str, script: str, *arguments: str | Path) -> str:
    """What a script of this folder prints, run by a client; skips where that cannot be installed."""
    if client in OPTIONAL and not (ROOT / client).is_dir():
        pytest.skip(
            f"the client {client} is not built; run python tests/interop/clients.py {client}"
        )
    try:
        python = client_python(client)
    except subprocess.CalledProcessError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(f"the client {client} cannot be installed here: {error}")
    with TemporaryDirectory() as folder:  # GPTQModel leaves logs where it is run
        done = subprocess.run(
            [python, HERE / script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


if __name__ == "__main__":
    for client in sys.argv[1:] or CLIENTS:
        start = time.perf_counter()
        print(client_python(client), f"{time.perf_counter() - start:.0f} s", flush=True)
