"""Puzzle, figure 5: quality against speed. The paper's children lose more the faster they are, ahead of other models.

Ours: the search's choice at rising speed-ups beside the best that removing no-ops alone reaches.
"""

import itertools

from benchmarks.paper.common import Budget, Children, Measured, Table
from puzzle_nas.errors import InfeasibleError

SPEEDUPS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.3)
PAPER = {"full space": "best at every throughput", "no-op only": "", "greedy": ""}


def measure(budget: Budget) -> Measured:
    """KL of children and baselines along the frontier."""
    children, columns = Children(budget), {}
    for speedup in SPEEDUPS:
        rows = {"full space": children.kl_nats(children.chosen(speedup))}
        for row, name in (("no-op only", "no_op_only"), ("greedy", "greedy")):
            try:
                rows[row] = children.kl_nats(children.baseline(name, speedup))
            except InfeasibleError as error:
                print(f"{row} at {speedup}x: {error}")
        columns[f"{speedup}x"] = rows
    claims = {
        f"{faster} loses more than {slower}": columns[slower]["full space"] < columns[faster]["full space"]
        for slower, faster in itertools.pairwise(columns)
    }
    for column, rows in columns.items():
        claims |= {f"{column}: {row} is worse": rows[row] > rows["full space"] for row in list(rows)[1:]}
    return Measured(columns, claims)


TABLE = Table("figure_5", "Figure 5: quality against speed", "accuracy", PAPER, "KL, nats, by speed-up", measure)

if __name__ == "__main__":
    TABLE.main()
