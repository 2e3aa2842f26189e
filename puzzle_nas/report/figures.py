"""The report's figures as plotly figures. Every value comes from the caller; nothing is read here.

Colours are mid-tones that keep their contrast on a light and on a dark page; the page colours the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from puzzle_nas.architecture import SLOTS, Spec

PARENT, LINEAR, NO_OP = "#3a7cc4", "#c98a1b", "#cc4b37"
FEWER_HEADS, NARROWER = "#2a9d8f", "#6a9a2d"
SIZES = ("#3a7cc4", "#2a9d8f", "#6a9a2d", "#8a63b8", "#5f7a8c", "#b0558f")
"""Variants of one kind, in order of size."""
OUTSIDE_TEXT = 1.25
"""Length of an axis relative to its longest bar, so that there is room for the text beside it."""
GHOST = "rgba(128,128,128,0.18)"
KIND_COLOURS = {"grouped": FEWER_HEADS, "gated": NARROWER, "linear": LINEAR, "no_op": NO_OP}
KIND_LABELS = {"grouped": "fewer KV heads", "gated": "narrower", "linear": "linear", "no_op": "left out"}

Values = Sequence[float | None]


@dataclass(frozen=True)
class Bar:
    """One sub-block of the child."""

    layer: int
    spec: Spec
    is_parent: bool
    percent_of_parent: float
    """Runtime relative to the parent's sub-block."""


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


@dataclass(frozen=True)
class Point:
    """One model: its predicted speed-up and KL."""

    label: str
    speedup: float
    kl_nats: float
    is_child: bool


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
    """Range and ticks of a log axis around the positive values: 1, 2, 5 if they fit, else powers of ten."""
    positive = [value for value in values if value is not None and value > 0]
    low, high = math.log10(min(positive, default=1.0)), math.log10(max(positive, default=1.0))
    pad = max(0.08, 0.05 * (high - low))
    low, high = low - pad, high + pad
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.2 else (1,)
    step = max(1, round((high - low) / 6)) if factors == (1,) else 1
    ticks = [factor * 10.0**decade for decade in decades if decade % step == 0 for factor in factors]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return {
        "type": "log",
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [f"{tick:.3g}" for tick in ticks],
    }


def child_figure(bars: Sequence[Bar]) -> go.Figure:
    """Runtime of each sub-block relative to the parent's, attention above FFN (Puzzle, Figure 6)."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    named: set[str] = set()
    ranks = {label: rank for rank, label in enumerate(["as in the parent", *KIND_LABELS.values()])}
    for row, slot in enumerate(SLOTS, 1):
        own = [bar for bar in bars if bar.spec.slot == slot]
        layers = [bar.layer for bar in own]
        ghosts = go.Bar(x=layers, y=[100] * len(own), marker_color=GHOST, hoverinfo="skip", showlegend=False)
        figure.add_trace(ghosts, row, 1)
        kinds: dict[str, list[Bar]] = {}
        for bar in own:
            label = "as in the parent" if bar.is_parent else KIND_LABELS.get(bar.spec.kind, bar.spec.kind)
            kinds.setdefault(label, []).append(bar)
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
                figure.add_trace(go.Bar(y=heights, marker_color=colour, **shared), row, 1)
            named.add(label)
        highest = max([100.0, *(bar.percent_of_parent for bar in own)])
        title = {"attention": "attention", "ffn": "FFN"}[slot]
        figure.update_yaxes(title_text=f"{title}, %", row=row, col=1)
        figure.update_yaxes(range=[0, 1.05 * highest], tickvals=[0, 50, 100], row=row, col=1)
    _layer_axis(figure, len(bars) // len(SLOTS))
    figure.update_xaxes(showgrid=False)
    figure.update_xaxes(title_text="", row=1, col=1)
    figure.update_layout(barmode="overlay", bargap=0.25)
    return _styled(figure, 420)


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
    _layer_axis(figure, max(len(curve.values) for curve in curves))
    figure.update_yaxes(title_text=unit, **log_axis(limits))
    return _styled(figure, 380)


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
    _layer_axis(figure, max(len(variant.start) for variant in variants))
    figure.update_yaxes(title_text="held-out loss", **log_axis(limits))
    return _styled(figure, 400)


def training_figure(tokens: Sequence[int], values: Values, title: str, best: int | None = None) -> go.Figure:
    """A curve over training tokens; `best` is the index of the point that was kept."""
    figure = go.Figure()
    figure.add_scatter(
        x=list(tokens),
        y=list(values),
        mode="lines+markers",
        line={"color": PARENT, "width": 1.8},
        marker={"size": 5},
        showlegend=False,
        hovertemplate="%{x:,} tokens: %{y:.4g}<extra></extra>",
    )
    if best is not None:
        marker = {"symbol": "circle-open", "size": 13, "color": NO_OP, "line": {"width": 2}}
        figure.add_scatter(
            x=[tokens[best]],
            y=[values[best]],
            mode="markers",
            marker=marker,
            name="kept",
            showlegend=True,
            hoverinfo="skip",
        )
    figure.update_xaxes(title_text="training tokens", nticks=5, tickformat="~s")
    figure.update_yaxes(title_text=title)
    return _styled(figure, 320)


def frontier_figure(points: Sequence[Point]) -> go.Figure:
    """Predicted speed-up against validation KL, a label at each point."""
    height, label_height = 400, 18
    figure = go.Figure()
    axis = log_axis(point.kl_nats for point in points)
    low, high = axis["range"]
    speedups = [point.speedup for point in points]
    spread = max(max(speedups) - min(speedups), 0.02)
    left, right = min(speedups) - 0.15 * spread, max(speedups) + 0.15 * spread
    groups = (("child", PARENT, "circle"), ("baseline", LINEAR, "diamond"))
    for name, colour, symbol in groups:
        own = [point for point in points if point.is_child == (name == "child")]
        figure.add_scatter(
            x=[point.speedup for point in own],
            y=[point.kl_nats for point in own],
            customdata=[point.label for point in own],
            name=name,
            mode="markers",
            marker={"size": 11, "color": colour, "symbol": symbol},
            hovertemplate="%{customdata}: %{x:.3f}x, %{y:.4f} nats<extra></extra>",
        )
    pixels_per_decade = 0.75 * height / (high - low)
    taken = {"left": math.inf, "right": math.inf}
    for point in sorted(points, key=lambda point: -point.kl_nats):
        # Highest first; a label that would touch the one above it moves down.
        side = "right" if point.speedup < (left + right) / 2 else "left"
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
            arrowcolor="rgba(128,128,128,0.8)",
            standoff=7,
        )
    figure.update_xaxes(title_text="predicted speed-up", range=[left, right], ticksuffix="x", nticks=6)
    figure.update_yaxes(title_text="validation KL, nats", **axis)
    return _styled(figure, height)


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
    return _styled(figure, 520)


def prediction_figure(predicted_ms: Mapping[str, float], measured_ms: Mapping[str, float]) -> go.Figure:
    """Predicted and measured milliseconds of each model."""
    figure = go.Figure()
    # Plotly draws the first bar lowest.
    models = list(predicted_ms)[::-1]
    for name, times, colour in (("measured", measured_ms, PARENT), ("predicted", predicted_ms, LINEAR)):
        figure.add_bar(
            y=models,
            x=[times[model] for model in models],
            orientation="h",
            name=name,
            marker_color=colour,
            text=[f"{times[model]:,.1f}" for model in models],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"%{{y}}, {name}: %{{x:.2f}} ms<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.3, legend_traceorder="reversed")
    figure.update_yaxes(showgrid=False)
    longest = max(*predicted_ms.values(), *measured_ms.values())
    figure.update_xaxes(title_text="ms for the mix of request batches", range=[0, OUTSIDE_TEXT * longest])
    return _styled(figure, 240)


def bench_figure(
    scenarios: Sequence[str], rates: Mapping[str, Sequence[float]], speedups: Sequence[float]
) -> go.Figure:
    """Tokens per second and device of each model, by scenario, with the child's speed-up over it."""
    figure = go.Figure()
    for (model, values), colour in zip(rates.items(), (PARENT, FEWER_HEADS), strict=True):
        last = model == list(rates)[-1]
        figure.add_bar(
            x=list(scenarios),
            y=list(values),
            name=model,
            marker_color=colour,
            text=[f"{speedup:.2f}x" for speedup in speedups] if last else None,
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"{model}, %{{x}}: %{{y:,.0f}}<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(title_text="prompt/output tokens", type="category", showgrid=False)
    longest = max(value for values in rates.values() for value in values)
    figure.update_yaxes(title_text="tokens per second and device", range=[0, OUTSIDE_TEXT * longest])
    return _styled(figure, 420)


def seconds_figure(seconds: Mapping[str, float]) -> go.Figure:
    """Wall time of each stage, the longest on top."""
    stages = sorted(seconds, key=lambda name: (seconds[name], name))
    figure = go.Figure()
    figure.add_bar(
        y=[name.replace("_", " ") for name in stages],
        x=[seconds[name] for name in stages],
        orientation="h",
        marker_color=PARENT,
        text=[f"{seconds[name]:,.0f} s" for name in stages],
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
        hovertemplate="%{y}: %{x:.1f} s<extra></extra>",
    )
    figure.update_yaxes(showgrid=False)
    longest = max(seconds.values(), default=1.0)
    figure.update_xaxes(title_text="seconds", range=[0, OUTSIDE_TEXT * max(longest, 1e-9)])
    return _styled(figure, 90 + 26 * len(stages))


def _layer_axis(figure: go.Figure, layers: int) -> None:
    step = next((step for step in (1, 2, 5, 10) if layers <= 12 * step), 20)
    figure.update_xaxes(title_text="layer", tick0=0, dtick=step, range=[-0.6, layers - 0.4])


def _styled(figure: go.Figure, height: int) -> go.Figure:
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
