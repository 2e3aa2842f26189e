"""This machine's rates, measured in a second or two."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from puzzle_nas.machine import describe, free_bytes, machine_of
from puzzle_nas.planning.machines import Machine
from puzzle_nas.planning.sizes import ModelSize
from puzzle_nas.recipe import Recipe

SECONDS = 0.4
"""For which each piece of work is repeated."""
ROWS, SYSTEM, COPIED_BYTES = 512, 1024, 2**26
"""Of a product, of a linear system, of a copy."""


def this_machine(recipe: Recipe, size: ModelSize, folder: Path, processes: int = 1) -> Machine:
    """Where this process runs, with the recipe's device, precision and threads.

    Args:
        size: of the parent, whose products are timed.
        folder: of the run, which need not be there yet.
        processes: of the run.
    """
    machine, hidden, width = machine_of(recipe), size.hidden, max(size.last_inputs.values())
    device, on_gpu = machine.device, machine.device.type == "cuda"
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    rows, into = (torch.randn(n, hidden, device=device).to(machine.dtype) for n in (ROWS, width))
    system = torch.randn(SYSTEM, SYSTEM, dtype=torch.float64, device=device)
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        product = _seconds(lambda: rows @ into.T, on_gpu)
        solution = _seconds(lambda: torch.linalg.solve(system, system), on_gpu)
        copy = _seconds(lambda: target.copy_(source), on_gpu)
    return Machine(
        name=f"{describe(machine)['processor']}, {describe(machine)['threads']} threads",
        is_gpu=on_gpu,
        itemsize=machine.dtype.itemsize,
        flops_per_second=2 * ROWS * hidden * width / product,
        float64_flops_per_second=8 / 3 * SYSTEM**3 / solution,
        bytes_per_second=2 * COPIED_BYTES / copy,
        gpu_bytes=free_bytes(device) if on_gpu else None,
        main_bytes=free_bytes(torch.device("cpu")),
        disk_bytes=shutil.disk_usage(folder).free,
        count=processes if on_gpu else 1,
    )


def _seconds(work: Callable[[], object], on_gpu: bool) -> float:
    """Median wall time of the repeats: a whole run is no faster than usual."""
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    times: list[float] = []
    while len(times) < 4 or sum(times) < SECONDS:
        synchronise()
        begin = time.perf_counter()
        work()
        synchronise()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
