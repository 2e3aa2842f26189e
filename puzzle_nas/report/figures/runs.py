"""Figures of a run's training and times. Every value comes from the caller; nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from puzzle_nas.report.figures.common import FEWER_HEADS, LINEAR, NO_OP, OUTSIDE_TEXT, PARENT, Values, styled


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
    return styled(figure, 320)


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
    return styled(figure, 420)


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
    return styled(figure, 240)


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
    return styled(figure, 90 + 26 * len(stages))
