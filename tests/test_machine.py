"""Cores and memory that are ours, on Linux, in containers, and elsewhere."""

import os
import platform
import subprocess
import sys

import psutil
import pytest
import torch

from puzzle_nas import machine
from puzzle_nas.machine import OtherLoad, bfloat16_is_fast, free_bytes, usable_cores

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Eight cores and 64 GiB, and a tree of control groups that a test fills."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    monkeypatch.setattr(machine, "CGROUP_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")

    def write(process, **files):
        (tmp_path / "cgroup").write_text(process)
        for name, content in files.items():
            path = tmp_path / "fs" / name.replace("__", "/").replace("DOT", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def test_without_limits(host):
    assert usable_cores() == 8 and free_bytes(CPU) == 64 * GIB


def test_affinity(host, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert usable_cores() == 1


def test_without_affinity_as_on_macos(host, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 8


def test_a_container_that_sees_only_its_own_group(host):
    files = {"cpuDOTmax": "350000 100000", "memoryDOTmax": str(8 * GIB), "memoryDOTcurrent": str(6 * GIB)}
    host("0::/\n", **files, memoryDOTstat=f"anon 5\ninactive_file {GIB}\n")
    assert usable_cores() == 3 and free_bytes(CPU) == 3 * GIB


def test_the_tightest_of_nested_groups(host):
    host(
        "0::/jobs/mine\n",
        jobs__mine__cpuDOTmax="max 100000",
        jobs__cpuDOTmax="200000 100000",
        jobs__mine__memoryDOTmax="max",
        jobs__mine__memoryDOTcurrent="1",
        jobs__memoryDOTmax=str(2 * GIB),
        jobs__memoryDOTcurrent="0",
    )
    assert usable_cores() == 2 and free_bytes(CPU) == 2 * GIB


def test_version_1_groups(host):
    host(
        "4:memory:/box\n3:cpu,cpuacct:/box\n",
        cpu__box__cpuDOTcfs_quota_us="50000",
        cpu__box__cpuDOTcfs_period_us="100000",
        memory__box__memoryDOTlimit_in_bytes=str(4 * GIB),
        memory__box__memoryDOTusage_in_bytes=str(GIB),
    )
    assert usable_cores() == 1 and free_bytes(CPU) == 3 * GIB


def test_no_quota_in_version_1(host):
    host("3:cpu:/box\n", cpu__box__cpuDOTcfs_quota_us="-1", cpu__box__cpuDOTcfs_period_us="100000")
    assert usable_cores() == 8


@pytest.mark.parametrize("native", [False, True])
def test_emulated_bfloat16_is_not_fast(monkeypatch, native):
    """As on T4 and V100: supported, by emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert bfloat16_is_fast(torch.device("cuda")) == native


def test_load_is_the_share_that_is_busy_with_others(monkeypatch):
    Times = type("Times", (), {"_asdict": lambda self: {"user": self.user, "system": 0.0, "idle": self.idle}})

    def reading(user, idle):
        times = Times()
        times.user, times.idle = user, idle
        return times

    readings = iter([reading(0.0, 0.0), reading(60.0, 40.0)])
    spent = iter([0.0, 20.0])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))

    class Own:
        def children(self, recursive):
            return []

        def cpu_times(self):
            return type("Spent", (), {"user": next(spent), "system": 0.0})

    monkeypatch.setattr(psutil, "Process", Own)
    with OtherLoad() as load:
        pass
    assert load.percent == pytest.approx(40.0)


FAULTS = """
import resource, torch
{call}
def step():
    # 64 MB: glibc learns by itself to keep what is below 32.
    return torch.ones(2**24).exp()
# Where the heap begins is random, and it grows for some steps.
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_tensors_take_the_memory_that_earlier_ones_freed():
    keep = "from puzzle_nas.machine import keep_freed_memory; keep_freed_memory()"
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, check=True).stdout)
        for call in (keep, "")
    )
    assert kept < given_back / 4 and given_back > 10_000
