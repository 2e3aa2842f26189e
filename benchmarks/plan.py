"""`puzzle plan` against a run: seconds, peak memory and disk of each stage, as planned and as it took.

Makes the run, or goes on with it, in one thread. Seconds are of that thread's processor time, and so are the rates that
the plan is made from: what else the machine does counts for little. With --wall they are of the clock, in as many
threads as the recipe says: that wants a quiet machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from benchmarks.common import RunArgument, by_arithmetic, report
from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.families import architecture_of, parent_checkpoint
from puzzle_nas.parents.config import read_config
from puzzle_nas.planning import measuring
from puzzle_nas.planning.plan import make_plan
from puzzle_nas.planning.shapes import meta_model, model_size
from puzzle_nas.recipe import Recipe, search_space_of
from puzzle_nas.recipe_text import load_recipe


def compared(recipe: Recipe, run: RunFolder) -> Iterator[tuple[str, float]]:
    """Figures of every stage, and of all together."""
    config = read_config(parent_checkpoint(run))
    size = model_size(meta_model(config), search_space_of(recipe, architecture_of(config)))
    plan = make_plan(recipe, size, measuring.this_machine(recipe, size, run.path))
    planned = recorded = 0.0
    for stage in plan.stages:
        found = read_json(run / "seconds" / f"{stage.stage}.json")
        planned, recorded = planned + stage.seconds, recorded + found["seconds"]
        yield f"seconds_planned.{stage.stage}", stage.seconds
        yield f"seconds_recorded.{stage.stage}", found["seconds"]
        yield f"peak_gigabytes_planned.{stage.stage}", stage.main_bytes / 1e9
        yield f"peak_gigabytes_recorded.{stage.stage}", found["peak_memory_bytes"] / 1e9
    yield "seconds_planned.all", planned
    yield "seconds_recorded.all", recorded
    yield "disk_gigabytes_planned", plan.stages[-1].disk_bytes / 1e9
    made = ("parent", "data", "library", "child", "child-refit", "child-gkd", "baselines")
    files = (path for folder in made for path in (run / folder).rglob("*") if path.is_file())
    yield "disk_gigabytes_recorded", sum(path.stat().st_size for path in files) / 1e9


def main(
    recipe: Path,
    run: RunArgument,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    wall: Annotated[bool, typer.Option("--wall", help="The clock's seconds, in all threads.")] = False,
) -> None:
    """See above."""
    overrides = overrides or []
    if not wall:
        pipeline.time = measuring.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
        overrides = ["threads=1", *overrides]
    loaded, folder = load_recipe(recipe, overrides), RunFolder(run)
    pipeline.run_stages(loaded, folder)
    report(by_arithmetic(f"plan_{run.name}"), dict(compared(loaded, folder)))
