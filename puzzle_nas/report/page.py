"""report.html: one self-contained page that says what a run made, with every figure and number behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.facts import Facts
from puzzle_nas.report.layout import document, paragraph, section
from puzzle_nas.report.sections.anatomy import anatomy
from puzzle_nas.report.sections.decision import decision
from puzzle_nas.report.sections.losses import losses
from puzzle_nas.report.sections.making import cost, reproduction
from puzzle_nas.report.sections.times import times
from puzzle_nas.report.sections.training import training
from puzzle_nas.report.tables import speed_note

SECTIONS: tuple[tuple[str, str, Callable[[Facts], str], bool], ...] = (
    ("the-decision", "The decision: quality against speed", decision, True),
    ("the-child", "The child, layer by layer", anatomy, True),
    ("quality-lost", "Where quality was lost", losses, True),
    ("predictions", "Predictions against measurement", times, False),
    ("training", "Library, BLD, refit and GKD", training, False),
    ("cost", "What the run cost", cost, False),
    ("reproduction", "How to reproduce it", reproduction, False),
)
"""Id, title, content, and whether it is open at first."""


def render_page(recipe: Recipe, run: RunFolder, summary: dict[str, Any]) -> str:
    """The whole page as HTML; equal inputs give equal bytes.

    What a run lacks, its section says in a sentence.
    """
    facts = Facts(recipe, run, summary)
    body = "".join(section(name, title, content(facts), opened) for name, title, content, opened in SECTIONS)
    title = f"Puzzle: a child of {summary['parent']['source']}"
    return document(title, f"{_headline(summary)}<button>Open every section</button>\n{body}")


def _headline(summary: Mapping[str, Any]) -> str:
    child, parent = summary["child"], summary["parent"]
    what = (
        f"A child of {parent['source']}, {child['speedup_measured']:.2f}x as fast as its parent (measured), "
        f"KL {child['validation_kl_nats_distilled']:.3g} nats, agrees with the parent's top token "
        f"{100 * child['top1_agreement']:.0f} % of the time."
    )
    return paragraph(what, "lead") + paragraph(speed_note(summary))
