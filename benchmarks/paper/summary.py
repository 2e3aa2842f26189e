"""All tables side by side: docs/paper.md. benchmarks/results/paper.json says for each whether the ordering came out.

python -m benchmarks.paper.summary
"""

import importlib
from pathlib import Path

from benchmarks.results import save

PAGE = Path("docs/paper.md")
THERE = (
    "table_01",
    "table_02",
    "table_03",
    "table_04",
    "table_05",
    "table_06",
    "table_07",
    "table_08",
    "table_09",
    "table_10",
    "table_11",
    "table_12",
    "table_13",
    "figure_4",
    "figure_5",
    "figure_6",
    "figure_7",
)
HEAD = """# Do the paper's findings come out?

The tables of Puzzle ([arXiv 2411.19146](https://arxiv.org/abs/2411.19146)), in the paper's row order, with our figures
for SmolLM2-135M-Instruct beside the paper's for Llama-3. `make paper` measures them and writes this page
(`make paper BUDGET=gpu` with larger budgets); `benchmarks/paper/` has a script for each. The paper's figures are
accuracies, ours are KL(parent || child) in nats where nothing else is said: compare orders, not sizes. An ordering came
out if, of every two rows that differ in the paper, the better one is better here in every column.
"""


def main() -> None:
    """Write both from what the scripts kept."""
    parts, figures = [HEAD], {}
    missing: dict[str, str] = {}
    for name in THERE:
        table = importlib.import_module(f"benchmarks.paper.{name}").TABLE
        if (kept := table.kept) is None:
            missing[table.title] = f"not measured yet: `python -m benchmarks.paper.{name}`"
            continue
        figures[f"{name}_came_out"] = kept["figures"]["came_out"]
        parts.append(
            f"## {table.title}\n\nOurs: {table.ours}. `{kept['command']}`\n\n{table.markdown(kept['figures'])}"
        )
    if missing:
        parts.append("## Not here yet\n\n" + "".join(f"- {table}: {what}.\n" for table, what in missing.items()))
    PAGE.write_text("\n".join(parts))
    print("Written to", PAGE, "and", save("paper", figures, command="python -m benchmarks.paper.summary"))


if __name__ == "__main__":
    main()
