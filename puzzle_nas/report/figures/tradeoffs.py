"""Figures of quality against cost. Every value comes from the caller; nothing is read here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from puzzle_nas.report.figures.common import FEWER_HEADS, LINEAR, NARROWER, NO_OP, PARENT, log_axis, styled

GROUPS = {
    "child": (PARENT, "circle", 11),
    "baseline": (LINEAR, "diamond", 11),
    "measured in the search": (NARROWER, "circle-open", 7),
}
"""Colour, symbol and size of each group of points."""
SOFT = "rgba(128,128,128,0.8)"


@dataclass(frozen=True)
class Point:
    """One model: its speed-up and KL."""

    label: str
    speedup: float
    kl_nats: float
    group: str
    """A key of `GROUPS`."""
    note: str = ""
    """What else hovering says."""
    named: bool = True
    """Whether its label stands in the figure."""


@dataclass(frozen=True)
class FrontierLine:
    """One way to choose children, over a range of limits."""

    label: str
    costs: Sequence[float]
    """Predicted, such as the speed-up."""
    scores: Sequence[float]
    """Summed replace-1-block scores."""
    is_child: bool
    scattered: bool
    """Several children for each limit: points without a line."""


def decision_figure(
    points: Sequence[Point], frontier: Sequence[Point] = (), x_title: str = "predicted speed-up"
) -> go.Figure:
    """Speed-up against KL on a log axis: models as points, and a line through `frontier`."""
    height = 440
    figure = go.Figure()
    axis = log_axis(point.kl_nats for point in (*points, *frontier))
    speedups = [point.speedup for point in (*points, *frontier)]
    spread = max(max(speedups) - min(speedups), 0.02)
    left, right = min(speedups) - 0.15 * spread, max(speedups) + 0.15 * spread
    if frontier:
        line = {"mode": "lines+markers", "line": {"color": FEWER_HEADS, "width": 2}, "marker": {"size": 5}}
        figure.add_scatter(**_values(frontier), name="best at each limit, predicted", **line)
    for name, (colour, symbol, size) in GROUPS.items():
        own = [point for point in points if point.group == name]
        if own:
            marker = {"size": size, "color": colour, "symbol": symbol}
            figure.add_scatter(**_values(own), name=name, mode="markers", marker=marker)
    _label(figure, [point for point in points if point.named], height, axis["range"], (left + right) / 2)
    figure.update_xaxes(title_text=x_title, range=[left, right], ticksuffix="x", nticks=6)
    figure.update_yaxes(title_text="KL, nats", **axis)
    return styled(figure, height)


def _values(points: Sequence[Point]) -> dict:
    return {
        "x": [point.speedup for point in points],
        "y": [point.kl_nats for point in points],
        "customdata": [[point.label, "<br>" + point.note if point.note else ""] for point in points],
        "hovertemplate": "%{customdata[0]}: %{x:.3f}x, %{y:.4f} nats%{customdata[1]}<extra></extra>",
    }


def _label(figure: go.Figure, points: Sequence[Point], height: int, span: Sequence[float], middle: float) -> None:
    """Labels beside the points, highest first; one that would touch the one above it moves down."""
    low, high = span
    pixels_per_decade, label_height = 0.75 * height / (high - low), 18
    taken = {"left": math.inf, "right": math.inf}
    for point in sorted(points, key=lambda point: -point.kl_nats):
        side = "right" if point.speedup < middle else "left"
        there = (math.log10(point.kl_nats) - low) * pixels_per_decade
        at = min(there, taken[side] - label_height)
        taken[side] = at
        figure.add_annotation(
            x=point.speedup,
            y=math.log10(point.kl_nats),
            text=point.label,
            ax=24 if side == "right" else -24,
            ay=there - at,
            xanchor="left" if side == "right" else "right",
            showarrow=True,
            arrowhead=0,
            arrowwidth=1,
            arrowcolor=SOFT,
            standoff=7,
        )


def search_frontier_figure(lines: Sequence[FrontierLine], x_title: str, y_title: str) -> go.Figure:
    """Summed score against predicted cost, both on log axes, one line for each model (Puzzle, Figure 5)."""
    figure = go.Figure()
    colours = iter((FEWER_HEADS, LINEAR, NO_OP, "#8a63b8", "#8a939c"))
    for line in lines:
        colour = PARENT if line.is_child else next(colours)
        width, size = (3, 8) if line.is_child else (1.5, 6)
        figure.add_scatter(
            x=list(line.costs),
            y=[score if score > 0 else None for score in line.scores],
            name=line.label,
            mode="markers" if line.scattered else "lines+markers",
            line={"color": colour, "width": width},
            marker={"size": 4 if line.scattered else size, "color": colour},
            hovertemplate=f"{line.label}: %{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        )
    figure.update_xaxes(title_text=x_title, **log_axis(cost for line in lines for cost in line.costs))
    figure.update_yaxes(title_text=y_title, **log_axis(score for line in lines for score in line.scores))
    return styled(figure, 520)
