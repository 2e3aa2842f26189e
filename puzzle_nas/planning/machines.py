"""How fast machines do each unit of work, and what they hold: GPUs from published figures, this machine as measured.

What a stage takes beyond its matrix products is passes over memory, and so is counted in bytes at the rate of a copy.
How many follows from benchmarks/results, where stages and their products alone were timed on SmolLM2-135M
(docs/plan.md): distillation.json and distillation_avx512.json for processors, gpu_rates.json and
gpu_rates_not_captured.json for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_nas.errors import RecipeError
from puzzle_nas.planning.counting import Work

GB = 1e9


@dataclass(frozen=True)
class GPU:
    """Published figures of one device."""

    bfloat16_flops_per_second: float
    """Of dense products."""
    float32_flops_per_second: float
    float64_flops_per_second: float
    bytes_per_second: float
    memory_bytes: float


GPUS = {
    "A100": GPU(312e12, 19.5e12, 9.7e12, 2.039e12, 80 * GB),
    "H100": GPU(989e12, 67e12, 34e12, 3.35e12, 80 * GB),
    "H200": GPU(989e12, 67e12, 34e12, 4.8e12, 141 * GB),
    "B200": GPU(2250e12, 75e12, 37e12, 8e12, 180 * GB),
    "L40S": GPU(362e12, 91.6e12, 1.4e12, 0.864e12, 48 * GB),
    "L4": GPU(121e12, 30.3e12, 0.47e12, 0.3e12, 24 * GB),
    "RTX4090": GPU(165e12, 82.6e12, 1.3e12, 1.008e12, 24 * GB),
}
"""NVIDIA's data sheets; A100, H100 and H200 in SXM form."""
EFFICIENCY = 0.6
"""Of the published products that large ones reach. SmolLM2's small ones reached 0.47 of an H200's (gpu_rates)."""


@dataclass(frozen=True)
class Passes:
    """Bytes that pass through memory for one unit of work; `*_numbers` count in numbers of the recipe's precision."""

    forward_numbers: float
    trained_numbers: float
    block_numbers: float
    cached_numbers: float
    updates: float
    scored_logits: float
    distilled_logits: float
    passed_weights_16_bits: float
    passed_weights_32_bits: float


ON_CPU = Passes(5, 16, 20, 1.5, 49, 33, 310, 7, 8)
"""Weights of 16 bits are brought into the order of a product at each; how long that takes is from the quickstart's
decoding (README.md)."""
ON_GPU = Passes(15, 68, 28, 1.5, 30, 33, 181, 2, 4)
LAYER_CALL_SECONDS = 2e-4
"""To start a layer's operations. GPUs compute meanwhile."""
FILE_BYTES_PER_SECOND = 1e9
"""Written or read, and hashed."""
GPUS_A_MACHINE = 8
"""At most, of those that share a main memory."""


@dataclass(frozen=True)
class Machine:
    """Where a run is to be."""

    name: str
    is_gpu: bool
    itemsize: int
    """Bytes of a number in the precision of forward passes."""
    flops_per_second: float
    """Of matrix products, as reached."""
    float64_flops_per_second: float
    """Of linear systems, as reached."""
    bytes_per_second: float
    """Read and written by a copy."""
    gpu_bytes: float | None = None
    """Of one GPU."""
    main_bytes: float | None = None
    """None where nobody knows."""
    disk_bytes: float | None = None
    count: int = 1
    """GPUs, each with a process of its own."""

    @property
    def sharing_main(self) -> int:
        """Processes that share a main memory."""
        return min(self.count, GPUS_A_MACHINE)

    def seconds(self, work: Work, is_shared: bool) -> float:
        """How long work takes, divided among the processes where they share it."""
        passes = ON_GPU if self.is_gpu else ON_CPU
        weights = passes.passed_weights_16_bits if self.itemsize == 2 else passes.passed_weights_32_bits
        numbers = (
            passes.forward_numbers * work.forward_numbers
            + passes.trained_numbers * work.trained_numbers
            + passes.block_numbers * work.block_numbers
            + passes.cached_numbers * work.cached_numbers
        )
        moved_bytes = (
            self.itemsize * numbers
            + passes.updates * work.updates
            + passes.scored_logits * work.scored_logits
            + passes.distilled_logits * work.distilled_logits
            + weights * work.passed_weights
        )
        computing = work.flops / self.flops_per_second + work.float64_flops / self.float64_flops_per_second
        computing += moved_bytes / self.bytes_per_second
        starting = LAYER_CALL_SECONDS * work.layer_calls
        # A GPU computes while the processor starts what comes next.
        busy = max(computing, starting) if self.is_gpu else computing + starting
        files = work.file_bytes / FILE_BYTES_PER_SECOND
        return (busy + files) / (self.count if is_shared else 1) + work.seconds


def named_gpus(name: str, count: int, precision: str = "auto") -> Machine:
    """So many GPUs of the table; in bfloat16, unless float32 is asked for.

    Raises:
        RecipeError: an unknown one.
    """
    known = next((known for known in GPUS if known.lower() == name.lower()), None)
    if known is None:
        raise RecipeError(f"No figures of a GPU '{name}' are known; there are some of {', '.join(GPUS)}.")
    gpu, is_float32 = GPUS[known], precision == "float32"
    products = gpu.float32_flops_per_second if is_float32 else gpu.bfloat16_flops_per_second
    return Machine(
        name=f"{count} x {known}",
        is_gpu=True,
        itemsize=4 if is_float32 else 2,
        flops_per_second=EFFICIENCY * products,
        float64_flops_per_second=EFFICIENCY * gpu.float64_flops_per_second,
        bytes_per_second=gpu.bytes_per_second,
        gpu_bytes=gpu.memory_bytes,
        count=count,
    )
