"""The stages in order; run a range of them; skip what is already done."""

from __future__ import annotations

import time
from types import ModuleType

import torch
import transformers

from puzzle_nas import __version__
from puzzle_nas.artifacts import RunFolder, fingerprint, write_bytes
from puzzle_nas.engines import ENGINES
from puzzle_nas.errors import ArtifactError, RecipeError
from puzzle_nas.progress import console
from puzzle_nas.recipe import Recipe, parse_recipe
from puzzle_nas.stages import (
    assemble_child,
    build_library,
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
    search_architecture,
    assemble_child,
    refit_child,
    distill_child,
    evaluate_child,
    write_report,
)
"""Each has NAME, COMMAND, NEEDS (stages whose outputs it reads), SETTINGS (recipe fields), OUTPUTS (globs), run."""

SHARED = (distill_blocks, score_blocks, distill_child)
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
    inputs = {}
    for name in stage.NEEDS:
        record = run.record(name)
        if record is None:
            command = stage_named(name).COMMAND
            raise ArtifactError(f"{run} has no finished {command} yet. Make it with: puzzle {command} {run}")
        inputs[name] = record["outputs_fingerprint"]
    if "costs" in settings and recipe.costs.file is not None and recipe.costs.file.is_file():
        inputs["cost_file"] = recipe.costs.file.read_text()
    return fingerprint([settings, inputs])


def run_stage(stage: ModuleType, recipe: Recipe, run: RunFolder, again: bool = False, label: str = "") -> None:
    """Run one stage, unless it is done. An interrupted stage goes on where it stopped."""
    source = parallel.from_first(lambda: _begin(stage, recipe, run, again, label))
    if source is None:
        return
    begin = time.perf_counter()
    try:
        if stage in SHARED or parallel.is_first():
            stage.run(recipe, run)
        parallel.gathered(())
    finally:
        if parallel.is_first():
            run.add_seconds(stage.NAME, time.perf_counter() - begin)
    if parallel.is_first():
        run.finish(stage.NAME, source, stage.OUTPUTS)
        console.print(f"  {time.perf_counter() - begin:.0f} s")


def _begin(stage: ModuleType, recipe: Recipe, run: RunFolder, again: bool, label: str) -> str | None:
    """The fingerprint of what the stage will be made from; None when it is done."""
    source = made_from(stage, recipe, run)
    record = run.record(stage.NAME)
    if again:
        run.discard(stage.NAME, stage.OUTPUTS)
    elif record is not None and record["made_from"] == source:
        run.verify_outputs(stage.NAME, stage.COMMAND)
        console.print(f"{label}{stage.COMMAND}: already done")
        return None
    console.print(f"{label}{stage.COMMAND}")
    run.begin(stage.NAME, source, stage.OUTPUTS)
    return source


def run_stages(recipe: Recipe, run: RunFolder, first: str | None = None, last: str | None = None) -> None:
    """Run the stages from `first` to `last` (command names), both included."""
    commands = [stage.COMMAND for stage in STAGES]
    begin = commands.index(stage_named(first).COMMAND) if first else 0
    end = commands.index(stage_named(last).COMMAND) if last else len(STAGES) - 1
    if begin > end:
        raise RecipeError(f"--from {first} comes after --to {last}; the order is {', '.join(commands)}.")
    stages = STAGES[begin : end + 1]
    if any("engine" in stage.SETTINGS for stage in stages) and not recipe.costs.force:
        ENGINES[recipe.engine].python()
    claim_run(recipe, run)
    for number, stage in enumerate(stages, start=begin + 1):
        run_stage(stage, recipe, run, label=f"[{number}/{len(STAGES)}] ")
