"""A recipe's stages on a machine: how long, how much memory and disk, what does not fit, and what makes it fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_nas.planning.counting import Counts
from puzzle_nas.planning.demands import DEMANDS, Demand, demands
from puzzle_nas.planning.machines import GB, Machine
from puzzle_nas.planning.sizes import ModelSize
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.recipe_text import apply_override

IDLE_BYTES, IDLE_BYTES_WITH_GPU, GPU_CONTEXT_BYTES = 0.4 * GB, 3 * GB, 0.8 * GB
"""Of a process that has loaded the libraries and nothing else (benchmarks/results/distillation.json); with CUDA's; of
CUDA on the GPU."""

REMEDIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "measure_costs": (("costs.file=costs.json",),),
    "build_library": (("memory=stream",),),
    "distill_blocks": (("memory=stream",), ("bld.batch_tokens=512",), ("bld.shard_tokens=65536",)),
    "score_blocks": (("memory=stream",),),
    "couple_blocks": (("memory=stream",), ("bld.shard_tokens=65536",)),
    "search_architecture": (("search.effort=fast",), ("costs.file=costs.json",)),
    "assemble_child": (("memory=stream",),),
    "refit_child": (("memory=stream",), ("refit=false",)),
    "distill_child": (
        ("gkd.micro_batch_tokens=512",),
        ("gkd.gradient_checkpointing=true",),
        ("gkd.parent_top_k=64", "gkd.losses={kl: 1}"),
    ),
}
"""Settings that let a stage take less, the least harmful first; several of them together where none is enough."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    stage: str
    seconds: float
    main_bytes: float
    """Main memory at the peak, of all processes of a machine."""
    gpu_bytes: float | None
    """Memory of the fullest GPU at the peak; None without GPUs."""
    disk_bytes: float
    """In the run folder at the end of the stage, those of earlier ones included, and what it needs meanwhile."""
    problem: str | None = None
    """What does not fit, in a sentence that names the setting that helps."""


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    machine: Machine
    parameters: int
    """Of the parent."""
    stages: tuple[StagePlan, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "machine": dataclasses.asdict(self.machine),
            "parameters": self.parameters,
            "seconds": self.seconds,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
        }


def make_plan(recipe: Recipe, size: ModelSize, machine: Machine) -> Plan:
    """What each stage of a recipe takes on a machine."""
    planned, kept = [], 0.0
    for demand in demands(_counts(recipe, size, machine)):
        stage = _planned(demand, machine, kept)
        if excess := _excess(stage, machine):
            stage = dataclasses.replace(stage, problem=_advice(excess, demand.stage, recipe, size, machine, kept))
        planned.append(stage)
        kept += demand.disk_bytes
    return Plan(machine, size.parameters, tuple(planned))


def _counts(recipe: Recipe, size: ModelSize, machine: Machine) -> Counts:
    space = search_space_of(recipe, size.architecture)
    room = machine.gpu_bytes if machine.is_gpu else machine.main_bytes
    return Counts(recipe, space, size, machine.itemsize, machine.is_gpu, room or math.inf, machine.count)


def _planned(demand: Demand, machine: Machine, kept: float) -> StagePlan:
    """Args: kept: bytes on disk that earlier stages left."""
    processes = machine.sharing_main if demand.is_shared else 1
    if machine.is_gpu:
        main = processes * (IDLE_BYTES_WITH_GPU + demand.loaded_bytes)
        gpu = GPU_CONTEXT_BYTES + demand.device_bytes if demand.device_bytes else 0.0
    else:
        # Weights are read from a mapped file, and copied.
        main, gpu = IDLE_BYTES + max(demand.device_bytes, 2 * demand.loaded_bytes), None
    disk = kept + demand.disk_bytes + demand.scratch_bytes
    return StagePlan(demand.stage, machine.seconds(demand.work, demand.is_shared), main, gpu, disk)


def _excess(stage: StagePlan, machine: Machine) -> str | None:
    """What a stage needs more of than there is."""
    for what, needed, there in (
        ("GPU memory", stage.gpu_bytes, machine.gpu_bytes),
        ("main memory", stage.main_bytes, machine.main_bytes),
        ("disk", stage.disk_bytes, machine.disk_bytes),
    ):
        if needed is not None and there is not None and needed > there:
            return f"needs {needed / GB:,.0f} GB of {what}, and there are {there / GB:,.0f}"
    return None


def _advice(excess: str, stage: str, recipe: Recipe, size: ModelSize, machine: Machine, kept: float) -> str:
    for overrides in _remedies(stage):
        demand = DEMANDS[stage](_counts(_changed(recipe, overrides), size, machine))
        if not _excess(_planned(demand, machine, kept), machine):
            return f"{excess}; it fits with {shlex.join(overrides)}"
    return f"{excess}; no setting makes it fit"


def _remedies(stage: str) -> Iterator[Sequence[str]]:
    """Each remedy alone, then the first two together, and so on."""
    alone = REMEDIES.get(stage, ())
    yield from alone
    for count in range(2, len(alone) + 1):
        yield list(itertools.chain.from_iterable(alone[:count]))


def _changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    data = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(data, override)
    return Recipe.model_validate(data)


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours, in two or three digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
