"""Puzzle, table 8: tokens of BLD. Reads benchmarks/results/initialisation.json.

The paper has whole children after 0.25, 0.5 and 1 B tokens; ours has mean replace-1-block KL over all variants, before
and after BLD, from the paper's initialisation and from least squares.
"""

import statistics

from benchmarks.paper.common import Budget, Measured, Table, figures_of, ordering

PAPER = {"least": 78.27, "more": 78.44, "most": 78.54}


def measure(budget: Budget) -> Measured:
    """From `python benchmarks/initialisation.py`."""
    figures = figures_of("initialisation")
    tokens = figures["bld_tokens"]

    def mean(way: str) -> float:
        return statistics.mean(v for k, v in figures.items() if k.startswith("mean_kl_") and k.endswith(f".{way}"))

    columns = {
        f"{label} (no BLD, {tokens} tokens)": {"least": mean(way), "most": mean(f"{way}_then_bld")}
        for label, way in (("paper's initialisation", "paper"), ("least squares", "least_squares"))
    }
    remark = "Two amounts only, and single blocks: whether whole children gain from more BLD is not measured here."
    return Measured(columns, ordering(PAPER, columns), remark)


TABLE = Table("table_08", "Table 8: tokens of BLD", "MMLU", PAPER, "mean replace-1-block KL, nats", measure)

if __name__ == "__main__":
    TABLE.main()
