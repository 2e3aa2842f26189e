"""Several runs side by side, from their summaries: what `puzzle compare` prints and draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from puzzle_nas.artifacts import RunFolder, read_json, written_by_this_version
from puzzle_nas.errors import RecipeError
from puzzle_nas.report.facts import percents_of_parent, slots_of
from puzzle_nas.report.figures.common import slot_name
from puzzle_nas.report.figures.layers import runtimes_figure
from puzzle_nas.report.figures.tradeoffs import Point, decision_figure
from puzzle_nas.report.layout import document, figure, paragraph, section, table
from puzzle_nas.report.tables import megabytes, number
from puzzle_nas.report.terminal import FigureTable

Summary = Mapping[str, Any]
LONGEST_CELL = 36
"""Characters in a line of a cell; longer than any figure."""


@dataclass(frozen=True)
class ComparedRun:
    """One run among several."""

    name: str
    """The shortest end of its path that no other run shares."""
    summary: Summary
    validation_text: str | None
    """Checksum of its validation split, None where the run does not say."""


def load_runs(folders: Sequence[RunFolder]) -> list[ComparedRun]:
    """The runs, in the order given.

    Raises:
        RecipeError: fewer than two, or one of them twice.
        ArtifactError: a run without a summary, or with one that another version wrote.
    """
    paths = [folder.path.resolve() for folder in folders]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise RecipeError("Comparing takes two or more different runs: puzzle compare RUN RUN ...")
    length = next(n for n in range(1, 100) if len({path.parts[-n:] for path in paths}) == len(paths))
    runs = []
    for path, folder in zip(paths, folders, strict=True):
        record = folder.record("prepare_data") or {"outputs": {}}
        checksum = record["outputs"].get("data/validation.safetensors")
        name = "/".join(path.parts[-length:])
        runs.append(ComparedRun(name, _summary(folder), checksum))
    return runs


def _summary(folder: RunFolder) -> Summary:
    summary = read_json(folder.summary, "write-report")
    with written_by_this_version(folder.summary, "write-report"):
        for cell in ROWS.values():
            cell(summary)
    return summary


def _made_of(summary: Summary, slot: str) -> str:
    found = [row["slots"][slot]["variant"] for row in summary["architecture"] if slot in row["slots"]]
    counts = Counter(variant.removeprefix(f"{slot}.") for variant in found)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


ROWS: dict[str, Callable[[Summary], str]] = {
    "parent": lambda s: s["parent"]["source"],
    "engine": lambda s: f"{s['engine']}, {s['machine'].get('processor', s['machine'].get('device', '-'))}",
    "asked for": lambda s: ", ".join(f"{name}={value:g}" for name, value in s["child"]["limits"].items()) or "-",
    "speed-up, predicted": lambda s: number(s["child"]["speedup_predicted"], ".3f", unit="x"),
    "speed-up, measured": lambda s: number(s["child"]["speedup_measured"], ".3f", unit="x"),
    "its standard error": lambda s: number(s["child"]["speedup_measured_standard_error"], ".3f", unit="x"),
    "KL, assembled": lambda s: number(s["child"]["validation_kl_nats_assembled"], ".4f"),
    "KL, distilled": lambda s: number(s["child"]["validation_kl_nats_distilled"], ".4f"),
    "standard error": lambda s: number(s["child"]["validation_kl_nats_standard_error"], ".4f"),
    "perplexity": lambda s: number(s["child"]["validation_perplexity"], ".2f"),
    "parent's perplexity": lambda s: number(s["parent"]["validation_perplexity"], ".2f"),
    "top-1 agreement": lambda s: number(s["child"]["top1_agreement"], ".1f", 100, " %"),
    "parameters": lambda s: f"{s['child']['parameters'] / 1e6:.1f} M of {s['parent']['parameters'] / 1e6:.1f} M",
    "memory": lambda s: f"{megabytes(s['child']['memory_bytes'])} of {megabytes(s['parent']['memory_bytes'])}",
    "attention": lambda s: _made_of(s, "attention"),
    "FFN": lambda s: _made_of(s, "ffn"),
    "GKD tokens": lambda s: f"{s['gkd']['tokens']:,}",
    "seconds": lambda s: f"{sum(s['seconds'].values()):,.0f}",
}
"""What is compared; KL in nats on each run's validation split."""


def comparison_rows(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """One row for each of `ROWS`: its name, then a cell for each run."""
    return [[name, *(cell(run.summary) for run in runs)] for name, cell in ROWS.items()]


def comparison_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """Why figures of these runs may not be held against each other; empty where nothing forbids it."""

    def differs(values: Sequence[Any]) -> bool:
        return any(value != values[0] for value in values)

    notes = []
    if differs([run.summary["parent"]["source"] for run in runs]):
        notes.append("The parents differ: KL, agreement and speed-up are each child's against its own parent.")
    texts = [run.validation_text for run in runs]
    if None in texts or differs(texts):
        notes.append("The validation text differs or is not known: KL and perplexity are not of the same text.")
    if differs([run.summary["machine"] for run in runs]):
        notes.append("Machine, engine or versions differ: so may speed-ups, for that reason alone.")
    if differs([run.summary["scenarios"] for run in runs]):
        notes.append("The scenarios differ: speed-ups and memory are of different traffic.")
    return notes


def comparison_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Each run's whole summary by name, and the notes."""
    return {"runs": {run.name: run.summary for run in runs}, "notes": comparison_notes(runs)}


def show_comparison(runs: Sequence[ComparedRun]) -> RenderableType:
    """The runs side by side for the terminal."""
    shown = FigureTable("", ("", *(run.name for run in runs)), comparison_rows(runs), fold=LONGEST_CELL)
    notes = comparison_notes(runs)
    return Group(shown, Text(), Text("\n".join(notes))) if notes else shown


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    """The runs side by side as a page that loads nothing."""
    points = [
        Point(run.name, child["speedup_measured"], child["validation_kl_nats_distilled"], "child")
        for run in runs
        if (child := run.summary["child"])["validation_kl_nats_distilled"] > 0
    ]
    decision = "".join(paragraph(note, "note") for note in comparison_notes(runs))
    if points:
        caption = (
            "Distilled children: measured speed-up, KL on the validation split. Lower and further right is better."
        )
        drawn = decision_figure(points, x_title="measured speed-up")
        decision += figure("decision", drawn, "Quality against speed", caption)
    decision += table(("", *(run.name for run in runs)), comparison_rows(runs))
    percents = {
        f"{run.name}, {slot_name(slot)}": percents_of_parent(run.summary["architecture"], slot)
        for run in runs
        for slot in slots_of(run.summary["architecture"])
    }
    layers = figure("layers", runtimes_figure(percents), "Runtime of each sub-block, percent of the parent's")
    return document(
        f"Puzzle: {len(runs)} runs compared",
        section("the-decision", "Quality against speed", decision, opened=True)
        + section("the-children", "The children, layer by layer", layers, opened=True),
    )
