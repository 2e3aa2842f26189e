"""A summary as tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def show(summary: dict[str, Any]) -> RenderableType:
    """The child layer by layer, then the summary table, then where time went."""
    return Group(_layers(summary), Text(), _models(summary), Text(), _footer(summary))


def _layers(summary: dict[str, Any]) -> Table:
    full = summary["parent_share_of_runtime"]
    title = "The child, layer by layer (share of the parent's runtime)"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("layer", "attention", "", "", "ffn", "", ""):
        table.add_column(name, justify="right" if name == "layer" else "left", no_wrap=True)
    for row in summary["architecture"]:
        cells = [str(row["layer"])]
        for slot in ("attention", "ffn"):
            share = row[f"{slot}_share_of_parent_runtime"]
            filled = round(10 * share / full[slot]) if full[slot] else 0
            cells += [row[slot], f"{100 * share:4.2f} %", "█" * filled + "·" * (10 - min(10, filled))]
        table.add_row(*cells)
    return table


def _number(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    return "-" if value is None else format(scale * value, form) + unit


MODEL_COLUMNS = ("model", "KL nats", "ppl", "top-1", "params", "memory", "pred.", "measured")


def model_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The summary table, one row of cells for each model; `-` where nothing was measured."""
    parent, child = summary["parent"], summary["child"]

    def row(name, kl, perplexity, agreement, owner, predicted, measured=None) -> tuple[str, ...]:
        return (
            name,
            _number(kl, ".4f"),
            _number(perplexity, ".2f" if perplexity is None or perplexity < 1000 else ".0f"),
            _number(agreement, ".1f", 100, " %"),
            _number(owner.get("parameters"), ".1f", 1e-6, " M"),
            _number(owner.get("memory_bytes"), ".0f", 1e-6, " MB"),
            _number(predicted, ".3f", unit="x"),
            _number(measured, ".3f", unit="x"),
        )

    predicted = child["speedup_predicted"]
    rows = [
        row("parent", 0.0, parent["validation_perplexity"], 1.0, parent, 1.0, 1.0),
        row("child, assembled", child["validation_kl_nats_assembled"], None, None, child, predicted),
    ]
    refitted = child["validation_kl_nats_refitted"]
    if refitted is not None:
        rows.append(row("child, refitted", refitted, None, None, child, predicted))
    rows.append(
        row(
            "child, distilled",
            child["validation_kl_nats_distilled"],
            child["validation_perplexity"],
            child["top1_agreement"],
            child,
            predicted,
            child["speedup_measured"],
        )
    )
    return rows + [
        row(
            name.replace("_", "-"),
            found["validation_kl_nats_assembled"],
            found["validation_perplexity"],
            found["top1_agreement"],
            found,
            found["speedup_predicted"],
        )
        for name, found in summary["baselines"].items()
    ]


def _models(summary: dict[str, Any]) -> Table:
    title = "Validation split, against the parent (baselines are assembled, not distilled)"
    table = Table(title=title, title_justify="left", box=None)
    for name in MODEL_COLUMNS:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for cells in model_rows(summary):
        table.add_row(*cells)
    return table


RELIABLE = 0.02
"""Standard error of a measured speed-up, over it, up to which it is believed."""


def speed_note(summary: dict[str, Any]) -> str:
    """What was asked for and what was measured."""
    child = summary["child"]
    error, repeats = child["speedup_measured_standard_error"], child["speedup_measured_repeats"]
    asked = ", ".join(f"{name}={value:g}" for name, value in child["limits"].items())
    note = (
        f"Asked for {asked}. Measured {child['speedup_measured']:.3f}x +- {error:.3f} ({repeats} repeats), "
        f"parent and child side by side on {summary['engine']}."
    )
    if error > RELIABLE * child["speedup_measured"]:
        note += (
            " The repeats differ so much that the machine must have had other work: do not rely on this speed-up, and "
            "measure it again when the machine is idle (puzzle evaluate-child RUN --again)."
        )
    return note


def prediction_note(summary: dict[str, Any]) -> str:
    """How far measured times are from predicted ones."""
    prediction = summary["prediction"]
    return (
        f"Measured over predicted time: parent {prediction['parent_measured_over_predicted']:.3f}, "
        f"child {prediction['child_measured_over_predicted']:.3f}."
    )


def _footer(summary: dict[str, Any]) -> Text:
    seconds = summary["seconds"]
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    time = f"Time: {sum(seconds.values()):.0f} s ({stages})."
    notes = [speed_note(summary), prediction_note(summary), search_note(summary), time]
    return Text("\n".join(note for note in notes if note))


def search_note(summary: dict[str, Any]) -> str:
    """Among how many measured children the child was chosen; empty where none were measured."""
    tried = [row["selection_kl_nats"] for row in summary["search"]["children_measured"]]
    if not tried:
        return ""
    refitted = ", refitted" if summary["refit"]["tried"] else ""
    return (
        f"Search: chosen among {len(tried)} children, assembled{refitted} and measured (KL on the selection split "
        f"{min(tried):.3f}-{max(tried):.3f})."
    )


def frontier_rows(frontier: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a frontier: a limit, then the summed score of every model, `-` where there is none."""
    models = list(dict.fromkeys(row["model"] for row in frontier["rows"]))
    rows = []
    for value in frontier["values"]:
        at = [row for row in frontier["rows"] if row["limit"] == value]
        sums = {m: [row["score_sum"] for row in at if row["model"] == m and "score_sum" in row] for m in models}
        rows.append([f"{value:.4g}", *(f"{statistics.median(s):.4f}" if s else "-" for s in sums.values())])
    return [frontier["limit"], *(model.replace("_", "-") for model in models)], rows


def show_frontier(frontier: Mapping[str, Any]) -> Table:
    """A frontier for the terminal."""
    columns, rows = frontier_rows(frontier)
    title = "Summed score at each limit (random: the median of several)"
    table = Table(title=title, title_justify="left", box=None)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table
