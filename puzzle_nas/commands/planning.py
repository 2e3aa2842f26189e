"""The command that says what a recipe will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puzzle_nas.commands.app import Overrides, app

if TYPE_CHECKING:
    from puzzle_nas.planning.machines import Machine
    from puzzle_nas.planning.plan import Plan, StagePlan


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/ and: puzzle recipe.")],
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Plan for GPUs of this kind, such as H100.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of these GPUs, each with a process of its own.")] = 1,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A config.json, for a parent that is not on this machine.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where results will go. Default: runs/RECIPE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time, memory and disk of each stage before anything runs, and which settings make it fit (docs/plan.md).

    Without --gpu the plan is for this machine, whose speed is measured in two seconds.
    """
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.families import architecture_of
    from puzzle_nas.planning.machines import named_gpus
    from puzzle_nas.planning.measuring import this_machine
    from puzzle_nas.planning.plan import make_plan
    from puzzle_nas.planning.refusals import check_files, check_shapes
    from puzzle_nas.planning.shapes import meta_model, model_size, read_parent_config
    from puzzle_nas.recipe import search_space_of
    from puzzle_nas.recipe_text import load_recipe

    settings = load_recipe(recipe, overrides or [])
    if gpu is None and count > 1:
        raise RecipeError("--count is a number of GPUs; name them with --gpu, such as --gpu H100.")
    machine = named_gpus(gpu, count, settings.precision) if gpu else None
    found = read_parent_config(settings.parent, config)
    model = meta_model(found)
    check_shapes(settings, model)
    if machine is None:
        check_files(settings)
    size = model_size(model, search_space_of(settings, architecture_of(found)))
    machine = machine or this_machine(settings, size, run_dir or Path("runs") / recipe.stem)
    plan = make_plan(settings, size, machine)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=1))
        return
    _print(plan, str(config or settings.parent))


def _print(plan: Plan, parent: str) -> None:
    from puzzle_nas.pipeline import stage_named
    from puzzle_nas.planning.plan import duration
    from puzzle_nas.report.terminal import FigureTable, print_tables

    names = {stage.stage: stage_named(stage.stage).command for stage in plan.stages}
    rows = [[names[stage.stage], *_figures(stage)] for stage in plan.stages]
    most = max(plan.stages, key=lambda stage: stage.main_bytes).main_bytes
    gpus = [stage.gpu_bytes for stage in plan.stages if stage.gpu_bytes is not None]
    last = plan.stages[-1].disk_bytes
    rows.append(["whole run", duration(plan.seconds), _bytes(most), _bytes(max(gpus, default=None)), _bytes(last)])
    columns = ("stage", "time", "main memory", "GPU memory", "disk")
    millions = plan.parameters / 1e6
    size = f"{millions:.1f} M" if millions < 100 else f"{millions / 1e3:.2f} B"
    print(f"{parent}: {size} parameters. {_described(plan.machine)}")
    print_tables(FigureTable("", columns, rows))
    for stage in plan.stages:
        if stage.problem:
            print(f"{names[stage.stage]} {stage.problem}.")


def _described(machine: Machine) -> str:
    how = "published figures" if machine.main_bytes is None else "measured"
    return (
        f"{machine.name}: {_scaled(machine.flops_per_second)}FLOP/s of products, "
        f"{machine.bytes_per_second / 1e9:,.0f} GB/s ({how})."
    )


def _figures(stage: StagePlan) -> list[str]:
    from puzzle_nas.planning.plan import duration

    return [duration(stage.seconds), _bytes(stage.main_bytes), _bytes(stage.gpu_bytes), _bytes(stage.disk_bytes)]


def _bytes(count: float | None) -> str:
    return f"{_scaled(count)}B" if count else "-"


def _scaled(value: float) -> str:
    """Three digits and a prefix."""
    for scale, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value / 1e6:.3g} M"
