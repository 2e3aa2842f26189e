"""The child's anatomy: what stands in each layer."""

from __future__ import annotations

from itertools import groupby

from puzzle_nas.architecture import SLOTS
from puzzle_nas.report.facts import Facts
from puzzle_nas.report.figures.layers import Bar, child_figure
from puzzle_nas.report.layout import figure, listed, paragraph, table


def anatomy(facts: Facts) -> str:
    """Runtime of every sub-block relative to the parent's, and a table of the layers."""
    layers = facts.summary["architecture"]
    if facts.child is not None and facts.shape is not None:
        bars = [
            Bar(layer, spec, spec == facts.shape.parent_spec(slot), facts.percent_of_parent(layers[layer], slot))
            for layer, slot, spec in facts.child
        ]
        caption = (
            "Predicted runtime of each sub-block relative to the parent's own (grey, 100 %). "
            "A cross marks a sub-block that is left out."
        )
        drawn = figure("child", child_figure(bars), "Runtime of attention and FFN in each layer", caption)
    else:
        drawn = paragraph("The run holds no search result to draw; the table comes from the summary.")
    rows = []
    for _, group in groupby(layers, key=lambda row: [row[slot] for slot in SLOTS]):
        members = list(group)
        first = members[0]
        cells = [cell for slot in SLOTS for cell in (first[slot], f"{facts.percent_of_parent(first, slot):.0f} %")]
        rows.append([listed([row["layer"] for row in members]), *cells])
    columns = ("layers", "attention", "of parent's", "FFN", "of parent's")
    return drawn + table(columns, rows, text=("attention", "FFN"))
