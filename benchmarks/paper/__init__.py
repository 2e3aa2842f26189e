"""The tables of Puzzle (arXiv 2411.19146) next to ours, and whether their orderings come out: docs/paper.md.

Each prints its table in the paper's row order and keeps benchmarks/results/paper/TABLE.json; without a TABLE all are
measured. Then the page is written anew of what is kept. Ours are KL(parent || child) in nats on validation text, where
nothing else is said: a parent of 135 M parameters is too near chance on the paper's tasks. Goes on where it stopped.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import save
from benchmarks.paper import from_results, searches, tasks, training  # noqa: F401  (each adds its tables)
from benchmarks.paper.common import BUDGETS, TABLES
from puzzle_nas.errors import PuzzleError

PAGE = Path("docs/paper.md")
HEAD = """# Do the paper's findings come out?

The tables of Puzzle ([arXiv 2411.19146](https://arxiv.org/abs/2411.19146)), in the paper's row order, with our figures
for SmolLM2-135M-Instruct beside the paper's for Llama-3. `make paper` measures them and writes this page
(`make paper BUDGET=gpu` with larger budgets). The paper's figures are accuracies, ours are KL(parent || child) in nats
where nothing else is said: compare orders, not sizes. An ordering came out if, of every two rows that differ in the
paper, the better one is better here in every column.
"""


def write_page() -> None:
    """docs/paper.md, and results/paper.json with every verdict."""
    parts, figures, missing = [HEAD], {}, ""
    for name in sorted(TABLES, key=lambda name: (name[0] == "f", name)):
        table = TABLES[name]
        if (kept := table.kept) is None:
            missing += f"- {table.title}: not measured yet: `python -m benchmarks paper {name}`.\n"
            continue
        figures[f"{name}_came_out"] = kept["figures"]["came_out"]
        # Figures of before there was one door name the table's own module.
        command = re.sub(r"benchmarks\.paper\.", "benchmarks paper ", kept["command"])
        how = f"`{command}`" if table.measure else "The script is gone ([results](results.md#settled))."
        parts.append(f"## {table.title}\n\nOurs: {table.ours}. {how}\n\n{table.markdown(kept['figures'])}")
    PAGE.write_text("\n".join([*parts, *([f"## Not here yet\n\n{missing}"] if missing else [])]))
    print("Written to", PAGE, "and", save("paper", figures, command="python -m benchmarks paper"))


def main(
    tables: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...")] = None,
    budget: Annotated[str, typer.Option(metavar="BUDGET", help=", ".join(BUDGETS))] = "cpu",
) -> None:
    """Measure, print, keep."""
    measured = {name: table.measure for name, table in TABLES.items() if table.measure}
    for name in tables or ():
        if name not in measured:
            raise PuzzleError(f"There is no table '{name}' to measure; tables: {', '.join(measured)}.")
    if budget not in BUDGETS:
        raise PuzzleError(f"There is no budget '{budget}'; budgets: {', '.join(BUDGETS)}.")
    for name in tables or measured:
        figures = measured[name](BUDGETS[budget]).figures
        print(f"{TABLES[name].title}\n\n{TABLES[name].markdown(figures)}")
        command = f"python -m benchmarks paper {name} --budget {budget}"
        print("Written to", save(f"paper/{name}", figures, command=command))
    write_page()
