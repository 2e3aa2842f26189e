"""Puzzle, table 13: with and without GKD. Reads benchmarks/results/alternatives.json."""

from benchmarks.paper.common import SPEEDUPS, Budget, Measured, Table, figures_of, ordering

PAPER = {"without GKD": 69.06, "with GKD": 73.98}
MODELS = ("puzzle", "greedy", "random", "depth_pruned", "width_pruned")


def measure(budget: Budget) -> Measured:
    """From `python benchmarks/alternatives.py`: our children, and every other way of making one."""
    figures = figures_of("alternatives")
    columns = {
        f"{model} {speedup}x": {
            "without GKD": figures[f"kl_{model}_before_gkd_{speedup}x"],
            "with GKD": figures[f"kl_{model}_{speedup}x"],
        }
        for speedup in SPEEDUPS
        for model in MODELS
        if f"kl_{model}_{speedup}x" in figures
    }
    return Measured(columns, ordering(PAPER, columns))


TABLE = Table("table_13", "Table 13: with and without GKD", "accuracy", PAPER, "KL, nats", measure)

if __name__ == "__main__":
    TABLE.main()
