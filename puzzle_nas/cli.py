"""The command `puzzle`: parse arguments, call the pipeline, print results and errors; nothing else."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from puzzle_nas.errors import PuzzleError

app = typer.Typer(
    name="puzzle",
    help="Turn a trained LLM into a smaller, faster child that meets your limits, measured on your machine.\n\n"
    "Start with: puzzle run recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130
"""Exit code after Ctrl-C, by convention; typer returns it instead of raising."""

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as gkd.tokens=100000."),
]
Again = Annotated[bool, typer.Option("--again", help="Discard what this stage has made and make it anew.")]


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
    from puzzle_nas import pipeline
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    run = RunFolder(run_dir or Path("runs") / recipe.stem)
    pipeline.run_stages(settings, run, first, last)
    if last is None:
        _print_summary(run.path)
        print(f'Report: {run.report}\nTry the child: puzzle generate {run} "Why is the sky blue?"')


def _run_in_processes(nproc, recipe, overrides, run_dir, first, last) -> None:
    from puzzle_nas.recipe import load_recipe
    from puzzle_nas.training.parallel import launch

    load_recipe(recipe, overrides)
    options = {"--run-dir": run_dir, "--from": first, "--to": last}
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    code = launch(nproc, ["run", str(recipe), *overrides, *given])
    if code:
        raise typer.Exit(code)


def _add_stage(command: str, text: str) -> None:
    @app.command(command, help=text)
    def stage_command(run_dir: RunArgument, overrides: Overrides = None, again: Again = False) -> None:
        _run_stage(command, run_dir, overrides or [], again)


def _run_stage(command: str, run_dir: Path, overrides: list[str], again: bool) -> None:
    from puzzle_nas import pipeline
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.recipe import parse_recipe

    run = RunFolder(run_dir)
    recipe = pipeline.open_run(run)
    if overrides:
        recipe = parse_recipe(run.recipe.read_text(), overrides, str(run.recipe))
        pipeline.claim_run(recipe, run)
    pipeline.run_stage(pipeline.stage_named(command), recipe, run, again)


for _command, _text in (
    ("prepare-parent", "Find the parent; convert it to a transformers checkpoint where it is none."),
    ("prepare-data", "Text to packed token blocks of the five splits."),
    ("measure-costs", "Memory and runtime of every variant on this machine."),
    ("build-library", "Every variant of every layer, initialised from the parent."),
    ("distill-blocks", "Train every variant to imitate its parent block (BLD)."),
    ("score-blocks", "Damage of every variant when it alone replaces its parent block."),
    ("assemble", "The chosen variants as one checkpoint."),
    ("refit", "Correct the assembled child in closed form."),
    ("distill-child", "Train the whole child against the parent (GKD)."),
    ("evaluate", "Child against parent: quality and measured speed."),
    ("report", "Write summary.json and report.html."),
):
    _add_stage(_command, _text)


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
    table: Annotated[Path | None, typer.Option(help="A CSV, Parquet or JSON-lines table instead of a run.")] = None,
    minimize: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the table to minimise.")] = None,
    maximize: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the table to maximise.")] = None,
    solutions: Annotated[int, typer.Option(help="How many solutions, for a table.")] = 1,
    min_different: Annotated[int, typer.Option(help="Layers in which each must differ from every earlier one.")] = 1,
    gap: Annotated[
        float | None, typer.Option(help="Relative optimality gap at which to stop. Default: the recipe's; 1e-4.")
    ] = None,
    time_limit_seconds: Annotated[
        float | None, typer.Option(help="Longest time for one solve. Default: the recipe's; 60.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    again: Again = False,
) -> None:
    """The best architecture within limits, for a run or for any table.

    Limits given here leave the run's own child alone: the result goes to RUN/search/LIMITS/architecture.json.
    """
    from puzzle_nas.errors import RecipeError

    if (table is None) == (run_dir is None):
        raise RecipeError("Name either a run folder or a table with --table.")
    if table is not None:
        gap, seconds = 1e-4 if gap is None else gap, 60.0 if time_limit_seconds is None else time_limit_seconds
        _search_table(table, limit or [], minimize, maximize, solutions, min_different, gap, seconds, as_json)
        return
    assert run_dir is not None
    if minimize or maximize or solutions != 1 or min_different != 1:
        raise RecipeError("--minimize, --maximize, --solutions and --min-different are for a table; add --table FILE.")
    if not limit:
        if as_json or gap is not None or time_limit_seconds is not None:
            raise RecipeError(
                "--json, --gap and --time-limit-seconds need --limit; without, the run's own search follows its recipe."
            )
        _run_stage("search", run_dir, [], again)
        return
    from puzzle_nas import pipeline
    from puzzle_nas.architecture_search import ArchitectureSearch
    from puzzle_nas.artifacts import RunFolder, write_json
    from puzzle_nas.stages.search_architecture import search

    limits = dict(_named_number(text) for text in limit)
    run = RunFolder(run_dir)
    recipe = pipeline.open_run(run)
    gap = recipe.search.gap if gap is None else gap
    seconds = recipe.search.time_limit_seconds if time_limit_seconds is None else time_limit_seconds
    result = search(ArchitectureSearch.at_best_batch_sizes(recipe, run, limits), limits, gap, seconds)
    path = run.architecture(",".join(f"{name}={value:g}" for name, value in limits.items()))
    write_json(path, result)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for row in result["architecture"]:
        print(f"{row['layer']:3d}  {_spec_id(row['attention']):18s} {_spec_id(row['ffn'])}")
    print(f"{'':16s} score sum  predicted speed-up")
    for name, found in {"child": result, **result["baselines"]}.items():
        if "infeasible" in found:
            print(f"{name:16s} {found['infeasible']}")
        else:
            print(f"{name:16s} {found['score_sum']:9.4f}  {found['speedup_predicted']:.3f}x")
    print(f"Written to {path}. Make that child with: puzzle run RECIPE search.limits=... --run-dir {run}")


def _spec_id(data: dict[str, Any]) -> str:
    from puzzle_nas.architecture import spec_from_dict

    return spec_from_dict(data).id


def _named_number(text: str) -> tuple[str, float]:
    from puzzle_nas.errors import RecipeError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise RecipeError(f"'{text}' is not a limit; write NAME=NUMBER, such as speedup=1.5.") from None


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
            help="Default: speed-ups from 1.05 to the largest that can be reached. The recipe's other limits hold.",
        ),
    ] = None,
) -> None:
    """The best child and the baselines over a range of limits: RUN/search/frontier.json, and .html to look at."""
    from puzzle_nas import pipeline
    from puzzle_nas.architecture_search import ArchitectureSearch
    from puzzle_nas.artifacts import RunFolder, read_json, write_bytes, write_json
    from puzzle_nas.frontier import LimitRange, solve_frontier
    from puzzle_nas.progress import console
    from puzzle_nas.report.page import render_frontier
    from puzzle_nas.report.tables import show_frontier

    run = RunFolder(run_dir)
    recipe = pipeline.open_run(run)
    asked = LimitRange.parse(limit_range) if limit_range else None
    frontier = solve_frontier(recipe, ArchitectureSearch.load(recipe, run), asked)
    write_json(run.frontier, frontier)
    picture = run.frontier.with_suffix(".html")
    write_bytes(picture, render_frontier(frontier, read_json(run.parent)["source"]).encode())
    console.print(show_frontier(frontier))
    print(f"Written to {run.frontier}; the picture is {picture}.")


def _print_summary(run_dir: Path, as_json: bool = False) -> None:
    from puzzle_nas.artifacts import RunFolder, read_json
    from puzzle_nas.progress import console
    from puzzle_nas.report.tables import show

    summary = read_json(RunFolder(run_dir).summary, "report")
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        console.print(show(summary))


@app.command("recipe")
def recipe_command() -> None:
    """Print every setting of a recipe with its default and meaning."""
    from puzzle_nas.recipe import explained_settings

    print(explained_settings())


@app.command("show")
def show_command(
    run_dir: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="Print summary.json.")] = False
) -> None:
    """The child layer by layer, and the summary table."""
    _print_summary(run_dir, as_json)


@app.command("generate")
def generate_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint, or a run folder for its child.")],
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the text; no chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Let a parent or child answer."""
    from puzzle_nas.families.generation import generate

    checkpoint = model / "child-gkd" if (model / "recipe.yaml").is_file() else model
    for piece in generate(checkpoint, prompt, max_new_tokens, not plain, temperature):
        print(piece, end="", flush=True)
    print()


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(metavar="RUN|CHILD", help="A run folder for its child, or a checkpoint.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="transformers, decilm, vllm or gguf.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's own.")
    ] = None,
    quantise: Annotated[
        str | None, typer.Option("--quantize", metavar="TYPE", help="For gguf: q8_0, q6_k, q5_k_m, q4_k_m or q4_0.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the export gets its folder. Default: RUN/exports.")] = None,
) -> None:
    """What an engine serves, checked against the child with that engine."""
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.stages.export_child import export_child

    is_run = (model / "recipe.yaml").is_file()
    if out is None and not is_run:
        raise RecipeError(f"{model} is no run folder; say where the export of a checkpoint goes with --out FOLDER.")
    folder = export_child(model / "child-gkd" if is_run else model, to, dtype, quantise, out or model / "exports")
    print(f"Exported to {folder}")


engine_app = typer.Typer(help="Serving engines, each in an environment of its own.", no_args_is_help=True)
app.add_typer(engine_app, name="engine", rich_help_panel=None)


@engine_app.command("install")
def engine_install_command(
    name: Annotated[str, typer.Argument(metavar="ENGINE", help="llama.cpp or vllm.")],
) -> None:
    """Install a serving engine; nothing to do where it is installed already."""
    from puzzle_nas.engines import serving_engine

    print(f"Installing {name}; this can take ten minutes.", flush=True)
    print(f"{name} is installed in {serving_engine(name).install()}")


@app.command("bench")
def bench_command(
    parent: Annotated[Path, typer.Argument(metavar="PARENT", help="An export of the parent.")],
    child: Annotated[Path, typer.Argument(metavar="CHILD", help="An export of the child.")],
    engine: Annotated[str, typer.Option(help="llama.cpp, vllm or transformers.")],
    scenarios: Annotated[str, typer.Option(help="table3, or PROMPT/OUTPUT lengths such as 128/64,512/32.")] = "table3",
    scale: Annotated[int, typer.Option(min=1, help="Divide the lengths by this.")] = 8,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to choose the best from.")] = "1,4,16",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats, of which the median counts.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one for each core.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Time a parent and a child on the engine that serves them."""
    from puzzle_nas.artifacts import write_json
    from puzzle_nas.engines import serving_engine
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.stages.bench_child import bench, scenario_lengths

    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise RecipeError(f"'{batch_sizes}' are no batch sizes; write numbers with commas, such as 1,4,16.") from None
    lengths = scenario_lengths(scenarios, scale)
    result = bench(serving_engine(engine), {"parent": parent, "child": child}, lengths, sizes, repeats, threads)
    print(f"{'prompt/output':>14s} {'batch':>9s} {'parent':>10s} {'child':>10s}  speed-up  (tokens per second)")
    for name, row in result["scenarios"].items():
        before, after = row["parent"], row["child"]
        sizes_text = f"{before['batch_size']}, {after['batch_size']}"
        rates = f"{before['tokens_per_second']:10.1f} {after['tokens_per_second']:10.1f}"
        print(f"{name:>14s} {sizes_text:>9s} {rates}  {row['speedup']:.3f}x")
    if out is not None:
        write_json(out, result)


@app.command("serve")
def serve_command(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export folder, such as RUN/exports/gguf-q8_0.")],
    engine: Annotated[str, typer.Option(help="llama.cpp or vllm.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on loopback.")] = 8000,
) -> None:
    """Start the engine's own OpenAI-compatible server; Ctrl-C ends it."""
    from puzzle_nas.engines import serving_engine
    from puzzle_nas.engines.server import served

    chosen = serving_engine(engine)
    chosen.precision_of(export)
    with served(chosen, export, port) as server:
        print(f"{engine} is ready. Try:\n{server.curl}", flush=True)
        server.process.wait()


def main() -> None:
    """Entry point: users' mistakes become one sentence and exit code 2."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    parallel: Any = None
    try:
        _set_environment()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from puzzle_nas.training import parallel

            parallel.join()
        if app(standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    except PuzzleError as error:
        print(f"puzzle: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("\nStopped. What is done is kept; the same command goes on from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            print(f"puzzle: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        if parallel is not None and parallel.is_lost_peer(error):
            sys.exit(parallel.PEER_LOST)
        raise


def _set_environment() -> None:
    """Before torch is imported: no chatter, and OpenMP threads that wait without spinning for long.

    GNU OpenMP's default spins so long at every barrier that one other busy process makes small products ten times
    slower; with this count an idle machine loses nothing.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
