"""Commands that search: a run, any table, a range of limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from puzzle_nas.commands.app import RunArgument, app
from puzzle_nas.effort import GAP, TIME_LIMIT_SECONDS


@app.command("search")
def search_command(
    run_dir: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run folder, unless --table is given.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=VALUE",
            help="For a run: speedup=1.5, memory_bytes=2e8, latency_ms=900, throughput_tokens_per_second=80, "
            "parameters=1e8. For a table: COLUMN=MAX or COLUMN=MIN:MAX. Repeatable.",
        ),
    ] = None,
    purpose: Annotated[
        Literal["draft"] | None,
        typer.Option(
            "--for",
            help="For a run: the children that are the best drafts of their parent in speculative decoding.",
        ),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="A CSV, Parquet or JSON-lines table instead of a run.")] = None,
    minimize: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the table to minimise.")] = None,
    maximize: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the table to maximise.")] = None,
    solutions: Annotated[int, typer.Option(help="How many solutions, for a table.")] = 1,
    min_different: Annotated[int, typer.Option(help="Layers in which each must differ from every earlier one.")] = 1,
    gap: Annotated[float, typer.Option(help="Relative optimality gap at which to stop.")] = GAP,
    time_limit_seconds: Annotated[float, typer.Option(help="Longest time for one solve.")] = TIME_LIMIT_SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The best architecture within limits, for a run or for any table.

    The run's own child does not change. The result is written to RUN/search/LIMITS/architecture.json, that of
    --for draft to RUN/search/drafts.json.
    """
    from puzzle_nas.errors import RecipeError, puzzle_command

    if (table is None) == (run_dir is None):
        raise RecipeError("Name either a run folder or a table with --table.")
    if table is not None and purpose is not None:
        raise RecipeError("--for draft is for a run folder, whose cost table and scores it reads; leave out --table.")
    if table is not None:
        _search_table(
            table, limit or [], minimize, maximize, solutions, min_different, gap, time_limit_seconds, as_json
        )
        return
    assert run_dir is not None
    if minimize or maximize or solutions != 1 or min_different != 1:
        raise RecipeError("--minimize, --maximize, --solutions and --min-different are for a table; add --table FILE.")
    if purpose == "draft":
        _search_drafts(run_dir, dict(map(_named_number, limit or [])), as_json)
        return
    if not limit:
        own = puzzle_command("search-architecture", run_dir)
        raise RecipeError(f"Name a limit, such as --limit speedup=1.5; the search within the recipe's limits is: {own}")
    from puzzle_nas import pipeline
    from puzzle_nas.architecture import Architecture
    from puzzle_nas.artifacts import RunFolder, write_json
    from puzzle_nas.choosing.architecture_search import ArchitectureSearch
    from puzzle_nas.stages.search_architecture import search

    limits = dict(_named_number(text) for text in limit)
    run = RunFolder(run_dir)
    recipe = pipeline.open_run(run)
    result = search(ArchitectureSearch.at_best_batch_sizes(recipe, run, limits), limits, gap, time_limit_seconds)
    path = run.architecture(",".join(f"{name}={value:g}" for name, value in limits.items()))
    write_json(path, result)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    child = Architecture.from_list(result["architecture"])
    for layer, block in enumerate(child.layers):
        print(f"{layer:3d}  {' '.join(f'{spec.id:18s}' for spec in block.values())}".rstrip())
    if child.head.format:
        print(f"     {child.head.id}")
    print(f"{'':16s} score sum  predicted speed-up")
    for name, found in {"child": result, **result["baselines"]}.items():
        if "infeasible" in found:
            print(f"{name:16s} {found['infeasible']}")
        else:
            print(f"{name:16s} {found['score_sum']:9.4f}  {found['speedup_predicted']:.3f}x")
    changed = [f"search.limits.{name}={value:g}" for name, value in limits.items()]
    print(f"Written to {path}. Make that child with: {puzzle_command('run', 'RECIPE', *changed, '--run-dir', run)}")


def _named_number(text: str) -> tuple[str, float]:
    from puzzle_nas.errors import RecipeError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise RecipeError(f"'{text}' is not a limit; write NAME=NUMBER, such as speedup=1.5.") from None


def _search_drafts(run_dir, limits, as_json) -> None:
    from puzzle_nas import pipeline
    from puzzle_nas.artifacts import RunFolder, write_json
    from puzzle_nas.choosing.drafts import TOKEN_LIMIT, search_drafts
    from puzzle_nas.errors import puzzle_command
    from puzzle_nas.report.tables import draft_note, show_drafts
    from puzzle_nas.report.terminal import print_tables

    run = RunFolder(run_dir)
    found = search_drafts(pipeline.open_run(run), run, limits)
    write_json(run.drafts, found)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print_tables(show_drafts(found))
    print(draft_note(found))
    if found["best"]["speedup_predicted"] > 1:
        held = {**limits, TOKEN_LIMIT: found["best"][TOKEN_LIMIT]}
        changed = "search.limits={" + ", ".join(f"{name}: {value:.6g}" for name, value in held.items()) + "}"
        print(f"Make it with: {puzzle_command('run', 'RECIPE', changed, '--run-dir', run)}")
    print(f"Written to {run.drafts}.")


def _search_table(path, limits, minimize, maximize, solutions, min_different, gap, seconds, as_json) -> None:
    import time

    from puzzle_nas.errors import RecipeError
    from puzzle_nas.search import Limit, Problem, read_table, solve

    if (minimize is None) == (maximize is None):
        raise RecipeError("Say what to optimise with exactly one of --minimize COLUMN and --maximize COLUMN.")
    bounds = []
    for text in limits:
        column, _, value = text.partition("=")
        low, colon, high = value.rpartition(":")
        try:
            bounds.append(Limit(column, float(low) if low else None, float(high) if high or not colon else None))
        except ValueError:
            raise RecipeError(f"'{text}' is not a limit; write COLUMN=MAX or COLUMN=MIN:MAX.") from None
    start = time.perf_counter()
    sense: Literal["minimise", "maximise"] = "minimise" if minimize else "maximise"
    problem = Problem(read_table(path), minimize or maximize or "", sense, tuple(bounds))
    found = solve(problem, gap, seconds, solutions, min_different)
    result = {
        "solutions": [
            {
                "choices": {str(k): v for k, v in s.choices.items()},
                "score": s.score,
                "bound": s.bound,
                "gap": s.gap,
                "costs": s.costs,
                "status": s.status,
            }
            for s in found
        ],
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for number, s in enumerate(found, start=1):
        bound = "no bound" if s.bound is None else f"bound {s.bound:.6g}"
        print(f"solution {number}: score {s.score:.6g} ({bound}, {s.status})")
        for layer, variant in s.choices.items():
            print(f"  {layer}: {variant}")
        print("  totals: " + ", ".join(f"{name}={value:.6g}" for name, value in s.costs.items()))


@app.command("frontier")
def frontier_command(
    run_dir: RunArgument,
    limit_range: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=FROM:TO[:COUNT]",
            help="Default: speed-ups from 1.05 to the largest possible. The recipe's other limits apply.",
        ),
    ] = None,
) -> None:
    """The best child and the baselines over a range of limits: RUN/search/frontier.json, and .html, the picture."""
    from puzzle_nas import pipeline
    from puzzle_nas.artifacts import RunFolder, read_json, write_bytes, write_json
    from puzzle_nas.choosing.architecture_search import ArchitectureSearch
    from puzzle_nas.choosing.frontier import LimitRange, solve_frontier
    from puzzle_nas.report.frontier_page import render_frontier
    from puzzle_nas.report.tables import show_frontier
    from puzzle_nas.report.terminal import print_tables

    run = RunFolder(run_dir)
    recipe = pipeline.open_run(run)
    asked = LimitRange.parse(limit_range) if limit_range else None
    frontier = solve_frontier(recipe, ArchitectureSearch.load(recipe, run), asked)
    write_json(run.frontier, frontier)
    picture = run.frontier.with_suffix(".html")
    write_bytes(picture, render_frontier(frontier, read_json(run.parent)["source"]).encode())
    print_tables(show_frontier(frontier))
    print(f"Written to {run.frontier}; the picture is {picture}.")
