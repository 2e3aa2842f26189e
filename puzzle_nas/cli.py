"""The command `puzzle`: parse arguments, call the pipeline, print results and errors; nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import redirect_stdout
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
"""Exit code after Ctrl-C, by convention; typer returns exit codes instead of raising."""

STOPPED = "\nStopped. What is done is kept; the same command goes on from here."

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
    pipeline.open_run(run)
    with pipeline.held(run):
        recipe = parse_recipe(run.recipe.read_text(), overrides, str(run.recipe))
        if overrides:
            pipeline.claim_run(recipe, run)
        pipeline.run_stage(pipeline.stage_named(command), recipe, run, again)


for _command, _text in (
    ("prepare-parent", "Find the parent; convert it to a transformers checkpoint where it is none."),
    ("prepare-data", "Text to packed token blocks of the five splits."),
    ("measure-costs", "Memory and runtime of every variant on this machine."),
    ("build-library", "Every variant of every layer, initialised from the parent."),
    ("distill-blocks", "Train every variant to imitate its parent block (BLD)."),
    ("score-blocks", "Damage of every variant when it alone replaces its parent block."),
    ("couple-blocks", "Train and score what a first search uses in pairs of attention and FFN (coupled BLD)."),
    ("assemble", "The chosen variants as one checkpoint."),
    ("refit", "Correct the assembled child in closed form."),
    ("distill-child", "Train the whole child against the parent (GKD)."),
    ("evaluate-child", "Child against parent: quality and measured speed."),
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
    from puzzle_nas.report.frontier_page import render_frontier
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


@app.command("verify")
def verify_command(
    run_dir: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Check every artifact against its recorded hash, and every stage against what it was made from.

    Exit code 2 where something is missing, changed or stale; stages that have not finished are no fault.
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
    _print_summary(run_dir, as_json)


@app.command("compare")
def compare_command(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, two or more.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print every summary, and what forbids comparing.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page to look at as well.")] = None,
) -> None:
    """Several finished runs side by side."""
    from puzzle_nas.artifacts import RunFolder, write_bytes
    from puzzle_nas.progress import console
    from puzzle_nas.report.comparison import comparison_json, load_runs, render_comparison, show_comparison

    runs = load_runs([RunFolder(path) for path in run_dirs])
    if html is not None:
        write_bytes(html, render_comparison(runs).encode())
    if as_json:
        print(json.dumps(comparison_json(runs), indent=1))
        return
    console.print(show_comparison(runs))
    if html is not None:
        print(f"Page: {html}")


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


@app.command("evaluate")
def evaluate_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run folder, for its child against its parent, or a checkpoint.")
    ],
    parent: Annotated[Path | None, typer.Option(help="A checkpoint to compare with. Default: a run's own.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[=DOMAIN]", help="Text; repeatable. Default: the run's validation split."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of each sequence of --data.")] = 512,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each domain.")] = 16_384,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME",
            help="JSON lines with question, choices and answer, or a task of lm-eval's; repeatable.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Items of each task. Default: all.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Of task files, only the half that scoring.metric=task never sees.")
    ] = False,
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Text and questions at 512, 1024, ... tokens.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Longest length of --long-context. Default: the parent's.")
    ] = None,
    questions: Annotated[int, typer.Option(min=0, help="Questions of each kind at each length.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a model lost against its parent, with standard errors; any transformers model.

    Of a run, each part of the result is kept in RUN/evaluations as well.
    """
    from puzzle_nas.evaluation.evaluate import Asked, evaluate
    from puzzle_nas.evaluation.tables import show_evaluation
    from puzzle_nas.progress import console

    asked = Asked(
        *(tuple(data or ()), sequence_length, tokens, tuple(tasks or ()), limit, held_out),
        *(long_context, max_length, questions),
    )
    # What is printed meanwhile is not the answer.
    with redirect_stdout(sys.stderr):
        found = evaluate(model, parent, asked)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.width = max(console.width, 120)
        console.print(show_evaluation(found))


@app.command("judge")
def judge_command(
    child: Annotated[
        Path, typer.Argument(metavar="CHILD", help="A run folder, for its child against its parent, or a checkpoint.")
    ],
    questions: Annotated[Path, typer.Option(help="JSON lines with question, or a text file with one in each line.")],
    parent: Annotated[Path | None, typer.Option(help="A checkpoint. Default: a run's own.")] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The judge's model at that endpoint.")] = None,
    person: Annotated[bool, typer.Option("--person", help="You judge, here in the terminal.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    out: Annotated[
        Path | None,
        typer.Option(help="Where answers and votes are kept, to go on later. Default: RUN/evaluations/judged.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Blind ballots between the answers of child and parent, each pair in both orders.

    The questions and answers are sent to the endpoint that you name. If OPENAI_API_KEY is set, it is sent along.
    """
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.evaluation.judge import Endpoint, Person, judge_child, show_judgement

    if person == (judge is not None) or (judge is None) != (model is None):
        raise RecipeError("Say who judges: --judge URL --model NAME, or --person.")
    who = Person() if judge is None or model is None else Endpoint(judge, model)
    with redirect_stdout(sys.stderr):
        found = judge_child(child, parent, questions, who, max_new_tokens, out)
    print(json.dumps(found, indent=1) if as_json else show_judgement(found))


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
    dtype: Annotated[
        str | None, typer.Option(help="Convert the weights when loading (vllm, transformers). Default: as exported.")
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Type of the KV cache, by the engine's name. Default: the engine's.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share every layer (vllm).")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the figures as JSON, and a picture of them beside it.")
    ] = None,
) -> None:
    """Time a parent and a child on the engine that serves them."""
    from puzzle_nas.artifacts import write_bytes, write_json
    from puzzle_nas.engines import Loading, serving_engine
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.report.bench_page import render_bench
    from puzzle_nas.stages.bench_child import bench, scenario_lengths

    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise RecipeError(f"'{batch_sizes}' are no batch sizes; write numbers with commas, such as 1,4,16.") from None
    lengths = scenario_lengths(scenarios, scale)
    exports, loading = {"parent": parent, "child": child}, Loading(dtype, kv_dtype, tensor_parallel)
    result = bench(serving_engine(engine), exports, lengths, sizes, repeats, threads, loading)
    unit = "(tokens per second and device)"
    print(f"{'prompt/output':>14s} {'batch':>9s} {'parent':>10s} {'child':>10s}  speed-up  {unit}")
    for name, row in result["scenarios"].items():
        before, after = row["parent"], row["child"]
        sizes_text = f"{before['batch_size']}, {after['batch_size']}"
        rates = " ".join(f"{facts['tokens_per_second_per_device']:10.1f}" for facts in (before, after))
        print(f"{name:>14s} {sizes_text:>9s} {rates}  {row['speedup']:.3f}x")
    if out is not None:
        write_json(out, result)
        picture = out.with_suffix(".html")
        write_bytes(picture, render_bench(result).encode())
        print(f"Written to {out}; the picture is {picture}.")


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
        _catch_interrupts()
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except PuzzleError as error:
        print(f"puzzle: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(STOPPED, file=sys.stderr)
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


def _catch_interrupts() -> None:
    """The first Ctrl-C stops in good order; a second, while that goes on, at once: nothing is lost by either."""

    def stop_at_once(*_: object) -> None:
        os.write(2, f"{STOPPED}\n".encode())
        os._exit(INTERRUPTED)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, stop_at_once)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


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
