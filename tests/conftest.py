"""How the tests share the processors: each worker of pytest-xdist keeps to its own.

Threads that wait for each other only cost where two tests want them, and most take turns with Python
anyway. Where files or `-k` are given there is one process with all processors, as with `-n 0`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

MOST_WORKERS = 4  # each imports and collects everything
# Before a worker is pinned. Only Linux pins.
PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

os.environ["HF_HUB_OFFLINE"] = "1"  # what is not there is not asked for at the hub
settings.register_profile("shared processors", deadline=None)  # others may have them meanwhile
settings.load_profile("shared processors")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Set what `-n` would. In addopts it would hold for single files too."""
    if hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return
    options = config.option
    whole = not options.keyword and all(Path(path).is_dir() for path in config.args)
    if options.numprocesses is None and whole and not options.usepdb:
        options.numprocesses = min(len(PROCESSORS), MOST_WORKERS)
        options.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Pin a worker, and all that it starts, before bitwright asks how many processors there are."""
    if (worker := getattr(config, "workerinput", None)) and PROCESSORS:
        first = int(worker["workerid"].removeprefix("gw")) % len(PROCESSORS)
        os.sched_setaffinity(0, PROCESSORS[first :: worker["workercount"]])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out under sanitizers (sanitize.py) what they make meaningless."""
    if "BITWRIGHT_SANITIZER" in os.environ:
        for item in items:
            if item.get_closest_marker("memory"):
                item.add_marker(pytest.mark.skip(reason="sanitizers take memory for themselves"))


@pytest.fixture(scope="module")
def all_processors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads that run at once: those that take turns on one processor would hide their races."""
    if not hasattr(request.config, "workerinput") or not PROCESSORS:
        yield
        return
    import bitwright  # not before the worker is pinned

    own, threads = os.sched_getaffinity(0), bitwright.build_info().threads
    os.sched_setaffinity(0, PROCESSORS)
    bitwright.set_num_threads(len(PROCESSORS))
    yield
    bitwright.set_num_threads(threads)
    os.sched_setaffinity(0, own)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    import bitwright

    threads = bitwright.build_info().threads
    yield
    bitwright.set_num_threads(threads)
