"""Puzzle, table 12: the mixed-integer search against the most parameters under the same limit."""

from benchmarks.paper.common import SPEEDUPS, Budget, Children, Measured, Table, ordering
from puzzle_nas.errors import InfeasibleError

PAPER = {"max-params": 23.12, "MIP": 78.39}


def measure(budget: Budget) -> Measured:
    """Both at equal predicted speed, from the same library and scores."""
    children, columns = Children(budget), {}
    for speedup in SPEEDUPS:
        columns[f"{speedup}x"] = {"MIP": children.kl_nats(children.chosen(speedup))}
        try:
            columns[f"{speedup}x"]["max-params"] = children.kl_nats(children.baseline("max_params", speedup))
        except InfeasibleError as error:
            print(f"max-params at {speedup}x: {error}")
    return Measured(columns, ordering(PAPER, columns))


TABLE = Table("table_12", "Table 12: max-params against MIP", "MMLU", PAPER, "KL, nats, by speed-up", measure)

if __name__ == "__main__":
    TABLE.main()
