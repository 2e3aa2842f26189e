"""Puzzle, table 11: the mixed-integer search against a greedy choice, layer by layer."""

from benchmarks.paper.common import SPEEDUPS, Budget, Children, Measured, Table, ordering
from puzzle_nas.errors import InfeasibleError

PAPER = {"greedy": 70.74, "MIP": 78.39}


def measure(budget: Budget) -> Measured:
    """Both at equal predicted speed, from the same library and scores."""
    children, columns = Children(budget), {}
    for speedup in SPEEDUPS:
        columns[f"{speedup}x"] = {"MIP": children.kl_nats(children.chosen(speedup))}
        try:
            columns[f"{speedup}x"]["greedy"] = children.kl_nats(children.baseline("greedy", speedup))
        except InfeasibleError as error:
            print(f"greedy at {speedup}x: {error}")
    return Measured(columns, ordering(PAPER, columns))


TABLE = Table("table_11", "Table 11: greedy against MIP", "MMLU", PAPER, "KL, nats, by speed-up", measure)

if __name__ == "__main__":
    TABLE.main()
