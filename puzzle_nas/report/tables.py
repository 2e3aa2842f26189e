"""A summary as tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from puzzle_nas.report.terminal import FigureTable


def show(summary: dict[str, Any]) -> RenderableType:
    """The child layer by layer, then the summary table, then where time went."""
    return Group(_layers(summary), Text(), _models(summary), Text(), _footer(summary))


def _layers(summary: dict[str, Any]) -> FigureTable:
    slots = list(dict.fromkeys(slot for row in summary["architecture"] for slot in row["slots"]))
    title = "The child, layer by layer (share of the parent's runtime)"
    rows = []
    for row in summary["architecture"]:
        cells = [f"{row['layer']:5d}"]
        for slot in slots:
            if (found := row["slots"].get(slot)) is None:
                cells += [""] * 3
                continue
            filled, share = round(found["percent_of_parent"] / 10), found["share_of_parent_runtime"]
            cells += [found["variant"], f"{100 * share:4.2f} %", "█" * filled + "·" * (10 - min(10, filled))]
        rows.append(cells)
    columns = ("layer", *(column for slot in slots for column in (slot, "", "")))
    units = tuple((3 * place + 1, 3 * place + 2, 3 * place + 3) for place in range(len(slots)))
    return FigureTable(title, columns, rows, units=units)


def number(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    """A figure as text; `-` where there is none."""
    return "-" if value is None else format(scale * value, form) + unit


def megabytes(count: float | None) -> str:
    """Bytes as text, with digits that tell small models apart; `-` where there is none."""
    return number(count, ".0f" if count is None or count >= 1e7 else ".1f", 1e-6, " MB")


def model_name(name: str) -> str:
    """A baseline as people read it: `max-params`, `parent@q8_0`."""
    return name if "@" in name else name.replace("_", "-")


MODEL_COLUMNS = ("model", "KL nats", "ppl", "top-1", "params", "memory", "pred.", "measured")


def model_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The summary table, one row of cells for each model; `-` where nothing was measured."""
    parent, child = summary["parent"], summary["child"]

    def row(name, kl, perplexity, agreement, owner, predicted, measured=None) -> tuple[str, ...]:
        return (
            name,
            number(kl, ".4f"),
            number(perplexity, ".2f" if perplexity is None or perplexity < 1000 else ".0f"),
            number(agreement, ".1f", 100, " %"),
            number(owner.get("parameters"), ".1f", 1e-6, " M"),
            megabytes(owner.get("memory_bytes")),
            number(predicted, ".3f", unit="x"),
            number(measured, ".3f", unit="x"),
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
            model_name(name),
            found["validation_kl_nats_assembled"],
            found["validation_perplexity"],
            found["top1_agreement"],
            found,
            found["speedup_predicted"],
            found["speedup_measured"],
        )
        for name, found in summary["baselines"].items()
    ]


def _models(summary: dict[str, Any]) -> FigureTable:
    title = "Validation split, against the parent (baselines are assembled, not distilled)"
    return FigureTable(title, MODEL_COLUMNS, model_rows(summary))


RELIABLE = 0.02
"""Standard error of a measured speed-up, over it, up to which it is believed."""


QUIET_PERCENT = 10.0
"""Load by others, over all processors, up to which a measured speed-up is believed."""


def speed_note(summary: Mapping[str, Any]) -> str:
    """What was asked for and what was measured."""
    child = summary["child"]
    error, repeats = child["speedup_measured_standard_error"], child["speedup_measured_repeats"]
    asked = ", ".join(f"{name}={value:g}" for name, value in child["limits"].items())
    note = (
        f"Asked for {asked}. Measured {child['speedup_measured']:.3f}x +- {error:.3f} ({repeats} repeats), "
        f"parent and child side by side on {summary['engine']}"
    )
    note += f", whose KV cache is in {kv_format}." if (kv_format := summary["kv_format"]) else "."
    if child["speedup_measured"] + 2 * error < child["limits"].get("speedup", 0):
        note += " That is less than asked."
    load = child["other_load_percent"]
    doubts = []
    if load > QUIET_PERCENT:
        doubts.append(f"other work kept {load:.0f} % of the machine busy meanwhile")
    if error > RELIABLE * child["speedup_measured"]:
        doubts.append("the repeats differ much")
    if doubts:
        note += (
            f" Do not rely on this speed-up: {' and '.join(doubts)}. Measure it again when the machine is idle: "
            "puzzle evaluate-child RUN --again, then puzzle write-report RUN."
        )
    return note


def prediction_note(summary: Mapping[str, Any]) -> str:
    """How far measured times are from predicted ones."""
    prediction = summary["prediction"]
    return (
        f"Measured over predicted time: parent {prediction['parent_measured_over_predicted']:.3f}, "
        f"child {prediction['child_measured_over_predicted']:.3f}."
    )


def beaten_note(summary: Mapping[str, Any]) -> str:
    """Which parent in a format is both faster and nearer than the child; empty where none is."""
    child = summary["child"]
    speed, kl = child["speedup_measured"], child["validation_kl_nats_distilled"]
    better = [
        f"{name} ({found['speedup_measured']:.2f}x, KL {found['validation_kl_nats_assembled']:.4f})"
        for name, found in summary["baselines"].items()
        if (found["speedup_measured"] or 0.0) >= speed and found["validation_kl_nats_assembled"] <= kl
    ]
    if not better:
        return ""
    return f"Do not use this child: faster and nearer to the parent is {', '.join(better)}. Ask for more speed."


def _footer(summary: dict[str, Any]) -> Text:
    seconds = summary["seconds"]
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    time = f"Time: {sum(seconds.values()):.0f} s ({stages})."
    notes = [
        *(beaten_note(summary), speed_note(summary), prediction_note(summary)),
        *(rounding_note(summary), search_note(summary), time),
    ]
    return Text("\n".join(note for note in notes if note))


def rounding_note(summary: Mapping[str, Any]) -> str:
    """What the precision of these figures can tell apart; empty in float32."""
    of_rounding = summary["parent"].get("validation_kl_nats_of_rounding")
    if of_rounding is None:
        return ""
    return f"KL has {of_rounding:.4f} nats of rounding in it: so far is the parent from itself, rounded otherwise."


def search_note(summary: Mapping[str, Any]) -> str:
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
    return [frontier["limit"], *map(model_name, models)], rows


def show_frontier(frontier: Mapping[str, Any]) -> FigureTable:
    """A frontier for the terminal."""
    return FigureTable("Summed score at each limit (random: the median of several)", *frontier_rows(frontier))


DRAFT_COLUMNS = ("cost ratio", "KL nats", "accepted", "drafts", "tokens", "requests", "answers from", "memory")


def show_drafts(found: Mapping[str, Any]) -> FigureTable:
    """What `puzzle search --for draft` found, for the terminal."""
    rows = [
        (
            f"{row['cost_ratio']:.3f}",
            f"{row['kl_nats_predicted']:.4f}",
            f"{100 * row['acceptance_predicted']:.1f} +- {100 * row['acceptance_error']:.1f} %",
            f"{row['drafts']}",
            f"{row['speedup_predicted']:.3f}x",
            f"{row['request_speedup_predicted']:.3f}x",
            number(row["answers_from"], ".1f", unit="x"),
            megabytes(row["memory_bytes"]),
        )
        for row in found["rows"]
    ]
    return FigureTable("Children as drafts for their parent (all predicted, greedy decoding)", DRAFT_COLUMNS, rows)


def draft_note(found: Mapping[str, Any]) -> str:
    """Whether any draft pays; if none does, what one would have to cost."""
    best = found["best"]
    draft = f"cost ratio {best['cost_ratio']:.3f}, {100 * best['acceptance_predicted']:.1f} % accepted"
    drafts = f"{best['drafts']} draft{'s' if best['drafts'] > 1 else ''} a pass"
    requests, tokens = f"{best['request_speedup_predicted']:.3f}x", f"{best['speedup_predicted']:.3f}x"
    if found["pays"]:
        return f"A draft pays: requests {requests} as fast, tokens {tokens}, with {drafts} ({draft})."
    limit = best["break_even_cost_ratio"]
    cheaper = f"below a cost ratio of {limit:.3f}" if limit > 0 else "at no cost ratio, however low"
    longer = "" if (times := best["answers_from"]) is None else f", or for answers {times:.1f} times as long"
    return (
        f"No draft pays for this run's requests: the best ({draft}) makes them {requests} as fast, tokens {tokens}, "
        f"with {drafts}. Accepted as often, one pays {cheaper}{longer}."
    )
