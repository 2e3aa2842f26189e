"""Predictions against measurement: times, by model and by scenario, and what was timed in the search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.report.facts import Facts
from puzzle_nas.report.figures.runs import prediction_figure
from puzzle_nas.report.layout import figure, folded, paragraph, table
from puzzle_nas.report.tables import prediction_note


def times(facts: Facts) -> str:
    """Predicted and measured time of parent and child, and the costs behind the prediction."""
    summary, models = facts.summary, ("parent", "child")
    predicted, measured = (
        {model: summary[model][f"runtime_ms_{how}"] for model in models} for how in ("predicted", "measured")
    )
    text = paragraph(prediction_note(summary))
    load = summary["prediction"]["other_load_percent_at_cost_measurement"]
    if load is not None:
        text += paragraph(f"Other work kept the machine {load:.0f} % busy when costs were measured.", "note")
    text += figure("prediction", prediction_figure(predicted, measured), "Time of the mix of request batches")
    checks = summary["search"]["speed_checks"]
    if checks:
        rows = [
            (str(number), f"{row['speedup_predicted']:.3f}x", f"{row['speedup_measured']:.3f}x")
            for number, row in enumerate(checks, start=1)
        ]
        text += paragraph("What the search found was timed next to the parent, and the limit corrected accordingly.")
        text += table(("attempt", "predicted", "measured"), rows)
    if facts.costs is None or facts.parent is None:
        return text + paragraph("The run holds no cost table.")
    parent = facts.parent
    by_scenario = facts.file("measured.json")
    if by_scenario is not None and facts.child is not None:
        text += _scenarios(facts.costs, by_scenario, {"parent": parent, "child": facts.child})
    else:
        text += paragraph("The run holds no measured times by scenario.")
    return text + _variants(facts, facts.costs, parent)


def _scenarios(costs: CostTable, measured: Mapping[str, Any], models: Mapping[str, Architecture]) -> str:
    rows = []
    for scenario in costs.scenarios:
        for model, architecture in models.items():
            took = measured["scenarios"][scenario.name][model]
            predicted = costs.request_ms(architecture, scenario)
            ratio = f"{took['request_ms'] / predicted:.3f}" if predicted else "-"
            milliseconds = (took["prefill_ms"], took["decode_step_ms"], took["request_ms"], predicted)
            rows.append((f"{scenario.name}: {model}", *(f"{ms:,.2f}" for ms in milliseconds), ratio))
    columns = ("scenario", "prefill ms", "decode step ms", "batch ms", "predicted ms", "measured / predicted")
    return table(columns, rows)


def _variants(facts: Facts, costs: CostTable, parent: Architecture) -> str:
    rows = []
    longest = max(scenario.total_tokens for scenario in costs.scenarios)
    head_dim, itemsize = costs.data["bytes"]["head_dim"], costs.data["bytes"]["cache_itemsize"]
    for layer in dict.fromkeys(parent.groups):
        for slot, own in parent.layers[layer].items():
            full = costs.columns_of(layer, own)["runtime_ms"]
            for spec in (own, *(s for s in facts.library.specs.get(slot, ()) if costs.knows(layer, s))):
                columns = costs.columns_of(layer, spec)
                rows.append(
                    (
                        spec.id + (" (parent)" if spec == own else ""),
                        str(layer),
                        f"{columns['runtime_ms']:.3f}",
                        f"{100 * columns['runtime_ms'] / full:.0f} %" if full else "-",
                        f"{columns['parameters']:,.0f}",
                        f"{spec.cache_bytes(longest, head_dim, itemsize):,}",
                    )
                )
    cached = f"KV bytes of {longest:,} tokens"
    names = ("variant", "in layers like", "ms in one layer", "of the parent's", "parameters", cached)
    return folded("What each variant costs", table(names, rows))
