"""A summary as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BAR = 24


def show(summary: dict[str, Any]) -> RenderableType:
    """The child layer by layer, then the summary table, then where time went."""
    return Group(_layers(summary), Text(), _models(summary), Text(), _footer(summary))


def _layers(summary: dict[str, Any]) -> Table:
    full = summary["parent_share_of_runtime"]
    table = Table(title="The child, layer by layer (share of the parent's runtime)", title_justify="left", box=None)
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


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _models(summary: dict[str, Any]) -> Table:
    table = Table(title="Validation split, against the parent", title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in ("KL nats", "perplexity", "top-1 agrees", "parameters", "memory", "predicted", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    parent, child = summary["parent"], summary["child"]

    def row(name, kl, perplexity, agreement, owner, predicted, measured=None):
        memory, parameters = owner.get("memory_bytes"), owner.get("parameters")
        table.add_row(
            name,
            _number(kl, ".4f"),
            _number(perplexity, ".2f"),
            "-" if agreement is None else f"{100 * agreement:.1f} %",
            "-" if parameters is None else f"{parameters / 1e6:.1f} M",
            "-" if memory is None else f"{memory / 1e6:.0f} MB",
            "-" if predicted is None else f"{predicted:.3f}x",
            "-" if measured is None else f"{measured:.3f}x",
        )

    row("parent", 0.0, parent["validation_perplexity"], 1.0, parent, 1.0, 1.0)
    row("child, assembled", child["validation_kl_nats_assembled"], None, None, child, child["speedup_predicted"])
    if child["validation_kl_nats_refitted"] is not None:
        row("child, refitted", child["validation_kl_nats_refitted"], None, None, child, child["speedup_predicted"])
    row(
        "child, distilled",
        child["validation_kl_nats_distilled"],
        child["validation_perplexity"],
        child["top1_agreement"],
        child,
        child["speedup_predicted"],
        child["speedup_measured"],
    )
    for name, found in summary["baselines"].items():
        row(
            f"{name.replace('_', '-')} (assembled)",
            found["validation_kl_nats_assembled"],
            found["validation_perplexity"],
            found["top1_agreement"],
            found,
            found["speedup_predicted"],
        )
    return table


def _footer(summary: dict[str, Any]) -> Text:
    child, prediction = summary["child"], summary["prediction"]
    low, high = child["speedup_measured_range"]
    asked = ", ".join(f"{name}={value:g}" for name, value in child["limits"].items())
    seconds = summary["seconds"]
    lines = [
        f"Asked for {asked}. Measured {child['speedup_measured']:.3f}x (repeats {low:.3f}-{high:.3f}), parent and child "
        "side by side.",
        f"Measured over predicted time: parent {prediction['parent_measured_over_predicted']:.3f}, "
        f"child {prediction['child_measured_over_predicted']:.3f}.",
        f"Time: {sum(seconds.values()):.0f} s (" + ", ".join(f"{n} {s:.0f}" for n, s in seconds.items()) + ").",
    ]
    return Text("\n".join(lines))
