"""The page of `puzzle bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_nas.report.figures.runs import bench_figure
from puzzle_nas.report.layout import document, figure, paragraph, table


def render_bench(result: Mapping[str, Any]) -> str:
    """The page of `puzzle bench`: what `stages.bench_child.bench` measured, as a picture and a table."""
    scenarios = result["scenarios"]
    rates = {
        model: [row[model]["tokens_per_second_per_device"] for row in scenarios.values()]
        for model in ("parent", "child")
    }
    drawn = bench_figure(list(scenarios), rates, [row["speedup"] for row in scenarios.values()])
    rows = [
        (
            name,
            model,
            str(facts["batch_size"]),
            f"{facts['tokens_per_second_per_device']:,.1f}",
            f"{facts['time_to_first_token_ms']:,.1f}",
            f"{facts['decode_step_ms']:,.2f}",
            "unknown" if facts["kv_cache_bytes"] is None else f"{facts['kv_cache_bytes'] / 1e6:,.1f}",
            f"{row['speedup']:.3f}x" if model == "child" else "",
        )
        for name, row in scenarios.items()
        for model, facts in ((model, row[model]) for model in rates)
    ]
    columns = ("prompt/output", "model", "batch", "tokens/s/device", "first token, ms", "decode step, ms", "KV, MB", "")
    peaks = ", ".join(
        f"{model} {_megabytes(facts['peak_bytes'])} (weights on disk {_megabytes(facts['weight_bytes'])})"
        for model, facts in result["memory"].items()
    )
    chosen = ", ".join(f"{name} {value}" for name, value in result["loading"].items() if value is not None)
    text = paragraph(
        f"Parent and child interleaved on {result['engine']}, each at its best batch size; medians. Exported in "
        f"{result['precision']['parent']} and {result['precision']['child']}; {chosen}. Load of the machine at the "
        f"start {result['load_average_1_min']:.2f}, at the end {result['load_average_1_min_after']:.2f}."
    )
    return document(
        f"Puzzle: parent and child on {result['engine']}",
        text
        + figure("bench", drawn, "Throughput")
        + table(columns, rows, text=("model",))
        + paragraph(f"Peak memory of the process: {peaks}.", "note"),
    )


def _megabytes(count: float | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:,.0f} MB"
