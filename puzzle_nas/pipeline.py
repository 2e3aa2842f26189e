"""The stages in order; run a range of them; skip what is already done."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers

from puzzle_nas import __version__
from puzzle_nas.artifacts import RunFolder, fingerprint, write_bytes
from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.engines import ENGINES
from puzzle_nas.errors import ArtifactError, PuzzleError, RecipeError, puzzle_command
from puzzle_nas.planning.remaining import Remaining
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe
from puzzle_nas.recipe_text import load_run_recipe
from puzzle_nas.stages import EVERYTHING, STAGES, Stage
from puzzle_nas.stages.prepare_parent import local_weights
from puzzle_nas.training import parallel


def stage_named(command: str) -> Stage:
    """The stage of a command name (`distill-blocks`).

    Raises:
        RecipeError: there is none.
    """
    for stage in STAGES:
        if command in (stage.command, stage.name):
            return stage
    raise RecipeError(f"There is no stage '{command}'; stages: {', '.join(s.command for s in STAGES)}.")


def needs(stage: Stage, recipe: Recipe) -> list[Stage]:
    """The stages whose outputs it reads, without those that the recipe leaves out."""
    return [before for before in map(stage_named, stage.needs) if not before.why_left_out(recipe)]


def open_run(run: RunFolder) -> Recipe:
    """The recipe of an existing run folder.

    Raises:
        ArtifactError: the folder is none, or another version's.
    """
    return load_run_recipe(run.recipe)


def require_finished(run: RunFolder) -> None:
    """See that there is a summary.

    Raises:
        ArtifactError: there is not; says how far the run has come.
    """
    if run.summary.is_file():
        return
    recipe = open_run(run)
    every = [stage for stage in STAGES if not stage.why_left_out(recipe)]
    done = [stage.command for stage in every if run.record_path(stage.name).exists()]
    following = next((stage.command for stage in every if stage.command not in done), STAGES[-1].command)
    raise ArtifactError(
        f"{run} is not finished: {', '.join(done) or 'nothing'} done, next is {following}. Go on with the same recipe: "
        f"{puzzle_command('run', 'RECIPE', '--run-dir', run)}"
    )


def claim_run(recipe: Recipe, run: RunFolder) -> None:
    """Make `run` the folder of this recipe.

    A recipe whose parent or data were corrected before anything was made of them is the same one.

    Raises:
        ArtifactError: something was made in it of a recipe with another parent or other data.
    """
    if not parallel.is_first():
        return
    if run.recipe.is_file() and any(run.record_path(stage.name).exists() for stage in STAGES):
        before = open_run(run)
        for part, stage in (("parent", "prepare_parent"), ("data", "prepare_data")):
            if getattr(before, part) != getattr(recipe, part) and run.record_path(stage).exists():
                raise ArtifactError(
                    f"{run} belongs to another recipe: its {part} differs. "
                    "Name another folder with --run-dir, or delete it."
                )
    versions = f"# puzzle-nas {__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    write_bytes(run.recipe, (versions + recipe.to_yaml()).encode())


def made_from(stage: Stage, recipe: Recipe, run: RunFolder) -> str:
    """Fingerprint of everything that a stage's outputs depend on.

    Raises:
        ArtifactError: a stage that it needs has not finished.
    """
    settings = settings_read(stage, recipe)
    inputs: dict[str, Any] = {}
    for before in needs(stage, recipe):
        record = run.record(before.name)
        if record is None:
            way_out = puzzle_command(before.command, run)
            raise ArtifactError(f"{run} has no finished {before.command} yet. Make it with: {way_out}")
        inputs[before.name] = record["outputs_fingerprint"]
    if stage.name == "measure_costs" and recipe.costs.file is not None and recipe.costs.file.is_file():
        inputs["cost_file"] = recipe.costs.file.read_text()
    if stage.name == "prepare_parent":
        inputs["weights"] = local_weights(recipe)
    if "scoring" in stage.reads and recipe.scoring.task is not None:
        inputs["task_items"] = [repr(item) for item in read_task(recipe.scoring.task)]
    return fingerprint([settings, inputs])


def settings_read(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """What the stage reads of the recipe, as JSON by dotted name."""
    settings = recipe.model_dump(mode="json")
    if stage.reads == EVERYTHING:
        return settings
    return {name: reduce(lambda part, key: part[key], name.split("."), settings) for name in stage.reads}


def verify_inputs(stage: Stage, recipe: Recipe, run: RunFolder) -> None:
    """Check the files of every stage that comes before.

    Raises:
        ArtifactError: one is missing or changed.
    """
    for before in needs(stage, recipe):
        verify_inputs(before, recipe, run)
        run.verify_outputs(before.name, before.command)


def run_stage(
    stage: Stage,
    recipe: Recipe,
    run: RunFolder,
    again: bool = False,
    label: str = "",
    remaining: Remaining | None = None,
) -> None:
    """Run one stage, unless it is done. An interrupted stage goes on where it stopped."""
    source = parallel.from_first(lambda: _begin(stage, recipe, run, again, label, remaining))
    if source is None:
        return
    begin = time.perf_counter()
    _forget_peak_memory()
    try:
        if stage.shared or parallel.is_first():
            stage.run(recipe, run)
        peak = max(parallel.gathered([_peak_memory_bytes()]))
    except BaseException:
        if parallel.is_first():
            # On a full disk this fails as well, and what failed first is what to say.
            with contextlib.suppress(PuzzleError):
                run.add_seconds(stage.name, time.perf_counter() - begin, _peak_memory_bytes())
        raise
    if parallel.is_first():
        run.add_seconds(stage.name, time.perf_counter() - begin, peak)
        run.finish(stage.name, source, stage.writes)
        console.print(f"  {time.perf_counter() - begin:.0f} s")


def _begin(
    stage: Stage, recipe: Recipe, run: RunFolder, again: bool, label: str, remaining: Remaining | None
) -> str | None:
    """The fingerprint of what the stage will be made from; None when it is done."""
    _require_runnable(stage, recipe)
    source = made_from(stage, recipe, run)
    record = None if again else run.record(stage.name)
    if record is not None and record["made_from"] == source:
        run.verify_outputs(stage.name, stage.command)
        run.clear_scratch(stage.name)
        console.print(f"{label}{stage.command}: already done")
        return None
    verify_inputs(stage, recipe, run)
    if again:
        run.discard(stage.name, stage.writes)
    console.print(f"{label}{stage.command}{remaining.text(stage.name) if remaining else ''}")
    run.begin(stage.name, source, stage.writes)
    return source


def _require_runnable(stage: Stage, recipe: Recipe) -> None:
    """Raises: RecipeError: the recipe leaves the stage out."""
    if why := stage.why_left_out(recipe):
        raise RecipeError(why)


def _forget_peak_memory() -> None:
    """Let a stage's peak be its own on Linux; on other systems it is that of the process so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes() -> int:
    """Of this process, main memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_stages(recipe: Recipe, run: RunFolder, first: str | None = None, last: str | None = None) -> None:
    """Run the stages from `first` to `last` (command names), both included."""
    every = [stage for stage in STAGES if not stage.why_left_out(recipe)]
    begin, end = parallel.from_first(lambda: _range(recipe, every, first, last))
    with held(run):
        claim_run(recipe, run)
        names = [stage.name for stage in every[begin:end]]
        remaining = Remaining(recipe, run, names, parallel.world_size(), to_the_end=end == len(every))
        for number, stage in enumerate(every[begin:end], start=begin + 1):
            run_stage(stage, recipe, run, label=f"[{number}/{len(every)}] ", remaining=remaining)


def _range(recipe: Recipe, every: Sequence[Stage], first: str | None, last: str | None) -> tuple[int, int]:
    """Which of `every` stage is meant, checked as far as can be before any runs."""
    for name in (first, last):
        if name:
            _require_runnable(stage_named(name), recipe)
    commands = [stage.command for stage in every]
    begin = commands.index(stage_named(first).command) if first else 0
    end = commands.index(stage_named(last).command) if last else len(every) - 1
    if begin > end:
        raise RecipeError(f"--from {first} comes after --to {last}; the order is {', '.join(commands)}.")
    if any("engine" in stage.reads for stage in every[begin : end + 1]) and not recipe.costs.force:
        ENGINES[recipe.engine].python()
    if recipe.scoring.task is not None:
        half_of(read_task(recipe.scoring.task), True, recipe.scoring.task)
    return begin, end + 1


def held(run: RunFolder) -> contextlib.AbstractContextManager[None]:
    """The run folder's lock, which the first of several processes holds for all of them."""
    return run.locked() if parallel.is_first() else contextlib.nullcontext()
