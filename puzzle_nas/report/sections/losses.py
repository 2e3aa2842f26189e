"""Where quality was lost: by step of the run, by layer, and what else each layer could have become."""

from __future__ import annotations

from typing import Any

from puzzle_nas.architecture import choice_id
from puzzle_nas.artifacts import read_json
from puzzle_nas.report.facts import Facts
from puzzle_nas.report.figures.common import slot_name
from puzzle_nas.report.figures.layers import Curve, losses_figure, scores_figure
from puzzle_nas.report.layout import figure, folded, pair, paragraph, table
from puzzle_nas.report.sections.evaluations import evaluations
from puzzle_nas.report.tables import number

UNITS = {
    "kl": ("kl_nats", "KL, nats"),
    "lm_loss": ("lm_loss_increase_nats", "LM loss increase, nats"),
    "task_margin": ("task_loss", "loss of margin on the task"),
    "task_accuracy": ("task_loss", "loss of accuracy on the task"),
}
"""By metric: the field of a score's file, and what an axis says."""


def _unit(facts: Facts) -> str:
    return UNITS[facts.recipe.scoring.metric][1]


def losses(facts: Facts) -> str:
    """Every account of it that the run holds."""
    return _by_step(facts) + evaluations(facts) + _by_layer(facts) + _of_each_variant(facts)


def _by_step(facts: Facts) -> str:
    quality = facts.file("evaluation.json")
    if quality is None:
        return ""

    def row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
        kl, error = figures["kl_nats"], figures["kl_nats_standard_error"]
        return (
            name,
            f"{kl:.4f} ± {number(error, '.4f')}",
            f"{figures['perplexity']:.2f}",
            f"{100 * figures['top1_agreement']:.1f} %",
        )

    rows = [
        row(name, quality["child"][name]) for name in ("assembled", "refitted", "distilled") if name in quality["child"]
    ]
    parent = ("parent", "0", f"{quality['parent']['perplexity']:.2f}", "100.0 %")
    text = paragraph(
        "Assembling the variants costs quality; the refit and global distillation win some of it back. Validation "
        "split, the standard error of KL over sequences."
    )
    return text + table(("step", "KL nats", "perplexity", "top-1 agreement"), [parent, *rows])


def _by_layer(facts: Facts) -> str:
    if facts.tables is None or facts.child is None:
        return ""
    by_part: dict[str, dict[int, float]] = {}
    worst: list[tuple[float, str]] = []
    for (layer, specs), score in facts.tables.scores.items():
        if all(facts.child.at(layer, spec.slot) == spec for spec in specs):
            part = specs[0].slot if len(specs) == 1 else "block"
            by_part.setdefault(part, {})[layer] = score
            worst.append((score, f"{choice_id(specs)} in layer {layer} ({score:.3g})"))
    unit = _unit(facts)
    total, worst = sum(score for score, _ in worst), sorted(worst, reverse=True)[:3]
    child = facts.summary["child"]
    kl = child["validation_kl_nats_assembled"]
    text = f"The scores of the child's variants sum to {child['score_sum_nats']:.4g} ({unit})"
    if kl is not None and not facts.recipe.scoring.by_task:
        text += f"; assembled, and before any training as a whole, it has a KL of {kl:.4g} nats"
    if total > 0:
        share = sum(score for score, _ in worst) / total
        text += f". Three choices make {100 * share:.0f} % of the sum: {', '.join(name for _, name in worst)}"
    caption = "Score of what the child holds in each layer, taken when it alone is replaced in the parent."
    return paragraph(text + ".") + figure("losses", losses_figure(by_part, unit), "Loss by layer", caption)


def _of_each_variant(facts: Facts) -> str:
    run, library, metric = facts.run, facts.library, facts.recipe.scoring.metric
    field, unit = UNITS[metric][0], _unit(facts)
    curves: dict[str, list[Curve]] = {slot: [] for slot in library.specs}
    for slot in library.specs:
        for spec in library.specs[slot]:
            paths = [run.score(layer, spec.id, metric=metric) for layer in range(library.num_layers)]
            values = [read_json(path)[field]["mean"] if path.exists() else None for path in paths]
            if any(value is not None for value in values):
                curves[slot].append(Curve(spec, values))
    every = [curve for of_slot in curves.values() for curve in of_slot]
    everything = [value for curve in every for value in curve.values if value is not None]
    if not everything:
        return paragraph("The run holds no replace-1-block scores of single variants.")
    text = paragraph("Each point is the parent with one sub-block replaced: the higher, the more that one matters.")
    hidden = sum(value <= 0 for value in everything)
    if hidden:
        text += paragraph(f"{hidden} scores at or below zero have no place on the log axis.", "note")
    drawn = "".join(
        figure(f"scores-{slot}", scores_figure(curves[slot], unit, everything), f"Scores: {slot_name(slot)}")
        for slot in library.specs
        if curves[slot]
    )
    return folded("What every variant would cost in each layer", text + pair(drawn))
