"""An evaluation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from puzzle_nas.report.terminal import FigureTable


def show_evaluation(parts: Mapping[str, Any]) -> RenderableType:
    """Every part that was evaluated."""
    pieces: list[RenderableType] = []
    for name, part in parts.items():
        pieces += [*TABLES[name](part), Text()]
    return Group(*pieces[:-1])


def with_error(of: Mapping[str, Any], form: str, scale: float = 1.0) -> str:
    """`mean ±standard error`."""
    error = of["standard_error"]
    return format(scale * of["mean"], form) + ("" if error is None else f" ±{format(scale * error, form)}")


def _text(part: Mapping[str, Any]) -> list[RenderableType]:
    against = part["parent"] is not None
    columns = ["domain", "seqs", "ppl"]
    columns += ["parent", "loss +", "KL nats", "top-1 %"] if against else []
    rows = []
    for name, found in {**part["domains"], "all": part["all"]}.items():
        row = [name, str(found["sequences"]), with_error(found["perplexity"], ".2f")]
        if against:
            row += [
                f"{found['parent_perplexity']['mean']:.2f}",
                with_error(found["lm_loss_increase_nats"], ".3f"),
                with_error(found["kl_nats"], ".3f"),
                with_error(found["top1_agreement"], ".1f", 100),
            ]
        rows.append(row)
    title = f"Text, sequences of {part['sequence_length']} tokens (± standard error over sequences)"
    return [FigureTable(title, columns, rows if len(rows) > 2 else rows[:1])]


def _share(of: Mapping[str, Any] | None) -> str:
    """A preserved share and its interval."""
    return "-" if of is None else f"{100 * of['mean']:.1f} [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"


def _tasks(part: Mapping[str, Any]) -> list[RenderableType]:
    against = part["parent"] is not None
    columns = ["task", "metric", "items", "chance %", "model %"]
    columns += ["parent %", "difference", "preserved % [95 %]"] if against else []
    rows = []
    for name, found in part["tasks"].items():
        marked = "" if not against or found["counted"] else " *"
        marked = (" (other half)" if found["held_out_half"] else "") + marked
        row = [name + marked, found["metric"], str(found["items"]), f"{100 * found['chance']:.1f}"]
        row.append(with_error(found["score"], ".1f", 100))
        if against:
            row.append(with_error(found["parent_score"], ".1f", 100))
            row += [with_error(found["difference"], "+.1f", 100).replace("±+", "±"), _share(found["preserved"])]
        rows.append(row)
    if against:
        rows.append(["average", *[""] * 6, _share(part["average_preserved"])])
    pieces: list[RenderableType] = [FigureTable("Tasks (± standard error over items)", columns, rows)]
    if against and part["left_out"]:
        pieces.append(Text("* The parent is not above chance there; left out of the average."))
    return pieces


def _long_context(part: Mapping[str, Any]) -> list[RenderableType]:
    against = part["parent"] is not None
    pieces: list[RenderableType] = []
    texts = {length: row["text"] for length, row in part["lengths"].items() if "text" in row}
    if texts:
        columns = ["tokens", "seqs", "loss"] + (["loss +", "KL nats"] if against else [])
        rows = []
        for length, found in texts.items():
            row = [length, str(found["sequences"]), with_error(found["lm_loss_nats"], ".3f")]
            if against:
                row += [with_error(found["lm_loss_increase_nats"], ".3f"), with_error(found["kl_nats"], ".3f")]
            rows.append(row)
        pieces.append(FigureTable("Text by length, second half of each sequence", columns, rows))
    asked = {length: row for length, row in part["lengths"].items() if "tasks" in row}
    if asked:
        kinds = list(next(iter(asked.values()))["tasks"])
        columns = ["tokens", *(kind.replace("_", " ") for kind in kinds), "average"]
        columns += ["preserved % [95 %]"] if against else []
        rows = []
        for length, found in asked.items():
            scores = [*found["tasks"].values(), found["average"]]
            row = [length]
            for score in scores:
                parent = f" / {100 * score['parent_score']['mean']:.0f}" if against else ""
                row.append(f"{100 * score['score']['mean']:.0f}{parent}")
            rows.append([*row, _share(found["average"]["preserved"])] if against else row)
        who = "model / parent" if against else "model"
        pieces.append(FigureTable(f"Questions by length, % of answers found, {who}", columns, rows))
    return pieces


TABLES = {"text": _text, "tasks": _tasks, "long_context": _long_context}
