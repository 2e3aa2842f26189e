"""Commands that make a run and look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from puzzle_nas.commands.app import Again, Overrides, RunArgument, app
from puzzle_nas.stages import STAGES, Stage


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/ and: puzzle recipe.")],
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where results go. Default: runs/RECIPE.")] = None,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start with this stage.")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop after this stage.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine (docs/many-processes.md).")] = 1,
) -> None:
    """Make a child: every stage in order, skipping what is done."""
    if nproc > 1:
        _run_in_processes(nproc, recipe, overrides or [], run_dir, first, last)
        return
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.errors import puzzle_command
    from puzzle_nas.recipe_text import load_recipe

    settings = load_recipe(recipe, overrides or [])
    # Imports torch: a mistake in the recipe need not wait for that.
    from puzzle_nas import pipeline

    run = RunFolder(run_dir or Path("runs") / recipe.stem)
    pipeline.run_stages(settings, run, first, last)
    if last is None:
        print_summary(run.path)
        print(f"Report: {run.report}\nTry the child: {puzzle_command('generate', run, 'Why is the sky blue?')}")


def _run_in_processes(nproc, recipe, overrides, run_dir, first, last) -> None:
    from puzzle_nas.recipe_text import load_recipe

    load_recipe(recipe, overrides)
    from puzzle_nas.training.parallel import launch

    options = {"--run-dir": run_dir, "--from": first, "--to": last}
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    code = launch(nproc, ["run", str(recipe), *overrides, *given])
    if code:
        raise typer.Exit(code)


def _add_stage(stage: Stage) -> None:
    @app.command(stage.command, help=stage.help)
    def stage_command(run_dir: RunArgument, overrides: Overrides = None, again: Again = False) -> None:
        from puzzle_nas.artifacts import RunFolder
        from puzzle_nas.recipe_text import load_run_recipe

        run = RunFolder(run_dir)
        load_run_recipe(run.recipe, overrides or [])
        from puzzle_nas import pipeline

        with pipeline.held(run):
            recipe = load_run_recipe(run.recipe, overrides or [])
            if overrides:
                pipeline.claim_run(recipe, run)
            pipeline.run_stage(stage, recipe, run, again)


for _stage in STAGES:
    _add_stage(_stage)


def print_summary(run_dir: Path, as_json: bool = False) -> None:
    """A run's child and its summary table."""
    from puzzle_nas.artifacts import RunFolder, read_json, written_by_this_version
    from puzzle_nas.errors import puzzle_command
    from puzzle_nas.report.summary import made_since
    from puzzle_nas.report.tables import show
    from puzzle_nas.report.terminal import print_tables

    run = RunFolder(run_dir)
    _require_finished(run_dir)
    summary = read_json(run.summary, "write-report")
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    with written_by_this_version(run.summary, "write-report"):
        tables, since = show(summary), made_since(summary, run)
    print_tables(tables)
    if since:
        stages = ", ".join(name.replace("_", "-") for name in since)
        print(
            f"Older than what {stages} has made since; bring it up to date with: {puzzle_command('write-report', run)}"
        )


def _require_finished(run_dir: Path) -> None:
    """Imports the pipeline, which takes seconds, only where there is something to say."""
    from puzzle_nas.artifacts import RunFolder

    if not RunFolder(run_dir).summary.is_file():
        from puzzle_nas import pipeline

        pipeline.require_finished(RunFolder(run_dir))


@app.command("recipe")
def recipe_command() -> None:
    """Print every setting of a recipe with its default and meaning."""
    from puzzle_nas.recipe_text import explained_settings

    print(explained_settings())


@app.command("verify")
def verify_command(
    run_dir: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Check every file against its recorded hash, and every stage against its recorded inputs.

    Exit code 2 if something is missing, changed or stale; unfinished stages are not an error.
    """
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.verify import verify_run

    result = verify_run(RunFolder(run_dir))
    print(json.dumps(result.to_dict(), indent=1) if as_json else result.to_text())
    if not result.sound:
        raise typer.Exit(2)


@app.command("show")
def show_command(
    run_dir: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="Print summary.json.")] = False
) -> None:
    """The child layer by layer, and the summary table."""
    print_summary(run_dir, as_json)


@app.command("compare")
def compare_command(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, two or more.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print every summary, and what cannot be compared.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page.")] = None,
) -> None:
    """Several finished runs side by side."""
    from puzzle_nas.artifacts import RunFolder, write_bytes
    from puzzle_nas.report.comparison import comparison_json, load_runs, render_comparison, show_comparison
    from puzzle_nas.report.terminal import print_tables

    for path in run_dirs:
        _require_finished(path)
    runs = load_runs([RunFolder(path) for path in run_dirs])
    if html is not None:
        write_bytes(html, render_comparison(runs).encode())
    if as_json:
        print(json.dumps(comparison_json(runs), indent=1))
        return
    print_tables(show_comparison(runs))
    if html is not None:
        print(f"Page: {html}")
