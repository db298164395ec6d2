"""The compiled kernels: of the builds in the package, the best one that this processor runs."""

import ctypes
import importlib
import sys
from pathlib import Path

from bitwright import _processor
from bitwright.process.processors import available_processors

try:
    import scipy_openblas32
except ModuleNotFoundError:  # a build over the system's BLAS, which the loader finds by itself
    pass
else:
    # Loaded by path, so that it is found wherever the wheel lies: an editable install, or a virtual
    # environment that sees the system's packages, has no fixed way from one to the other.
    ctypes.CDLL(
        str(
            Path(
                scipy_openblas32.get_lib_dir(), scipy_openblas32.get_library(fullname=True)
            ).with_suffix(".dylib" if sys.platform == "darwin" else ".so")
        )
    )

_level = _processor.x86_64_level()
if _level == 1:
    raise ImportError(
        "bitwright needs an x86-64 processor with SSE4.2 (x86-64-v2); this one is older"
    )
_name = f"_kernels_x86_64_v{_level}" if _level else "_kernels_plain"
_module = importlib.import_module(f"bitwright.{_name}")
# The extension knows which processors it may run on, not the quotas of control groups.
_module.set_num_threads(min(_module.num_threads(), available_processors()))
sys.modules[__name__] = _module
