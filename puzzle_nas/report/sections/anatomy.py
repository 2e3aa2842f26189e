"""The child's anatomy: what stands in each layer."""

from __future__ import annotations

from itertools import groupby

from puzzle_nas.report.facts import Facts
from puzzle_nas.report.figures.common import slot_name
from puzzle_nas.report.figures.layers import Bar, child_figure
from puzzle_nas.report.layout import figure, listed, paragraph, table


def anatomy(facts: Facts) -> str:
    """Runtime of every sub-block relative to the parent's, and a table of the layers."""
    layers = facts.summary["architecture"]
    if facts.child is not None and facts.parent is not None:
        bars = [
            Bar(
                layer,
                spec,
                spec.plain == facts.parent.layers[layer][slot],
                layers[layer]["slots"][slot]["percent_of_parent"],
            )
            for layer, slot, spec in facts.child
        ]
        caption = (
            "Predicted runtime of each sub-block relative to the parent's own (grey, 100 %). "
            "A cross marks a sub-block that is left out; the paler, the fewer bits."
        )
        drawn = figure("child", child_figure(bars), "Runtime of each sub-block", caption)
    else:
        drawn = paragraph("The run holds no search result to draw; the table comes from the summary.")
    rows = []
    for _, group in groupby(layers, key=lambda row: {s: found["variant"] for s, found in row["slots"].items()}):
        members = list(group)
        cells: list[str] = []
        for slot in facts.slots:
            found = members[0]["slots"].get(slot)
            cells += [found["variant"], f"{found['percent_of_parent']:.0f} %"] if found else ["-", "-"]
        rows.append([listed([row["layer"] for row in members]), *cells])
    names = [slot_name(slot) for slot in facts.slots]
    columns = ("layers", *(column for name in names for column in (name, "of parent's")))
    return drawn + table(columns, rows, text=tuple(names))
