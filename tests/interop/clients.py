"""Build, once, a virtual environment for each real client that loads what bitwright writes."""

import subprocess
import sys
import time
from pathlib import Path

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
    ],
}
ROOT = Path(__file__).resolve().parents[2] / ".interop"


def client_python(name: str, root: Path = ROOT) -> Path:
    """The python of client `name`, whose environment is built or rebuilt if it is not current."""
    environment = root / name
    python = environment / "bin" / "python"
    # Written last, so an interrupted build has none and a changed list differs from it.
    stamp = environment / "requirements.txt"
    requirements = "\n".join(CLIENTS[name]) + "\n"
    if not stamp.exists() or stamp.read_text() != requirements:
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *CLIENTS[name]], check=True)
        stamp.write_text(requirements)
    return python


if __name__ == "__main__":
    for client in sys.argv[1:] or CLIENTS:
        start = time.perf_counter()
        print(client_python(client), f"{time.perf_counter() - start:.0f} s", flush=True)
