"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and that sanitizers see errors."""

import os
import subprocess
import sys

import pytest
import sanitize

KIND = os.environ.get("BITWRIGHT_SANITIZER", "")

# At least one call of every kernel; all tests take half an hour (docs/experiments.md).
KERNEL_TESTS = ["kernels/test_sanitizers.py", "grids/test_packing.py"]

FAULTS = {
    "address": (
        """
import numpy as np
from bitwright import _kernels
few = np.zeros((64, 32), np.uint8)
_kernels.pack(np.lib.stride_tricks.as_strided(few, (4096, 32)), 4)
""",
        "heap-buffer-overflow",
    ),
    "thread": (
        """
import threading
import numpy as np
from bitwright import _kernels
square = np.ones((1000, 1000), np.float32)
threads = [threading.Thread(target=_kernels.mirror_lower, args=[square]) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""",
        "data race",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(KIND != "", reason="this run has sanitizers already")
def test_kernels_pass_under_sanitizers() -> None:
    if absent := sanitize.missing("address"):
        pytest.skip(absent)
    done = subprocess.run(
        [
            *(sys.executable, sanitize.__file__, "address", "-q", "-m", "not slow"),
            *(f"tests/{name}" for name in KERNEL_TESTS),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(KIND == "", reason="python tests/sanitize.py runs this")
def test_a_fault_in_a_kernel_is_reported() -> None:
    program, report = FAULTS[KIND]
    option = f"{KIND[0].upper()}SAN_OPTIONS"
    # Not among the reports of this run.
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {option: os.environ[option] + ":log_path=stderr"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert report in done.stderr
    assert "cpp/" in done.stderr  # the line of ours, not a bare address
