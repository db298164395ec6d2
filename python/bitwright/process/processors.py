"""The number of processors that this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path

from bitwright.process.control_groups import control_groups


def available_processors(root: Path = Path("/")) -> int:
    """Return how many processors can work for this process at one time.

    Parameters
    ----------
    root
        Of the file system, for the quotas of its control groups.

    Returns
    -------
    int
        Those that it may run on, and no more than its quota of time, rounded up.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = os.cpu_count() or 1 if affinity is None else len(affinity(0))
    quotas = [allowed]
    for group, first_version in control_groups("cpu", root):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if first_version:
                quota, period = (
                    int((group / f"cpu.cfs_{kind}_us").read_text()) for kind in ("quota", "period")
                )
            else:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            if quota > 0:
                quotas.append(math.ceil(quota / period))
    return max(1, min(quotas))
