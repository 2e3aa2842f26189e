"""Puzzle, table 8: tokens of BLD. Reads benchmarks/results/bld.json, a settled experiment.

The paper has whole children after 0.25, 0.5 and 1 B tokens; ours has mean replace-1-block KL over the variants of two
layers, from least squares, after amounts that double twice.
"""

from benchmarks.paper.common import Budget, Measured, Table, figures_of, ordering

PAPER = {"least": 78.27, "more": 78.44, "most": 78.54}
OURS = {"none": "untrained", "least": "1e-3", "more": "16384_tokens", "most": "32768_tokens"}


def measure(budget: Budget) -> Measured:
    """Mean scores by tokens of BLD (docs/results.md, initialisation and BLD)."""
    figures = figures_of("bld")
    column = f"{figures['tokens']:,}, 16,384 and 32,768 tokens"
    columns = {column: {row: figures[f"mean_kl_nats.{name}"] for row, name in OURS.items()}}
    remark = "Single blocks: whether whole children gain from more BLD is not measured here."
    return Measured(columns, ordering(PAPER, columns), remark)


TABLE = Table("table_08", "Table 8: tokens of BLD", "MMLU", PAPER, "mean replace-1-block KL, nats", measure)

if __name__ == "__main__":
    TABLE.main()
