"""Puzzle, figure 7: scores by KL against scores by LM loss, along the frontier."""

from benchmarks.paper.common import Budget, Children, Measured, Table, ordering

SPEEDUPS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.3)
PAPER = {"KL": "better along the frontier", "LM loss": ""}


def measure(budget: Budget) -> Measured:
    """Validation KL of what the search takes by either score, and what the sum of its KL scores made of it."""
    children = Children(budget)
    columns, real_over_sum = {}, []
    for speedup in SPEEDUPS:
        chosen = {"KL": children.chosen(speedup), "LM loss": children.chosen(speedup, children.by_lm_loss)}
        columns[f"{speedup}x"] = {row: children.kl_nats(child) for row, child in chosen.items()}
        ratios = [children.kl_nats(child) / children.found.score_of(child) for child in chosen.values()]
        real_over_sum.append(f"{speedup}x {ratios[0]:.2f} and {ratios[1]:.2f}")
    remark = (
        "Real KL over the sum of KL scores, of KL's child and of LM loss's: "
        f"{', '.join(real_over_sum)}. Where the second is less, its blocks harm less together than each alone."
    )
    return Measured(columns, ordering({"LM loss": 0, "KL": 1}, columns), remark)


TABLE = Table("figure_7", "Figure 7: KL against LM loss as score", "accuracy", PAPER, "KL, nats, by speed-up", measure)

if __name__ == "__main__":
    TABLE.main()
