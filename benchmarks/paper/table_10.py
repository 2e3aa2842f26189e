"""Puzzle, table 10: the full search space against the parent's blocks and no-ops only."""

from benchmarks.paper.common import SPEEDUPS, Budget, Children, Measured, Table, ordering
from puzzle_nas.errors import InfeasibleError

PAPER = {"no-op only": 75.40, "full space": 78.39}


def measure(budget: Budget) -> Measured:
    """Both at equal predicted speed."""
    children, columns = Children(budget), {}
    for speedup in SPEEDUPS:
        columns[f"{speedup}x"] = {"full space": children.kl_nats(children.chosen(speedup))}
        try:
            columns[f"{speedup}x"]["no-op only"] = children.kl_nats(children.baseline("no_op_only", speedup))
        except InfeasibleError as error:
            print(f"no-op only at {speedup}x: {error}")
    return Measured(columns, ordering(PAPER, columns))


TABLE = Table(
    "table_10", "Table 10: no-op only against the full space", "MMLU", PAPER, "KL, nats, by speed-up", measure
)

if __name__ == "__main__":
    TABLE.main()
