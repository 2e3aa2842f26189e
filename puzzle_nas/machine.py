"""This machine: device, precision, threads, memory."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from puzzle_nas.errors import RecipeError
from puzzle_nas.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""
KEPT_BYTES = 2**30
"""Freed memory at the end of the heap above which it goes back to the system."""


CGROUP_OF_PROCESS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the part of the use that can be dropped, in versions 2 and 1."""


@dataclass(frozen=True)
class Machine:
    """Where and how forward passes run."""

    device: torch.device
    dtype: torch.dtype

    @property
    def autocast(self) -> bool:
        """Whether training multiplies in bfloat16 (its master weights are always float32)."""
        return self.dtype == torch.bfloat16


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products have hardware of their own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "amx", "avx512_bf16", "sve_bf16"))


def int8_sums_saturate() -> bool:
    """Whether oneDNN, which multiplies int8 on CPUs, adds pairs of products in 16 bits here, where many do not fit.

    So do x86 processors without VNNI ("Data Types" in oneDNN's documentation), and others that are told to.
    """
    capabilities = torch.cpu.get_capabilities()
    if capabilities["architecture"] != "x86_64":
        return False
    as_told = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ("SSE41", "AVX", "AVX2", "AVX512_CORE")
    return as_told or not (capabilities["avx_vnni"] or capabilities["avx512_vnni"])


def has_wide_registers() -> bool:
    """Whether the processor has AVX-512 or AMX."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_f", "amx_tile"))


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep what tensors free for the next ones, instead of giving it back page by page.

    A step of training makes and frees the same tensors each time, and getting their pages again takes long.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "gnu_get_libc_version"):
        allocator.mallopt(M_MMAP_MAX, 0)
        allocator.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def machine_of(recipe: Recipe) -> Machine:
    """Choose device and precision, set the thread count and what happens to freed memory.

    Raises:
        RecipeError: a GPU was asked for and there is none.
    """
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("The recipe asks for device=cuda, but torch sees no GPU here; use device=cpu.")
    keep_freed_memory()
    torch.set_num_threads(recipe.threads or usable_cores())
    device = torch.device(name)
    precision = recipe.precision
    if precision == "auto":
        precision = "bfloat16" if bfloat16_is_fast(device) else "float32"
    return Machine(device, DTYPES[precision])


def this_machine() -> Machine:
    """Device and precision without a recipe: a GPU when there is one, bfloat16 where it is fast."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, torch.bfloat16 if bfloat16_is_fast(device) else torch.float32)


def usable_cores() -> int:
    """Physical cores, at most as many as this process's affinity and its container allow."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    # macOS has no affinity.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min([physical, allowed, *_cgroup_cores()]))


# Control groups: what containers and batch systems limit. Version 2 has one tree, version 1 one for each resource.


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Of this process's group and those around it, where they hold limits on `controller`."""
    try:
        groups = [line.split(":", 2) for line in CGROUP_OF_PROCESS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, name in groups:
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        own = root / name.lstrip("/")
        # In a container its own group is mounted as the root, whatever its name outside.
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root) and folder.is_dir())


def _cgroup_cores() -> Iterator[int]:
    """Whole cores of each quota on processor time."""
    for folder in _cgroup_folders("cpu"):
        quota, period = (_words(folder / "cpu.max") or ["max", "1"])[:2]
        if quota == "max":
            quota = (_words(folder / "cpu.cfs_quota_us") or ["-1"])[0]
            period = (_words(folder / "cpu.cfs_period_us") or ["1"])[0]
        if int(quota) > 0:
            yield max(1, int(quota) // int(period))


def _cgroup_free_bytes() -> Iterator[int]:
    """What each limit on memory leaves; pages of files that can be dropped count as free."""
    for folder in _cgroup_folders("memory"):
        for limit_name, used_name, dropped_name in MEMORY_FILES:
            limit, used = _words(folder / limit_name), _words(folder / used_name)
            if limit and used and limit[0] != "max":
                statistics = _words(folder / "memory.stat")
                dropped = dict(zip(statistics[::2], map(int, statistics[1::2]), strict=True)).get(dropped_name, 0)
                yield max(0, int(limit[0]) - int(used[0]) + dropped)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


@dataclass
class OtherLoad:
    """What other processes took of the processors between `with` and the end of its block."""

    percent: float = 0.0
    """Of all processors; known after the block."""

    def __enter__(self) -> OtherLoad:
        self._before = self._readings()
        return self

    def __exit__(self, *_: object) -> None:
        total, busy, own = (after - before for after, before in zip(self._readings(), self._before, strict=True))
        self.percent = 100 * min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0

    @staticmethod
    def _readings() -> tuple[float, float, float]:
        """Seconds of processors: all, busy (other guests of the same host included), and busy with us."""
        times = psutil.cpu_times()._asdict()
        # Guests' time is in user's already.
        total = sum(seconds for name, seconds in times.items() if not name.startswith("guest"))
        idle = times["idle"] + times.get("iowait", 0.0)
        own = 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                spent = process.cpu_times()
                own += spent.user + spent.system
        return total, total - idle, own


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take, a GPU's own where that is the device."""
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *_cgroup_free_bytes()])
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def describe(machine: Machine) -> dict[str, Any]:
    """What a measurement belongs to, besides its engine."""
    on_gpu = machine.device.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else _processor_name()
    return {
        "device": machine.device.type,
        "processor": name,
        "precision": str(machine.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
