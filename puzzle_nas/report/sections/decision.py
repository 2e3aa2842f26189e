"""The decision: quality against speed, the child among what else could have been chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.frontier import SLOWEST, LimitRange, reachable_speedups, solve_frontier
from puzzle_nas.errors import PuzzleError
from puzzle_nas.report.facts import Facts
from puzzle_nas.report.figures.tradeoffs import Point, decision_figure
from puzzle_nas.report.layout import figure, folded, paragraph, table
from puzzle_nas.report.tables import MODEL_COLUMNS, beaten_note, megabytes, model_name, model_rows, number, search_note


def decision(facts: Facts) -> str:
    """Figure, its numbers, and the table of all models."""
    summary = facts.summary
    error = number(summary["child"]["validation_kl_nats_standard_error"], ".2g")
    models = table(MODEL_COLUMNS, model_rows(summary), strong="child, distilled") + paragraph(
        "KL, perplexity and agreement on the validation split; the distilled child's KL has a standard "
        f"error of {error} nats. Memory is parameters, full KV cache and working space. Baselines come from the "
        "same library and are only assembled: compare them with the assembled child.",
        "note",
    )
    return _drawn(facts) + models + _remarks(summary)


def _drawn(facts: Facts) -> str:
    points = _models(facts.summary) + _measured(facts.summary)
    if not points:
        return paragraph("No model has both a predicted speed-up and a KL above zero to draw.")
    frontier, why_not = best_at_each_limit(facts)
    rows = [
        (point.label, f"{point.speedup:.3f}x", f"{point.kl_nats:.4f}", point.note) for point in (*points, *frontier)
    ]
    caption = "Lower and further right is better. The parent stands at 1x and 0 nats, which a log axis does not have. "
    if frontier:
        caption += (
            f"Line: the best child at each limit by summed scores, nothing assembled{_held(facts)}. "
            "A child stands above it by what sums of scores do not see, and below it by what distillation wins back."
        )
    drawn = figure("decision", decision_figure(points, frontier), "Quality against speed", caption)
    numbers = table(("what", "predicted speed-up", "KL nats", "also"), rows, text=("also",))
    return drawn + (paragraph(why_not, "note") if why_not else "") + folded("The figure's numbers", numbers)


def _held(facts: Facts) -> str:
    others = [f"{name}={value:g}" for name, value in facts.recipe.search.limits.items() if name != "speedup"]
    return f"; throughout, {', '.join(others)}" if others else ""


def _models(summary: Mapping[str, Any]) -> list[Point]:
    child = summary["child"]
    found = [
        (f"child, {name}", child, child[f"validation_kl_nats_{name}"], "child")
        for name in ("assembled", "refitted", "distilled")
    ] + [
        (model_name(name), row, row["validation_kl_nats_assembled"], "baseline")
        for name, row in summary["baselines"].items()
    ]
    points = []
    for label, row, kl, group in found:
        if row["speedup_predicted"] is None or (kl or 0) <= 0:
            continue
        note = _sizes(row)
        if label == "child, distilled":
            note = f"measured {child['speedup_measured']:.3f}x, {note}"
        points.append(Point(label, row["speedup_predicted"], kl, group, f"{note}, validation split"))
    return points


def _measured(summary: Mapping[str, Any]) -> list[Point]:
    """Children that were assembled to choose one, where the run noted how fast they were predicted to be."""
    return [
        Point(
            f"child {number}, by {row['found_by']}",
            row["speedup_predicted"],
            row["selection_kl_nats"],
            "measured in the search",
            "before GKD, selection split",
            named=False,
        )
        for number, row in enumerate(summary["search"]["children_measured"], start=1)
        if "speedup_predicted" in row and row["selection_kl_nats"] > 0
    ]


def _sizes(row: Mapping[str, Any]) -> str:
    return f"{row['parameters'] / 1e6:.1f} M parameters, {megabytes(row['memory_bytes'])}"


def best_at_each_limit(facts: Facts) -> tuple[list[Point], str]:
    """The best child at speed-ups around the run's own, solved from its tables; or none, and why.

    Solved here, not read from what `puzzle frontier` left: that may be of other scores, costs or limits.
    """
    if facts.recipe.scoring.metric != "kl":
        return [], "Scores are not KL (scoring.metric), so no frontier is drawn beside it."
    if facts.tables is None:
        return [], "The run holds no scores or costs to solve other limits with."
    try:
        solved = _solved(facts, facts.tables)
    except PuzzleError as error:
        return [], f"There is no frontier to draw: {error}"
    points: dict[tuple[float, float], Point] = {}
    for row in solved["rows"]:
        if row.get("score_sum", 0) > 0:
            speedup, score = row["speedup_predicted"], row["score_sum"]
            # A slow limit asks for nothing where another one already makes the child faster.
            points.setdefault(
                (speedup, score), Point("best child", speedup, score, "child", f"sum of scores, {_sizes(row)}")
            )
    return list(points.values()), ""


def _solved(facts: Facts, tables: ArchitectureSearch) -> dict[str, Any]:
    others = {name: value for name, value in facts.recipe.search.limits.items() if name != "speedup"}
    fastest = reachable_speedups(tables, others).values[-1]
    chosen = facts.summary["child"]["speedup_predicted"]
    return solve_frontier(
        facts.recipe,
        tables,
        LimitRange.between("speedup", SLOWEST, min(fastest, max(2.0, chosen**2))),
        with_baselines=False,
    )


def _remarks(summary: Mapping[str, Any]) -> str:
    text = "".join(
        paragraph(f"The baseline {model_name(name)} is infeasible: {found['infeasible']}")
        for name, found in summary["baselines"].items()
        if found.get("infeasible")
    )
    if not summary["baselines"]:
        text += paragraph("The run holds no baselines.")
    return text + "".join(paragraph(note) for note in (beaten_note(summary), search_note(summary)) if note)
