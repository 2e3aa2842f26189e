"""Puzzle, figure 7: scores by KL against scores by LM loss, along the frontier."""

from benchmarks.paper.common import Budget, Children, Measured, Table, ordering

SPEEDUPS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.3)
PAPER = {"KL": "better along the frontier", "LM loss": ""}


def measure(budget: Budget) -> Measured:
    """Validation KL of what the search takes by either score."""
    children = Children(budget)
    columns = {
        f"{speedup}x": {
            "KL": children.kl_nats(children.chosen(speedup)),
            "LM loss": children.kl_nats(children.chosen(speedup, children.by_lm_loss)),
        }
        for speedup in SPEEDUPS
    }
    return Measured(columns, ordering({"LM loss": 0, "KL": 1}, columns))


TABLE = Table("figure_7", "Figure 7: KL against LM loss as score", "accuracy", PAPER, "KL, nats, by speed-up", measure)

if __name__ == "__main__":
    TABLE.main()
