"""The stages in order; run a range of them; skip what is already done."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import transformers

from puzzle_nas import __version__
from puzzle_nas.artifacts import RunFolder, fingerprint, write_bytes
from puzzle_nas.data.task_items import half_of, read_task
from puzzle_nas.engines import ENGINES
from puzzle_nas.errors import ArtifactError, PuzzleError, RecipeError
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe, parse_recipe
from puzzle_nas.stages import (
    assemble_child,
    build_library,
    couple_blocks,
    distill_blocks,
    distill_child,
    evaluate_child,
    measure_costs,
    prepare_data,
    prepare_parent,
    refit_child,
    score_blocks,
    search_architecture,
    write_report,
)
from puzzle_nas.training import parallel

STAGES: tuple[ModuleType, ...] = (
    prepare_parent,
    prepare_data,
    measure_costs,
    build_library,
    distill_blocks,
    score_blocks,
    couple_blocks,
    search_architecture,
    assemble_child,
    refit_child,
    distill_child,
    evaluate_child,
    write_report,
)
"""Each has NAME, COMMAND, NEEDS (stages whose outputs it reads), SETTINGS (recipe fields), OUTPUTS (globs), run.

One that a recipe may leave out also has `why_left_out`, a sentence or None; it then counts for nothing."""

SHARED = (distill_blocks, score_blocks, couple_blocks, distill_child)
"""Where there are several processes, each does its share of these; the first runs the others alone."""


def stage_named(command: str) -> ModuleType:
    """The stage of a command name (`distill-blocks`).

    Raises:
        RecipeError: there is none.
    """
    for stage in STAGES:
        if command in (stage.COMMAND, stage.NAME):
            return stage
    raise RecipeError(f"There is no stage '{command}'; stages: {', '.join(s.COMMAND for s in STAGES)}.")


def why_left_out(stage: ModuleType, recipe: Recipe) -> str | None:
    """Why a recipe does without a stage; None if it does not."""
    return stage.why_left_out(recipe) if hasattr(stage, "why_left_out") else None


def needs(stage: ModuleType, recipe: Recipe) -> list[ModuleType]:
    """The stages whose outputs it reads, without those that the recipe leaves out."""
    return [before for before in map(stage_named, stage.NEEDS) if not why_left_out(before, recipe)]


def open_run(run: RunFolder) -> Recipe:
    """The recipe of an existing run folder.

    Raises:
        ArtifactError: the folder is none.
    """
    if not run.recipe.is_file():
        way_out = f"Make one with: puzzle run RECIPE --run-dir {run}"
        raise ArtifactError(f"{run} is no run folder: it has no recipe.yaml. {way_out}")
    return parse_recipe(run.recipe.read_text(), name=str(run.recipe))


def claim_run(recipe: Recipe, run: RunFolder) -> None:
    """Make `run` the folder of this recipe.

    Raises:
        ArtifactError: it belongs to a recipe with another parent or other data.
    """
    if not parallel.is_first():
        return
    if run.recipe.is_file():
        before = open_run(run)
        for part in ("parent", "data"):
            if getattr(before, part) != getattr(recipe, part):
                raise ArtifactError(
                    f"{run} belongs to another recipe: its {part} differs. "
                    "Name another folder with --run-dir, or delete it."
                )
    versions = f"# puzzle-nas {__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    write_bytes(run.recipe, (versions + recipe.to_yaml()).encode())


def made_from(stage: ModuleType, recipe: Recipe, run: RunFolder) -> str:
    """Fingerprint of everything that a stage's outputs depend on.

    Raises:
        ArtifactError: a stage that it needs has not finished.
    """
    settings = recipe.model_dump(mode="json", include=set(stage.SETTINGS))
    inputs: dict[str, Any] = {}
    for before in needs(stage, recipe):
        record = run.record(before.NAME)
        if record is None:
            raise ArtifactError(
                f"{run} has no finished {before.COMMAND} yet. Make it with: puzzle {before.COMMAND} {run}"
            )
        inputs[before.NAME] = record["outputs_fingerprint"]
    if "costs" in settings and recipe.costs.file is not None and recipe.costs.file.is_file():
        inputs["cost_file"] = recipe.costs.file.read_text()
    if stage is prepare_parent:
        inputs["weights"] = prepare_parent.local_weights(recipe)
    if "scoring" in settings and recipe.scoring.task is not None:
        inputs["task_items"] = [repr(item) for item in read_task(recipe.scoring.task)]
    return fingerprint([settings, inputs])


def verify_inputs(stage: ModuleType, recipe: Recipe, run: RunFolder) -> None:
    """Check the files of every stage that comes before.

    Raises:
        ArtifactError: one is missing or changed.
    """
    for before in needs(stage, recipe):
        verify_inputs(before, recipe, run)
        run.verify_outputs(before.NAME, before.COMMAND)


def run_stage(stage: ModuleType, recipe: Recipe, run: RunFolder, again: bool = False, label: str = "") -> None:
    """Run one stage, unless it is done. An interrupted stage goes on where it stopped."""
    source = parallel.from_first(lambda: _begin(stage, recipe, run, again, label))
    if source is None:
        return
    begin = time.perf_counter()
    try:
        if stage in SHARED or parallel.is_first():
            stage.run(recipe, run)
        peak = max(parallel.gathered([_peak_memory_bytes()]))
    except BaseException:
        if parallel.is_first():
            # On a full disk this fails as well, and what failed first is what to say.
            with contextlib.suppress(PuzzleError):
                run.add_seconds(stage.NAME, time.perf_counter() - begin, _peak_memory_bytes())
        raise
    if parallel.is_first():
        run.add_seconds(stage.NAME, time.perf_counter() - begin, peak)
        run.finish(stage.NAME, source, stage.OUTPUTS)
        console.print(f"  {time.perf_counter() - begin:.0f} s")


def _begin(stage: ModuleType, recipe: Recipe, run: RunFolder, again: bool, label: str) -> str | None:
    """The fingerprint of what the stage will be made from; None when it is done."""
    _require_runnable(stage, recipe)
    source = made_from(stage, recipe, run)
    record = None if again else run.record(stage.NAME)
    if record is not None and record["made_from"] == source:
        run.verify_outputs(stage.NAME, stage.COMMAND)
        run.clear_scratch(stage.NAME)
        console.print(f"{label}{stage.COMMAND}: already done")
        return None
    verify_inputs(stage, recipe, run)
    if again:
        run.discard(stage.NAME, stage.OUTPUTS)
    console.print(f"{label}{stage.COMMAND}")
    run.begin(stage.NAME, source, stage.OUTPUTS)
    return source


def _require_runnable(stage: ModuleType, recipe: Recipe) -> None:
    """Raises: RecipeError: the recipe leaves the stage out."""
    if why := why_left_out(stage, recipe):
        raise RecipeError(why)


def _peak_memory_bytes() -> int:
    """Of this process so far, main memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_stages(recipe: Recipe, run: RunFolder, first: str | None = None, last: str | None = None) -> None:
    """Run the stages from `first` to `last` (command names), both included."""
    every = [stage for stage in STAGES if not why_left_out(stage, recipe)]
    begin, end = parallel.from_first(lambda: _range(recipe, every, first, last))
    with held(run):
        claim_run(recipe, run)
        for number, stage in enumerate(every[begin:end], start=begin + 1):
            run_stage(stage, recipe, run, label=f"[{number}/{len(every)}] ")


def _range(recipe: Recipe, every: Sequence[ModuleType], first: str | None, last: str | None) -> tuple[int, int]:
    """Which of `every` stage is meant, checked as far as can be before any runs."""
    for name in (first, last):
        if name:
            _require_runnable(stage_named(name), recipe)
    commands = [stage.COMMAND for stage in every]
    begin = commands.index(stage_named(first).COMMAND) if first else 0
    end = commands.index(stage_named(last).COMMAND) if last else len(every) - 1
    if begin > end:
        raise RecipeError(f"--from {first} comes after --to {last}; the order is {', '.join(commands)}.")
    if any("engine" in stage.SETTINGS for stage in every[begin : end + 1]) and not recipe.costs.force:
        ENGINES[recipe.engine].python()
    if recipe.scoring.task is not None:
        half_of(read_task(recipe.scoring.task), True, recipe.scoring.task)
    return begin, end + 1


def held(run: RunFolder) -> contextlib.AbstractContextManager[None]:
    """The run folder's lock, which the first of several processes holds for all of them."""
    return run.locked() if parallel.is_first() else contextlib.nullcontext()
