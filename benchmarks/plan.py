"""`puzzle plan` against a run: seconds, peak memory and disk of each stage, as planned and as it took.

    python benchmarks/plan.py RECIPE RUN [KEY=VALUE ...]

Makes the run, or goes on with it, in one thread. Seconds are of that thread's processor time, and so are the rates that
the plan is made from: what else the machine does counts for little. Peaks are of a whole process, so those planned are
of the stage and all before it.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from results import by_arithmetic, save

from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.families import architecture_of, parent_checkpoint
from puzzle_nas.parents.config import read_config
from puzzle_nas.planning import measuring
from puzzle_nas.planning.measuring import this_machine
from puzzle_nas.planning.plan import make_plan
from puzzle_nas.planning.shapes import model_size
from puzzle_nas.recipe import Recipe, load_recipe, search_space_of


def compared(recipe: Recipe, run: RunFolder) -> Iterator[tuple[str, float]]:
    """Figures of every stage, and of all together."""
    config = read_config(parent_checkpoint(run))
    size = model_size(config, search_space_of(recipe, architecture_of(config)))
    plan = make_plan(recipe, size, this_machine(recipe, size, run.path))
    peaks = itertools.accumulate((stage.main_bytes for stage in plan.stages), max)
    planned = recorded = 0.0
    for stage, peak in zip(plan.stages, peaks, strict=True):
        found = read_json(run / "seconds" / f"{stage.stage}.json")
        planned, recorded = planned + stage.seconds, recorded + found["seconds"]
        yield f"seconds_planned.{stage.stage}", stage.seconds
        yield f"seconds_recorded.{stage.stage}", found["seconds"]
        yield f"peak_gigabytes_planned.{stage.stage}", peak / 1e9
        yield f"peak_gigabytes_recorded.{stage.stage}", found["peak_memory_bytes"] / 1e9
    yield "seconds_planned.all", planned
    yield "seconds_recorded.all", recorded
    yield "disk_gigabytes_planned", plan.stages[-1].disk_bytes / 1e9
    made = ("parent", "data", "library", "child", "child-refit", "child-gkd", "baselines")
    files = (path for folder in made for path in (run / folder).rglob("*") if path.is_file())
    yield "disk_gigabytes_recorded", sum(path.stat().st_size for path in files) / 1e9


def main() -> None:
    """See above."""
    pipeline.time = measuring.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    recipe, run = load_recipe(Path(sys.argv[1]), ["threads=1", *sys.argv[3:]]), RunFolder(sys.argv[2])
    pipeline.run_stages(recipe, run)
    figures = dict(compared(recipe, run))
    for name, value in figures.items():
        print(f"  {name:50s} {value:10.2f}")
    print("Written to", save(by_arithmetic(f"plan_{run.path.name}"), figures))


if __name__ == "__main__":
    main()
