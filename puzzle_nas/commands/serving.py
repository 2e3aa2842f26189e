"""Commands that export, time and serve a child with serving engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puzzle_nas.commands.app import app, show_help_alone


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(metavar="RUN|CHILD", help="A run folder (its child) or a checkpoint.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="transformers, decilm, vllm or gguf.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: 16 bits; for transformers the checkpoint's own."),
    ] = None,
    quantise: Annotated[
        str | None, typer.Option("--quantize", metavar="TYPE", help="For gguf: q8_0, q6_k, q5_k_m, q4_k_m or q4_0.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the export gets its folder. Default: RUN/exports.")] = None,
) -> None:
    """Write the child for an engine, and check with that engine that it computes the child."""
    from puzzle_nas.artifacts import RunFolder
    from puzzle_nas.errors import RecipeError
    from puzzle_nas.pipeline import open_run
    from puzzle_nas.stages.export_child import export_child

    is_run = (model / "recipe.yaml").is_file()
    if out is None and not is_run:
        raise RecipeError(f"{model} is not a run folder; say where the export of a checkpoint goes with --out FOLDER.")
    kv_format = open_run(RunFolder(model)).kv_format if is_run else None
    checkpoint = model / "child-gkd" if is_run else model
    folder = export_child(checkpoint, to, dtype, quantise, out or model / "exports", kv_format)
    print(f"Exported to {folder}")


engine_app = typer.Typer(help="Serving engines, each in an environment of its own.", invoke_without_command=True)
engine_app.callback()(show_help_alone)
app.add_typer(engine_app, name="engine", rich_help_panel=None)


@engine_app.command("install")
def engine_install_command(
    name: Annotated[str, typer.Argument(metavar="ENGINE", help="llama.cpp or vllm.")],
) -> None:
    """Install a serving engine, unless it is installed already."""
    from puzzle_nas.engines import serving_engine

    print(f"Installing {name}, unless it is installed already; that can take ten minutes.", flush=True)
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
    kv_format: Annotated[
        str | None,
        typer.Option(help="Of the KV cache, by the engine's name. Default: the export's, or the engine's."),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share every layer (vllm).")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the figures as JSON, with a picture of them (.html).")
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
        raise RecipeError(f"'{batch_sizes}' are not batch sizes; write numbers with commas, such as 1,4,16.") from None
    lengths = scenario_lengths(scenarios, scale)
    exports, loading = {"parent": parent, "child": child}, Loading(dtype, kv_format, tensor_parallel)
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
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the longest request, answer included. Default: the model's own."),
    ] = None,
) -> None:
    """Start the engine's own OpenAI-compatible server; Ctrl-C ends it."""
    from puzzle_nas.engines import serving_engine
    from puzzle_nas.engines.server import served

    chosen = serving_engine(engine)
    chosen.precision_of(export)
    with served(chosen, export, port, context) as server:
        print(f"{engine} is ready. Try:\n{server.curl}", flush=True)
        server.process.wait()
