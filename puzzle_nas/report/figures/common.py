"""Colours, axes and style that the figures share.

Colours are mid-tones that keep their contrast on a light and on a dark page; the page colours the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go

from puzzle_nas.specs import Spec

PARENT, LINEAR, NO_OP = "#3a7cc4", "#c98a1b", "#cc4b37"
FEWER_HEADS, NARROWER = "#2a9d8f", "#6a9a2d"
SIZES = ("#3a7cc4", "#2a9d8f", "#6a9a2d", "#8a63b8", "#5f7a8c", "#b0558f")
"""Variants of one kind, in order of size."""
OUTSIDE_TEXT = 1.25
"""Length of an axis relative to its longest bar, so that there is room for the text beside it."""
GHOST = "rgba(128,128,128,0.18)"
WINDOW = "#8a63b8"
KIND_COLOURS = {"grouped": FEWER_HEADS, "window": WINDOW, "gated": NARROWER, "linear": LINEAR, "no_op": NO_OP}
KIND_LABELS = {
    "grouped": "fewer KV heads",
    "window": "window",
    "gated": "narrower",
    "linear": "linear",
    "no_op": "left out",
}

_SLOT_NAMES = {"ffn": "FFN"}

Values = Sequence[float | None]


def slot_name(slot: str) -> str:
    """A slot as people call it."""
    return _SLOT_NAMES.get(slot, slot.replace("_", " "))


def variant_colours(specs: Iterable[Spec]) -> dict[str, str]:
    """A colour for each variant id of one slot, given in order of size."""
    colours: dict[str, str] = {}
    sizes = 0
    for spec in specs:
        if spec.kind in ("linear", "no_op"):
            colours[spec.id] = KIND_COLOURS[spec.kind]
        else:
            colours[spec.id] = SIZES[sizes % len(SIZES)]
            sizes += 1
    return colours


def log_axis(values: Iterable[float | None]) -> dict:
    """Range and ticks of a log axis around the positive values: 1, 2, 5 if they fit, else powers of ten; on a
    short axis three values in equal ratios."""
    positive = [value for value in values if value is not None and value > 0]
    low, high = math.log10(min(positive, default=1.0)), math.log10(max(positive, default=1.0))
    pad = max(0.08, 0.05 * (high - low))
    low, high = low - pad, high + pad
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.2 else (1,)
    step = max(1, round((high - low) / 6)) if factors == (1,) else 1
    ticks = [factor * 10.0**decade for decade in decades if decade % step == 0 for factor in factors]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    if len(ticks) < 3:
        ticks = [float(f"{10 ** (low + (high - low) * quarter / 4):.2g}") for quarter in (1, 2, 3)]
    return {
        "type": "log",
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [f"{tick:.3g}" for tick in ticks],
    }


def layer_axis(figure: go.Figure, layers: int) -> None:
    """Layers from left to right, not too many ticks."""
    step = next((step for step in (1, 2, 5, 10) if layers <= 12 * step), 20)
    figure.update_xaxes(title_text="layer", tick0=0, dtick=step, range=[-0.6, layers - 0.4])


def styled(figure: go.Figure, height: int) -> go.Figure:
    """The look of every figure; `height` in pixels."""
    axis = {
        "automargin": True,
        "fixedrange": True,
        "zeroline": False,
        "gridcolor": "rgba(128,128,128,0.25)",
        "title_standoff": 8,
        "exponentformat": "power",
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        dragmode=False,
    )
