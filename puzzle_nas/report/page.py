"""report.html: one self-contained page that says what a run made, with every figure and number behind it.

The page loads nothing: plotly.js is inside it, and its content security policy forbids the network.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from puzzle_nas.architecture import SLOTS, SPEC_KINDS, Architecture, ParentShape, Spec, spec_from_dict
from puzzle_nas.artifacts import RunFolder, read_json
from puzzle_nas.costs import CostTable
from puzzle_nas.recipe import Recipe
from puzzle_nas.report import figures
from puzzle_nas.report.tables import MODEL_COLUMNS, frontier_rows, model_rows, prediction_note, speed_note

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --soft: #59626d; --line: #d9dde2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8eb; --soft: #a3abb5; --line: #353b43; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; max-width: 75ch; }
.lead { font-size: 1.15rem; }
.note, figcaption { color: var(--soft); }
figure { margin: 1rem 0; min-width: 0; }
figcaption { font-size: .9rem; max-width: 75ch; }
.pair { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.plot { width: 100%; }
.plot text { fill: var(--ink) !important; }
.plot .hoverlayer path { fill: var(--paper) !important; stroke: var(--soft) !important; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.wide { white-space: normal; }
tr.strong td { font-weight: 600; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.4; }
"""

CONFIG = {"responsive": True, "displayModeBar": False}


@dataclass(frozen=True)
class Library:
    """The facts of every trained variant, by layer and id."""

    num_layers: int
    specs: Mapping[str, Sequence[Spec]]
    """By slot: the parent's kind of sub-block first, by size, then the others."""
    initial: Mapping[tuple[int, str], Mapping[str, Any]]
    main: Mapping[tuple[int, str], Mapping[str, Any]]

    @classmethod
    def load(cls, run: RunFolder, num_layers: int) -> Library:
        """Read whatever facts there are."""
        found: dict[str, dict[tuple[int, str], dict[str, Any]]] = {"initial": {}, "main": {}}
        size_of: dict[Spec, int] = {}
        for library, facts in found.items():
            for layer in range(num_layers):
                for path in sorted(run.variant(layer, "any", library).parent.glob("*.json")):
                    fact = read_json(path)
                    spec = spec_from_dict(fact["spec"])
                    facts[layer, spec.id] = fact
                    size_of.setdefault(spec, fact["parameters"])
        kinds = list(SPEC_KINDS)
        specs = sorted(size_of, key=lambda spec: (kinds.index((spec.slot, spec.kind)), -size_of[spec]))
        by_slot = {slot: [spec for spec in specs if spec.slot == slot] for slot in SLOTS}
        return cls(num_layers, by_slot, found["initial"], found["main"])

    def values(self, spec: Spec, key: str) -> list[Any]:
        """One fact of a variant after BLD in every layer, None where there is none."""
        return [self.main.get((layer, spec.id), {}).get(key) for layer in range(self.num_layers)]


def render_page(recipe: Recipe, run: RunFolder, summary: dict[str, Any]) -> str:
    """The whole page as HTML; equal inputs give equal bytes.

    What a run lacks, its section says in a sentence.
    """
    library = Library.load(run, len(summary["architecture"]))
    sections = [
        ("The child, layer by layer", _child(run, summary)),
        ("Scores: what each variant costs in quality", _scores(recipe, run, summary, library)),
        ("Library and blockwise distillation (BLD)", _distillation(recipe, library) + _coupled(recipe, run, summary)),
        ("Refit and global distillation (GKD)", _global_distillation(recipe, run, summary)),
        ("Against the baselines", _baselines(summary)),
        ("Predicted and measured time", _times(recipe, run, summary, library)),
        ("Where the time went", _seconds(summary)),
        ("How this was made", _making(recipe, run, summary)),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>\n" for title, content in sections)
    content = f"{_headline(summary)}\n{body}"
    return _document(f"Puzzle: a child of {summary['parent']['source']}", content)


def _document(title: str, content: str) -> str:
    """A self-contained page."""
    title = escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
<h1>{title}</h1>
<noscript><p>The figures of this page need JavaScript; its tables do not.</p></noscript>
{content}</main>
</body>
</html>
"""


# Pieces of HTML


def _paragraph(text: str, style: str = "") -> str:
    attribute = f' class="{style}"' if style else ""
    return f"<p{attribute}>{escape(text)}</p>\n"


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str] = (), strong: str | None = None
) -> str:
    """A table; columns named in `text` are aligned left, the row whose first cell is `strong` is bold."""
    classes = [' class="text"' if name in text else "" for name in columns]
    head = "".join(f'<th{c} scope="col">{escape(name)}</th>' for name, c in zip(columns, classes, strict=True))
    lines = "".join(
        ('<tr class="strong">' if row[0] == strong else "<tr>")
        + "".join(f"<td{c}>{escape(cell)}</td>" for cell, c in zip(row, classes, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return _scrolling(f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>")


def _scrolling(table: str) -> str:
    return f'<div class="scroll" tabindex="0"><table>{table}</table></div>\n'


def _figure(name: str, figure: go.Figure, title: str, caption: str = "") -> str:
    """A figure, drawn once the page has its widths. No `<` stands in the script, so no label can end it."""
    content = figure.to_plotly_json()
    data, layout = (_script_json(content[part]) for part in ("data", "layout"))
    height = figure.layout.height
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    label = escape(title)
    return (
        f"<figure><h3>{label}</h3>\n"
        f'<div id="{name}" class="plot" role="img" aria-label="{label}" style="height:{height}px"></div>'
        f"{below}\n"
        f'<script>addEventListener("DOMContentLoaded", () =>\n'
        f'Plotly.newPlot("{name}", {data}, {layout}, {_script_json(CONFIG)}));</script></figure>\n'
    )


def _script_json(value: Any) -> str:
    return json.dumps(value, cls=PlotlyJSONEncoder, sort_keys=True).replace("<", "\\u003c")


def _listed(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# Sections


def _headline(summary: Mapping[str, Any]) -> str:
    child, parent = summary["child"], summary["parent"]
    what = (
        f"A child of {parent['source']}, {child['speedup_measured']:.2f}x as fast as its parent (measured), "
        f"KL {child['validation_kl_nats_distilled']:.3g} nats, agrees with the parent's top token "
        f"{100 * child['top1_agreement']:.0f} % of the time."
    )
    error = child["validation_kl_nats_standard_error"]
    rows = model_rows(summary)
    return (
        _paragraph(what, "lead")
        + _paragraph(speed_note(summary))
        + _table(MODEL_COLUMNS, rows, strong="child, distilled")
        + _paragraph(
            "KL, perplexity and agreement on the validation split; the distilled child's KL has a standard "
            f"error of {error:.2g} nats. Memory is parameters, full KV cache and working space.",
            "note",
        )
    )


def _child(run: RunFolder, summary: Mapping[str, Any]) -> str:
    full = summary["parent_share_of_runtime"]

    def percent(row: Mapping[str, Any], slot: str) -> float:
        share = row[f"{slot}_share_of_parent_runtime"]
        return 100 * share / full[slot] if full[slot] else 0.0

    parts = []
    if run.architecture().exists() and run.parent.exists():
        architecture = Architecture.from_list(read_json(run.architecture())["architecture"])
        shape = ParentShape(**read_json(run.parent)["shape"])
        layers = summary["architecture"]
        bars = [
            figures.Bar(layer, spec, spec == shape.parent_spec(slot), percent(layers[layer], slot))
            for layer, slot, spec in architecture
        ]
        caption = (
            "Predicted runtime of each sub-block relative to the parent's own (grey, 100 %). "
            "A cross marks a sub-block that is left out."
        )
        title = "Runtime of attention and FFN in each layer"
        parts.append(_figure("child", figures.child_figure(bars), title, caption))
    else:
        parts.append(_paragraph("The run holds no search result to draw; the table comes from the summary."))
    rows = []
    for _, group in groupby(summary["architecture"], key=lambda row: [row[slot] for slot in SLOTS]):
        members = list(group)
        first = members[0]
        cells = [cell for slot in SLOTS for cell in (first[slot], f"{percent(first, slot):.0f} %")]
        rows.append([_listed([row["layer"] for row in members]), *cells])
    columns = ("layers", "attention", "of parent's", "FFN", "of parent's")
    return "".join(parts) + _table(columns, rows, text=("attention", "FFN"))


def _scores(recipe: Recipe, run: RunFolder, summary: Mapping[str, Any], library: Library) -> str:
    metric = recipe.scoring.metric
    field, unit = {
        "kl": ("kl_nats", "KL, nats"),
        "lm_loss": ("lm_loss_increase_nats", "LM loss increase, nats"),
    }[metric]
    curves: dict[str, list[figures.Curve]] = {slot: [] for slot in SLOTS}
    for slot in SLOTS:
        for spec in library.specs[slot]:
            paths = [run.score(layer, spec.id, metric=metric) for layer in range(library.num_layers)]
            values = [read_json(path)[field]["mean"] if path.exists() else None for path in paths]
            if any(value is not None for value in values):
                curves[slot].append(figures.Curve(spec, values))
    lines = [curve for slot in SLOTS for curve in curves[slot]]
    everything = [value for curve in lines for value in curve.values if value is not None]
    if not everything:
        return _paragraph("The run holds no replace-1-block scores.")
    text = _paragraph("Each point is the parent with one sub-block replaced: the higher, the more that one matters.")
    child = summary["child"]
    kl = child["validation_kl_nats_assembled"]
    if kl is not None:
        text += _paragraph(
            f"The scores of the child's variants sum to {child['score_sum_nats']:.4g} nats; assembled, "
            f"and before any training as a whole, it has a KL of {kl:.4g} nats."
        )
    hidden = sum(value <= 0 for value in everything)
    if hidden:
        text += _paragraph(f"{hidden} scores at or below zero have no place on the log axis.", "note")
    drawn = "".join(
        _figure(
            f"scores-{slot}",
            figures.scores_figure(curves[slot], unit, everything),
            f"Scores: {_slot_name(slot)}",
        )
        for slot in SLOTS
        if curves[slot]
    )
    return f'{text}<div class="pair">{drawn}</div>'


def _slot_name(slot: str) -> str:
    return {"attention": "attention", "ffn": "FFN"}[slot]


def _distillation(recipe: Recipe, library: Library) -> str:
    specs = [spec for slot in SLOTS for spec in library.specs[slot]]
    if not specs:
        return _paragraph("The run holds no library.")
    trained: dict[str, list[figures.Distillation]] = {slot: [] for slot in SLOTS}
    rows = []
    for spec in specs:
        start, end = library.values(spec, "held_out_loss_start"), library.values(spec, "held_out_loss_end")
        fell = [bool(value) for value in library.values(spec, "fell_back")]
        known = [value for value in start if value is not None]
        if known:
            trained[spec.slot].append(figures.Distillation(spec, start, end, fell))
        chosen = Counter(
            library.initial[layer, spec.id].get("chosen", "-")
            for layer in range(library.num_layers)
            if (layer, spec.id) in library.initial
        )
        rows.append(
            (
                spec.id,
                ", ".join(f"{name} {count}" for name, count in chosen.most_common()) or "-",
                _median(start),
                _median(end),
                _listed([layer for layer, value in enumerate(fell) if value]) or ("none" if known else "-"),
            )
        )
    columns = ("variant", "initialisation (layers)", "median loss before", "after", "fell back in layers")
    table = _table(columns, rows, text=("initialisation (layers)", "fell back in layers"))
    every = [variant for slot in SLOTS for variant in trained[slot]]
    if not every:
        skipped = recipe.bld.tokens == 0
        why = "BLD was skipped (bld.tokens is 0)" if skipped else "The run holds no losses of BLD"
        return _paragraph(f"{why}: variants are as they were initialised.") + table
    fallen = sum(sum(variant.fell_back) for variant in every)
    total = sum(value is not None for variant in every for value in variant.start)
    text = _paragraph(
        f"{total} variants trained on {recipe.bld.tokens:,} tokens each to give the parent's block output. "
        + (
            f"Training made {fallen} of them worse on held-out text: they fell back to the initialisation."
            if fallen
            else "Training made none of them worse on held-out text, so none fell back to the initialisation."
        )
    )
    losses = [value for variant in every for values in (variant.start, variant.end) for value in values]
    drawn = "".join(
        _figure(
            f"bld-{slot}",
            figures.distillation_figure(trained[slot], losses),
            f"Held-out loss before and after BLD: {_slot_name(slot)}",
            "Dotted before, solid after." + (" A cross marks a variant that fell back." if fallen else ""),
        )
        for slot in SLOTS
        if trained[slot]
    )
    return f'{text}<div class="pair">{drawn}</div>{table}'


def _coupled(recipe: Recipe, run: RunFolder, summary: Mapping[str, Any]) -> str:
    """What coupled BLD did; nothing where the recipe leaves it out."""
    if not recipe.coupled_bld.tokens or not run.coupled_pairs.exists():
        return ""
    pairs = [(layer, pair) for layer, ids in enumerate(read_json(run.coupled_pairs)["layers"]) for pair in ids]
    facts = [read_json(run.variant(layer, pair, "coupled").with_suffix(".json")) for layer, pair in pairs]
    before, after = (_median([f[f"held_out_loss_{end}"] for f in facts]) for end in ("start", "end"))
    blocks = [f"{row['attention']}+{row['ffn']}" for row in summary["architecture"]]
    return _paragraph(
        f"Coupled BLD then trained {len(pairs)} pairs of attention and FFN, those that the first search used, on "
        f"{recipe.coupled_bld.tokens:,} tokens each, from a median loss of {before} to {after}; "
        f"{sum(f['fell_back'] for f in facts)} fell back to the decoupled variants. "
        f"{sum(pair in pairs for pair in enumerate(blocks))} of the child's {len(blocks)} blocks are such pairs."
    )


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else "-"


def _global_distillation(recipe: Recipe, run: RunFolder, summary: Mapping[str, Any]) -> str:
    refit, gkd = summary["refit"], summary["gkd"]
    if not refit.get("tried"):
        text = _paragraph("The refit was not tried (refit.enabled is false).")
    else:
        fate = "kept" if refit["kept"] else "discarded"
        before, after = refit["selection_kl_nats_before"], refit["selection_kl_nats_after"]
        text = _paragraph(
            f"The refit took the assembled child's KL on the selection split from {before:.4g} "
            f"to {after:.4g} nats and was {fate}."
        )
    if not gkd["tokens"]:
        return text + _paragraph("GKD was skipped (gkd.tokens is 0).")
    before, after = gkd["selection_kl_nats_start"], gkd["selection_kl_nats_best"]
    if gkd["best_step"]:
        best = gkd["best_step"]
        result = f"took KL on the selection split from {before:.4g} to {after:.4g} nats, best at step {best}"
    else:
        result = f"lowered KL, {before:.4g} nats at the start, at no step: the child stays as it was"
    text += _paragraph(f"GKD on {gkd['tokens']:,} tokens {result}.")
    curve = read_json(run / "gkd.json").get("curve", []) if (run / "gkd.json").exists() else []
    if len(curve) < 2:
        return text + _paragraph("The run holds no curve of GKD.")
    length = recipe.data.sequence_length
    step_tokens = max(1, recipe.gkd.batch_tokens // length) * length
    tokens = [point["step"] * step_tokens for point in curve]
    steps = [point["step"] for point in curve]
    best = steps.index(gkd["best_step"]) if gkd["best_step"] in steps else None
    kl = [point["selection_kl_nats"] for point in curve]
    drawn = _figure(
        "gkd-kl", figures.training_figure(tokens, kl, "KL, nats", best), "GKD: KL on the selection split",
        f"{step_tokens:,} tokens to a step; the ring marks the weights that were kept.",
    ) + _figure(
        "gkd-loss",
        figures.training_figure(tokens[1:], [point.get("loss") for point in curve[1:]], "training loss"),
        "GKD: training loss",
        "Mean of the steps since the last measurement.",
    )  # fmt: skip
    return f'{text}<div class="pair">{drawn}</div>'


def _baselines(summary: Mapping[str, Any]) -> str:
    child = summary["child"]
    points = [
        (f"child, {name}", child["speedup_predicted"], child[f"validation_kl_nats_{name}"], True)
        for name in ("assembled", "refitted", "distilled")
    ] + [
        (name.replace("_", "-"), found["speedup_predicted"], found["validation_kl_nats_assembled"], False)
        for name, found in summary["baselines"].items()
    ]
    drawable = [figures.Point(*point) for point in points if point[1] is not None and (point[2] or 0) > 0]
    text = _paragraph(
        "Baselines come from the same library and are only assembled: compare them with the assembled child."
    )
    for name, found in summary["baselines"].items():
        if found.get("infeasible"):
            text += _paragraph(f"The baseline {name.replace('_', '-')} is infeasible: {found['infeasible']}")
    if not summary["baselines"]:
        text += _paragraph("The run holds no baselines.")
    if not drawable:
        return text + _paragraph("No model has both a predicted speed-up and a KL above zero to draw.")
    figure = figures.frontier_figure(drawable)
    return text + _figure("baselines", figure, "Predicted speed-up and KL of each model")


def _times(recipe: Recipe, run: RunFolder, summary: Mapping[str, Any], library: Library) -> str:
    models = ("parent", "child")
    predicted, measured = (
        {model: summary[model][f"runtime_ms_{how}"] for model in models} for how in ("predicted", "measured")
    )
    text = _paragraph(prediction_note(summary))
    load = summary["prediction"]["other_load_percent_at_cost_measurement"]
    if load is not None:
        text += _paragraph(f"Other work kept the machine {load:.0f} % busy when costs were measured.", "note")
    figure = figures.prediction_figure(predicted, measured)
    text += _figure("prediction", figure, "Time of the mix of request batches")
    if not run.costs(recipe.engine).exists() or not run.parent.exists():
        return text + _paragraph("The run holds no cost table.")
    costs = CostTable.load(run, recipe)
    parent = Architecture.of_parent(ParentShape(**read_json(run.parent)["shape"]))
    if (run / "measured.json").exists() and run.architecture().exists():
        child = Architecture.from_list(read_json(run.architecture())["architecture"])
        text += _scenario_table(costs, read_json(run / "measured.json"), {"parent": parent, "child": child})
    else:
        text += _paragraph("The run holds no measured times by scenario.")
    return text + _cost_table(costs, parent, library)


def _scenario_table(costs: CostTable, measured: Mapping[str, Any], models: Mapping[str, Architecture]) -> str:
    rows = []
    for scenario in costs.scenarios:
        for model, architecture in models.items():
            times = measured["scenarios"][scenario.name][model]
            predicted = costs.request_ms(architecture, scenario)
            ratio = f"{times['request_ms'] / predicted:.3f}" if predicted else "-"
            milliseconds = (times["prefill_ms"], times["decode_step_ms"], times["request_ms"], predicted)
            rows.append((f"{scenario.name}: {model}", *(f"{ms:,.2f}" for ms in milliseconds), ratio))
    columns = ("scenario", "prefill ms", "decode step ms", "batch ms", "predicted ms", "measured / predicted")
    return _table(columns, rows)


def _cost_table(costs: CostTable, parent: Architecture, library: Library) -> str:
    rows = []
    for slot in SLOTS:
        own = parent.layers[0][slot]
        full = costs.columns_of(own)["runtime_ms"]
        for spec in (own, *library.specs[slot]):
            columns, weights = costs.columns_of(spec), costs.data["bytes"]["variants"][spec.id]
            rows.append(
                (
                    spec.id + (" (parent)" if spec == own else ""),
                    f"{columns['runtime_ms']:.3f}",
                    f"{100 * columns['runtime_ms'] / full:.0f} %" if full else "-",
                    f"{columns['parameters']:,}",
                    f"{weights['kv_bytes_per_token']:,}",
                )
            )
    names = ("variant", "ms in one layer", "of the parent's", "parameters", "KV bytes per token")
    return f"<details><summary>What each variant costs</summary>{_table(names, rows)}</details>"


def _seconds(summary: Mapping[str, Any]) -> str:
    seconds = summary["seconds"]
    if not seconds:
        return _paragraph("The run holds no account of its time.")
    total = sum(seconds.values())
    text = _paragraph(f"{total:,.0f} seconds in all ({total / 60:.1f} minutes).")
    return text + _figure("seconds", figures.seconds_figure(seconds), "Seconds by stage")


def _making(recipe: Recipe, run: RunFolder, summary: Mapping[str, Any]) -> str:
    first = run.recipe.read_text().partition("\n")[0] if run.recipe.exists() else ""
    versions = first.removeprefix("#").strip() if first.startswith("#") else "not recorded"
    limits = ", ".join(f"{name} = {value:g}" for name, value in summary["child"]["limits"].items()) or "none"
    facts = {
        **{name.replace("_", " "): str(value) for name, value in summary["machine"].items()},
        "limits": limits,
        "versions": versions,
    }
    columns = ("scenario", "batch size", "prefill tokens", "decode tokens", "weight")
    scenarios = [
        (s["name"], *(f"{s[key]:g}" for key in ("batch_size", "prefill_tokens", "decode_tokens", "weight")))
        for s in summary["scenarios"]
    ]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="text wide">{escape(value)}</td></tr>\n'
        for name, value in facts.items()
    )
    return (
        _scrolling(f"<tbody>\n{rows}</tbody>")
        + _table(columns, scenarios)
        + f"<details><summary>Resolved recipe</summary><pre>{escape(recipe.to_yaml())}</pre></details>\n"
    )


# The frontier

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
    """The page of `puzzle frontier`: what `puzzle_nas.frontier` solved, as a picture and a table."""
    column, axis = {
        "memory_bytes": ("memory_bytes", "memory of parameters, KV cache and working space, bytes"),
        "parameters": ("parameters", "parameters"),
    }.get(frontier["limit"], ("speedup_predicted", "predicted speed-up"))
    unit = {"kl": "KL", "lm_loss": "LM loss increase"}[frontier["metric"]]
    lines = []
    for model, (label, _) in FRONTIER_MODELS.items():
        own = [row for row in frontier["rows"] if row["model"] == model and "infeasible" not in row]
        costs, scores = [row[column] for row in own], [row["score_sum"] for row in own]
        lines.append(figures.FrontierLine(label, costs, scores, model == "child", model == "random"))
    held = ", ".join(f"{name} = {value:g}" for name, value in frontier["other_limits"].items())
    text = _paragraph(
        f"Each point is a whole architecture: the sum of its replace-1-block scores ({unit}, nats) against its "
        f"predicted costs. Lower is better. Nothing was assembled." + (f" Throughout, {held}." if held else "")
    )
    figure = figures.search_frontier_figure([line for line in lines if line.costs], axis, f"summed score: {unit}, nats")
    columns, rows = frontier_rows(frontier)
    return _document(
        f"Puzzle: the frontier of {parent}",
        text
        + _figure("frontier", figure, "Quality against cost")
        + _table(columns, rows)
        + _table(("model", "what it is"), FRONTIER_MODELS.values(), text=("what it is",))
        + _paragraph("A dash: nothing of that kind meets the limits. For random, the median.", "note"),
    )
