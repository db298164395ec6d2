"""How many processors there are: affinity, and quotas of control groups in both versions."""

import os
from pathlib import Path

import pytest

import bitwright
from bitwright import _kernels
from bitwright.process import processors


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("line", "folder", "files", "count"),
    [
        ("0::/", "", {"cpu.max": "max 100000"}, 8),
        ("0::/", "", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b", "a", {"cpu.max": "300000 100000"}, 3),
        ("0::/a/b", "a/b", {"cpu.max": "1000 100000"}, 1),
        ("0::/", "", {"cpu.max": "6400000 100000"}, 8),
        ("0::/", "", {"cpu.max": "nonsense"}, 8),
        ("4:cpu:/x", "cpu/x", {"cpu.cfs_quota_us": 250000, "cpu.cfs_period_us": 100000}, 3),
        ("4:cpu:/x", "cpu/x", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}, 8),
        (
            "4:cpu,cpuacct:/",
            "cpu,cpuacct",
            {"cpu.cfs_quota_us": 400000, "cpu.cfs_period_us": 100000},
            4,
        ),
    ],
)
def test_quotas_count(
    tmp_path: Path, line: str, folder: str, files: dict[str, object], count: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:pids:/\n{line}\n")
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    for name, value in files.items():
        (group / name).write_text(f"{value}\n")
    assert processors.available_processors(tmp_path) == count


@pytest.mark.usefixtures("eight")
def test_without_control_groups_affinity_decides(tmp_path: Path) -> None:
    assert processors.available_processors(tmp_path) == 8


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [3, 64, 1024])
def test_threads_beyond_the_processors_are_not_used(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("bitwright.build.available_processors", lambda: 2)
    with pytest.warns(bitwright.BitwrightWarning, match=f"^threads: {threads} .* 2 are used$"):
        bitwright.set_num_threads(threads)
    assert bitwright.build_info().threads == 2
    bitwright.set_num_threads(1)
    assert _kernels.num_threads() == 1
