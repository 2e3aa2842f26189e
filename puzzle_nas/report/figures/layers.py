"""Figures over the layers. Every value comes from the caller; nothing is read here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from puzzle_nas.formats.layout import LAYOUTS
from puzzle_nas.report.figures.common import (
    GHOST,
    KIND_COLOURS,
    KIND_LABELS,
    LINEAR,
    NO_OP,
    PARENT,
    SIZES,
    Values,
    layer_axis,
    log_axis,
    slot_name,
    styled,
    variant_colours,
)
from puzzle_nas.specs import Spec

BAR_WIDTH = 0.75
"""In layers. Left to itself, plotly widens the bars of a trace that has none in neighbouring layers."""


@dataclass(frozen=True)
class Bar:
    """One sub-block of the child."""

    layer: int
    spec: Spec
    is_parent: bool
    """Whether it is the parent's own, in whichever format."""
    percent_of_parent: float
    """Runtime relative to the parent's sub-block."""

    @property
    def label(self) -> str:
        """What became of the parent's, and the format."""
        kind = "as in the parent" if self.is_parent else KIND_LABELS.get(self.spec.kind, self.spec.kind)
        return _label(kind, self.spec.format)


@dataclass(frozen=True)
class Curve:
    """What one variant has in each layer; None where there is nothing."""

    spec: Spec
    values: Values


@dataclass(frozen=True)
class Distillation:
    """Held-out losses of one variant before and after BLD, by layer."""

    spec: Spec
    start: Values
    end: Values
    fell_back: Sequence[bool]


def child_figure(bars: Sequence[Bar]) -> go.Figure:
    """Runtime of each sub-block relative to the parent's, a row for each slot (Puzzle, Figure 6)."""
    slots = list(dict.fromkeys(bar.spec.slot for bar in bars))
    figure = make_subplots(rows=len(slots), cols=1, shared_xaxes=True, vertical_spacing=0.16 / len(slots))
    named: set[str] = set()
    formats = sorted({bar.spec.format for bar in bars}, key=_bits, reverse=True)
    labels = [_label(kind, form) for kind in ("as in the parent", *KIND_LABELS.values()) for form in formats]
    ranks = {label: rank for rank, label in enumerate(labels)}
    opacities = {form: max(0.3, 1 - 0.35 * place) for place, form in enumerate(formats)}
    for row, slot in enumerate(slots, 1):
        own = [bar for bar in bars if bar.spec.slot == slot]
        layers = [bar.layer for bar in own]
        ghosts = {"marker_color": GHOST, "hoverinfo": "skip", "showlegend": False}
        figure.add_trace(go.Bar(x=layers, y=[100] * len(own), width=BAR_WIDTH, **ghosts), row, 1)
        kinds: dict[str, list[Bar]] = {}
        for bar in own:
            kinds.setdefault(bar.label, []).append(bar)
        for label, members in kinds.items():
            kind = members[0].spec.kind
            colour = PARENT if members[0].is_parent else KIND_COLOURS.get(kind, SIZES[-1])
            shared = {
                "x": [bar.layer for bar in members],
                "name": label,
                "legendgroup": label,
                "legendrank": ranks.get(label, len(ranks)),
                "showlegend": label not in named,
                "customdata": [[bar.spec.id, bar.percent_of_parent] for bar in members],
                "hovertemplate": "layer %{x}: %{customdata[0]}, %{customdata[1]:.0f} %<extra></extra>",
            }
            if kind == "no_op":
                # A bar of no height cannot be seen.
                marker = {"symbol": "x", "size": 7, "color": colour}
                crosses = go.Scatter(y=[6] * len(members), mode="markers", marker=marker, **shared)
                figure.add_trace(crosses, row, 1)
            else:
                heights = [bar.percent_of_parent for bar in members]
                look = {"marker_color": colour, "opacity": opacities[members[0].spec.format]}
                figure.add_trace(go.Bar(y=heights, width=BAR_WIDTH, **look, **shared), row, 1)
            named.add(label)
        highest = max([100.0, *(bar.percent_of_parent for bar in own)])
        figure.update_yaxes(title_text=f"{slot_name(slot)}, %", row=row, col=1)
        figure.update_yaxes(range=[0, 1.05 * highest], tickvals=[0, 50, 100], row=row, col=1)
    layer_axis(figure, 1 + max(bar.layer for bar in bars))
    figure.update_xaxes(showgrid=False)
    for row in range(1, len(slots)):
        figure.update_xaxes(title_text="", row=row, col=1)
    figure.update_layout(barmode="overlay")
    return styled(figure, 210 * len(slots))


def _label(kind: str, form: str | None) -> str:
    return f"{kind}, {form}" if form else kind


def _bits(form: str | None) -> float:
    """Of a weight; more than of any format for what has none."""
    return math.inf if form is None else 8 * LAYOUTS[form].block_bytes / LAYOUTS[form].block


def scores_figure(curves: Sequence[Curve], unit: str, limits: Iterable[float | None]) -> go.Figure:
    """Replace-1-block score against layer, one line for each variant; `limits` spans the shared log axis."""
    colours = variant_colours(curve.spec for curve in curves)
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            x=list(range(len(curve.values))),
            y=[value if value is not None and value > 0 else None for value in curve.values],
            name=curve.spec.id,
            mode="lines+markers",
            line={"color": colours[curve.spec.id], "width": 1.8},
            marker={"size": 4},
            hovertemplate=f"layer %{{x}}: {curve.spec.id}, %{{y:.4g}} {unit}<extra></extra>",
        )
    layer_axis(figure, max(len(curve.values) for curve in curves))
    figure.update_yaxes(title_text=unit, **log_axis(limits))
    return styled(figure, 380)


def distillation_figure(variants: Sequence[Distillation], limits: Iterable[float | None]) -> go.Figure:
    """Held-out loss before (dotted) and after BLD (solid) against layer; a cross where one fell back."""
    colours = variant_colours(variant.spec for variant in variants)
    figure = go.Figure()
    for variant in variants:
        name, layers = variant.spec.id, list(range(len(variant.start)))
        for values, dash, when in ((variant.start, "dot", "before"), (variant.end, "solid", "after")):
            figure.add_scatter(
                x=layers,
                y=list(values),
                name=name,
                legendgroup=name,
                showlegend=when == "after",
                mode="lines",
                line={"color": colours[name], "width": 1.8 if when == "after" else 1.2, "dash": dash},
                hovertemplate=f"layer %{{x}}: {name}, {when} BLD %{{y:.4g}}<extra></extra>",
            )
    fallen = [
        (layer, variant.start[layer], variant.spec.id)
        for variant in variants
        for layer, fell in enumerate(variant.fell_back)
        if fell
    ]
    if fallen:
        layers, losses, names = zip(*fallen, strict=True)
        figure.add_scatter(
            x=layers,
            y=losses,
            customdata=names,
            name="fell back",
            mode="markers",
            marker={"symbol": "x", "size": 9, "color": NO_OP},
            hovertemplate="layer %{x}: %{customdata} fell back<extra></extra>",
        )
    layer_axis(figure, max(len(variant.start) for variant in variants))
    figure.update_yaxes(title_text="held-out loss", **log_axis(limits))
    return styled(figure, 400)


def losses_figure(losses: Mapping[str, Mapping[int, float]], unit: str) -> go.Figure:
    """Replace-1-block score of what the child holds in each layer; `losses` is part -> layer -> score."""
    figure = go.Figure()
    colours = {"attention": PARENT, "ffn": LINEAR}
    for part, by_layer in losses.items():
        figure.add_bar(
            x=list(by_layer),
            y=list(by_layer.values()),
            width=BAR_WIDTH,
            name=slot_name(part),
            marker_color=colours.get(part, SIZES[3]),
            hovertemplate=f"layer %{{x}}: {slot_name(part)}, %{{y:.4g}} {unit}<extra></extra>",
        )
    layer_axis(figure, 1 + max(layer for by_layer in losses.values() for layer in by_layer))
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(title_text=unit)
    return styled(figure.update_layout(barmode="relative", showlegend=True), 320)


def runtimes_figure(percents: Mapping[str, Values]) -> go.Figure:
    """Percent of the parent's runtime that each layer keeps, one row for each child and slot."""
    rows = list(percents)[::-1]
    figure = go.Figure(
        go.Heatmap(
            z=[list(percents[row]) for row in rows],
            y=rows,
            zmin=0,
            zmax=100,
            xgap=1,
            ygap=1,
            colorscale=[[0, GHOST], [1, PARENT]],
            colorbar={"title": {"text": "%"}, "thickness": 10},
            hovertemplate="%{y}, layer %{x}: %{z:.0f} %<extra></extra>",
        )
    )
    layer_axis(figure, max(len(values) for values in percents.values()))
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False)
    return styled(figure, 120 + 32 * len(rows))
