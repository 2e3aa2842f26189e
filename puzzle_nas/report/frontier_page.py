"""The page of `puzzle frontier`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_nas.report.figures.tradeoffs import FrontierLine, search_frontier_figure
from puzzle_nas.report.layout import document, figure, paragraph, table
from puzzle_nas.report.sections.losses import UNITS
from puzzle_nas.report.tables import frontier_rows

FRONTIER_MODELS = {
    "child": ("child", "the best summed score within the limits"),
    "greedy": ("greedy", "layer by layer, each within its share of the limits"),
    "homogeneous": ("homogeneous", "one choice for all layers, mixed to the child's predicted runtime"),
    "max_params": ("max-params", "the most parameters within the limits"),
    "no_op_only": ("no-op only", "the best of only the parent's sub-blocks and no-ops"),
    "random": (
        "random",
        "drawn from the library within the limits, at most 1 % faster than the child, several at each limit",
    ),
}
"""By name in the table: label, and what it is."""


def render_frontier(frontier: Mapping[str, Any], parent: str) -> str:
    """What `puzzle_nas.choosing.frontier` solved, as a picture and a table."""
    column, axis = {
        "memory_bytes": ("memory_bytes", "memory of parameters, KV cache and working space, bytes"),
        "parameters": ("parameters", "parameters"),
    }.get(frontier["limit"], ("speedup_predicted", "predicted speed-up"))
    unit = UNITS[frontier["metric"]][1]
    lines = []
    for model, (label, _) in FRONTIER_MODELS.items():
        own = [row for row in frontier["rows"] if row["model"] == model and "infeasible" not in row]
        costs, scores = [row[column] for row in own], [row["score_sum"] for row in own]
        lines.append(FrontierLine(label, costs, scores, model == "child", model == "random"))
    held = ", ".join(f"{name} = {value:g}" for name, value in frontier["other_limits"].items())
    text = paragraph(
        f"Each point is a whole architecture: the sum of its replace-1-block scores ({unit}) against its "
        f"predicted costs. Lower is better. Nothing was assembled." + (f" Throughout, {held}." if held else "")
    )
    drawn = search_frontier_figure([line for line in lines if line.costs], axis, f"summed score: {unit}")
    columns, rows = frontier_rows(frontier)
    return document(
        f"Puzzle: the frontier of {parent}",
        text
        + figure("frontier", drawn, "Quality against cost")
        + table(columns, rows)
        + table(("model", "what it is"), FRONTIER_MODELS.values(), text=("what it is",))
        + paragraph("A dash: nothing of that kind meets the limits. For random, the median.", "note"),
    )
