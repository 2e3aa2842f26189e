"""What `puzzle evaluate` found of a run's child: by domain, task and length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_nas.report.facts import Facts
from puzzle_nas.report.layout import commands, paragraph, table


def evaluations(facts: Facts) -> str:
    """Every part that was evaluated since the child was made; else how to."""
    made_from = (facts.run.record("distill_child") or {}).get("outputs_fingerprint")
    parts = {name: facts.file(f"evaluations/{name}.json") for name in TABLES}
    shown = [
        TABLES[name](part)
        for name, part in parts.items()
        if part is not None and part["parent"] is not None and part["made_from"] == made_from
    ]
    if not shown:
        return paragraph("By domain, task and length:", "note") + commands(
            f"puzzle evaluate {facts.run} --data FILE=DOMAIN --tasks FILE --long-context\n"
            f"puzzle write-report {facts.run} --again"
        )
    return "".join(shown)


def _with_error(of: Mapping[str, Any], form: str, scale: float = 1.0) -> str:
    error = of["standard_error"]
    return format(scale * of["mean"], form) + ("" if error is None else f" ± {format(scale * error, form.strip('+'))}")


def _preserved(of: Mapping[str, Any] | None) -> str:
    return "" if of is None else f"{100 * of['mean']:.0f} % ({100 * of['low']:.0f}-{100 * of['high']:.0f})"


def _by_domain(part: Mapping[str, Any]) -> str:
    domains = part["domains"] | ({"all": part["all"]} if len(part["domains"]) > 1 else {})
    rows = [
        (
            name,
            _with_error(found["kl_nats"], ".3f"),
            f"{found['perplexity']['mean']:.2f}",
            f"{found['parent_perplexity']['mean']:.2f}",
            f"{100 * found['top1_agreement']['mean']:.1f} %",
        )
        for name, found in sorted(domains.items(), key=lambda item: (item[0] == "all", -item[1]["kl_nats"]["mean"]))
    ]
    text = paragraph(f"By domain of text, sequences of {part['sequence_length']} tokens, what suffered most first.")
    return text + table(("domain", "KL nats", "perplexity", "parent's", "top-1 agreement"), rows, strong="all")


def _by_task(part: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        (
            name + ("" if found["counted"] else " *"),
            str(found["items"]),
            f"{100 * found['chance']:.1f} %",
            _with_error(found["parent_score"], ".1f", 100),
            _with_error(found["score"], ".1f", 100),
            _with_error(found["difference"], "+.1f", 100),
            _preserved(found["preserved"]),
        )
        for name, found in part["tasks"].items()
    ]
    if part["average_preserved"] is not None:
        rows.append(("average", *[""] * 5, _preserved(part["average_preserved"])))
    text = "By task; preserved is the child's score over the parent's, with a 95 % interval."
    if part["left_out"]:
        text += " * The parent is not above chance there; left out of the average."
    columns = ("task", "items", "chance", "parent, %", "child, %", "difference", "preserved")
    return paragraph(text) + table(columns, rows, strong="average")


def _by_length(part: Mapping[str, Any]) -> str:
    rows = []
    for length, row in part["lengths"].items():
        text, asked = row.get("text"), row.get("tasks") and row["average"]
        rows.append(
            (
                length,
                _with_error(text["kl_nats"], ".3f") if text else "",
                f"{100 * asked['parent_score']['mean']:.0f} %" if asked else "",
                f"{100 * asked['score']['mean']:.0f} %" if asked else "",
                _preserved(asked["preserved"]) if asked else "",
            )
        )
    text = "By length in tokens: text, and questions in the manner of RULER (share of the answers found)."
    return paragraph(text) + table(("tokens", "KL nats", "parent finds", "child finds", "preserved"), rows)


TABLES = {"text": _by_domain, "tasks": _by_task, "long_context": _by_length}
