from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vnnigen.errors import VnnigenError
from vnnigen.runtime import threads


@pytest.fixture(autouse=True)
def reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VNNIGEN_NUM_THREADS", raising=False)
    threads.set_num_threads(None)
    yield
    monkeypatch.undo()
    threads.set_num_threads(None)


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("150000 100000\n", 1.5),
        ("50000 100000", 0.5),
        ("max 100000\n", math.inf),
        ("-1 100000", math.inf),
        ("", math.inf),
        (" ", math.inf),
        ("200000", math.inf),
        ("200000 0", math.inf),
        ("words here", math.inf),
    ],
)
def test_parse_cpu_max(text: str, quota: float) -> None:
    assert threads.parse_cpu_max(text) == quota


V2 = "0::/user/job\n"
V1 = "4:memory:/elsewhere\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n"
TREES = {
    "v2 own group": (V2, {"sys/fs/cgroup/user/job/cpu.max": "300000 100000"}, 3.0),
    "v2 tightest level": (
        V2,
        {"sys/fs/cgroup/user/job/cpu.max": "max 100000", "sys/fs/cgroup/user/cpu.max": "250000 100000"},
        2.5,
    ),
    "v2 namespace root": ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1.0),
    "v2 another group's limit": (V2, {"sys/fs/cgroup/user/other/cpu.max": "100000 100000"}, math.inf),
    "v1": (
        V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
        },
        4.0,
    ),
    "v1 in a container": (
        V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        0.5,
    ),
    "v1 unlimited": (
        V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
        },
        math.inf,
    ),
    "both, the tighter counts": (
        V1 + "0::/\n",
        {
            "sys/fs/cgroup/cpu.max": "200000 100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        2.0,
    ),
    "outside the namespace": ("0::/../../job\n", {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1.0),
    "nothing there": ("", {}, math.inf),
}


@pytest.mark.parametrize(("groups", "files", "quota"), TREES.values(), ids=TREES.keys())
def test_cgroup_quota(tmp_path: Path, groups: str, files: dict[str, str], quota: float) -> None:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cgroup_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (2.5, 2), (3.99, 3), (100.0, 6), (math.inf, 6)])
def test_default_is_the_smaller_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(threads, "cgroup_quota", lambda: quota)
    assert threads.default_num_threads() == expected


def test_environment_overrides_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.num_threads() == threads.default_num_threads()
    monkeypatch.setenv("VNNIGEN_NUM_THREADS", "7")
    threads.set_num_threads(None)
    assert threads.num_threads() == 7
    threads.set_num_threads(3)
    assert threads.num_threads() == 3


@pytest.mark.parametrize("text", ["zero", "0", "-2", "1.5", "100000"])
def test_bad_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("VNNIGEN_NUM_THREADS", text)
    with pytest.raises(VnnigenError, match="VNNIGEN_NUM_THREADS"):
        threads.set_num_threads(None)


@pytest.mark.parametrize("n", [0, -1, 1 << 20])
def test_bad_number_is_an_error_and_changes_nothing(n: int) -> None:
    before = threads.num_threads()
    with pytest.raises(VnnigenError, match="set_num_threads"):
        threads.set_num_threads(n)
    assert threads.num_threads() == before
