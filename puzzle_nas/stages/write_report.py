"""summary.json and report.html, from what the other stages left."""

from __future__ import annotations

from puzzle_nas.artifacts import RunFolder, write_bytes, write_json
from puzzle_nas.recipe import Recipe
from puzzle_nas.report.page import render_page
from puzzle_nas.report.summary import build_summary


def run(recipe: Recipe, run: RunFolder) -> None:
    """Write both."""
    summary = build_summary(recipe, run)
    write_json(run.summary, summary)
    write_bytes(run.report, render_page(recipe, run, summary).encode())
